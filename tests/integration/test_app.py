"""The whole application over ASGI, on families without a model: states, refusals, hanging up, and what is counted."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import io
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from app.engine.batcher import Batcher
from app.engine.family import Family
from app.errors import ModelLoadFailed, Overloaded
from app.generation import GenerateRequest
from app.main import create_app
from app.settings import Settings
from app.start import PHASES, Timeline
from tests.fakes import Dies, FailsAt, Gated, Instant, RunsOutOfMemory, Warns

INFER = "/v2/models/m/infer"
WAIT = 30.0
START_SECONDS = 300.0
"""For models that are loaded, and compiled, in other files."""


def prompt(text: str = "a cat", **parameters: Any) -> dict[str, Any]:
    inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [text]}]
    return {"inputs": inputs, "parameters": parameters}


@contextlib.asynccontextmanager
async def running(
    load: Callable[[], Family[Any]] | None, until_ready: bool = True, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose lifespan has begun."""
    options: dict[str, Any] = {"model_name": "m", "warm_up": False, "grace_period": 1.0, **settings}
    app = create_app(Settings(**options), load=load)
    async with app.router.lifespan_context(app), client_of(app) as client:
        if until_ready:
            await until(client, "/v2/health/ready", is_ready, START_SECONDS)
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://runtime")


async def until(
    client: httpx.AsyncClient, path: str, holds: Callable[[httpx.Response], bool], seconds: float = WAIT
) -> str:
    """The text of the first answer at `path` for which that holds."""
    async with asyncio.timeout(seconds):
        while not holds(answer := await client.get(path)):
            await asyncio.sleep(0.005)
    return answer.text


def is_ready(answer: httpx.Response) -> bool:
    assert "failed" not in answer.text
    return answer.status_code == 200


def metric(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_the_server_is_live_before_it_is_ready_and_says_why_it_is_not() -> None:
    loaded = threading.Event()

    def load() -> Family[Any]:
        loaded.wait(30)
        return Instant()

    async with running(load, until_ready=False) as client:
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        ready = await client.get("/v2/health/ready")
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "error": "Not every model is ready: m is loading."}
        assert (await client.get("/v2/models/m/ready")).json()["ready"] is False
        refused = await client.post(INFER, json=prompt())
        assert refused.status_code == 503 and "loading" in refused.json()["error"]
        loaded.set()
        await until(client, "/v2/health/ready", is_ready)
        assert (await client.post(INFER, json=prompt())).status_code == 200


async def test_readiness_says_what_loading_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, reported = threading.Event(), threading.Event()

    def load_family(_settings: Settings, report: Callable[[str], None], *_: object) -> Family[Any]:
        report("reading unet (1.2 of 5.1 GB)")
        reported.set()
        loaded.wait(30)
        return Instant()

    monkeypatch.setattr("app.engine.weights.load_family", load_family)
    async with running(None, until_ready=False, model_id="demo") as client:
        await asyncio.to_thread(reported.wait, 30)
        ready = await client.get("/v2/models/m/ready")
        assert ready.status_code == 503
        assert ready.json()["error"] == "The model m is loading: reading unet (1.2 of 5.1 GB)."
        refused = await client.post(INFER, json=prompt())
        assert refused.json()["error"].startswith("The model m is loading: reading unet (1.2 of 5.1 GB); try again")
        loaded.set()
        await until(client, "/v2/models/m/ready", is_ready)


async def test_log_and_metrics_say_what_the_start_consisted_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load_family(_settings: Settings, _report: object, timeline: Timeline, _ranks: object) -> Family[Any]:
        with timeline.phase("read"):
            time.sleep(0.05)
        with timeline.phase("device"), timeline.phase("compile"):
            pass
        return Instant()

    monkeypatch.setattr("app.engine.weights.load_family", load_family)
    with caplog.at_level(logging.INFO, "app.main"):
        async with running(None, model_id="demo", warm_up=True) as client:
            text = (await client.get("/metrics")).text
    pattern = r"model m is ready after \d+\.\d seconds: import .*, read .*, to device .*, compile .*, warm up \d+\.\d"
    assert [message for message in caplog.messages if re.fullmatch(pattern, message)]
    seconds = {phase: metric(text, f'sdxl_start_seconds{{model_name="m",phase="{phase}"}}') for phase in PHASES}
    assert seconds["read"] >= 0.05 and seconds["warm_up"] > 0
    # What comes after the last phase is told by nobody: callbacks and the log.
    assert sum(seconds.values()) <= metric(text, "sdxl_model_load_seconds")


async def test_a_model_that_cannot_be_loaded_never_becomes_ready() -> None:
    def load() -> Family[Any]:
        raise ModelLoadFailed("no such folder")

    async with running(load, until_ready=False) as client:
        await until(client, "/v2/health/ready", lambda answer: "failed" in answer.text)
        assert (await client.post(INFER, json=prompt())).status_code == 503


async def test_every_path_answers_with_and_without_version_and_trailing_slash() -> None:
    async with running(Instant) as client:
        for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/ready",
                     "/v2/models/m/versions/1", "/v2/models/m/versions/1/ready"):  # fmt: skip
            first, second = await client.get(path), await client.get(path + "/")
            assert first.status_code == second.status_code == 200 and first.json() == second.json()
        for path in (INFER, INFER + "/", "/v2/models/m/versions/1/infer", "/v2/models/m/versions/1/infer/"):
            answer = await client.post(path, json=prompt(seed=3))
            assert answer.status_code == 200
            assert answer.json().get("model_version") == ("1" if "versions" in path else None)


@pytest.mark.parametrize("path", ["/v2/models/m/versions/2", "/v2/models/m/versions/2/ready", "/v2/models/x", "/v3"])
async def test_what_does_not_exist_is_404_with_a_sentence(path: str) -> None:
    async with running(Instant) as client:
        answer = await client.get(path)
    assert answer.status_code == 404 and list(answer.json()) == ["error"]


async def test_probes_answer_while_a_step_blocks_the_device() -> None:
    family = Gated()
    async with running(lambda: family) as client:
        running_requests = [asyncio.ensure_future(client.post(INFER, json=prompt())) for _ in range(8)]
        await asyncio.to_thread(family.waiting.wait, 30)
        for _ in range(100):
            assert (await client.get("/v2/health/live")).status_code == 200
            assert (await client.get("/v2/models/m/ready")).status_code == 200
        assert not any(request.done() for request in running_requests)
        family.permit(1000)
        assert {answer.status_code for answer in await asyncio.gather(*running_requests)} == {200}


async def test_a_full_queue_is_429_with_the_seconds_to_wait_and_is_counted() -> None:
    family = Gated()
    async with running(lambda: family, max_queue=2, max_images_per_request=2) as client:
        accepted = [asyncio.ensure_future(client.post(INFER, json=prompt())) for _ in range(2)]
        await until(
            client,
            "/metrics",
            lambda answer: metric(answer.text, "sdxl_running_images") + metric(answer.text, "sdxl_pending_images") == 2,
        )
        refused = [await client.post(INFER, json=prompt()) for _ in range(5)]
        assert {answer.status_code for answer in refused} == {429}
        assert all(int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"] for answer in refused)
        family.permit(1000)
        assert {answer.status_code for answer in await asyncio.gather(*accepted)} == {200}
        text = (await client.get("/metrics")).text
        assert 'sdxl_rejected_total{model_name="m",reason="overloaded"} 5.0' in text


async def test_a_wait_is_told_in_whole_seconds_that_are_enough() -> None:
    class Full(Instant):
        def resolve(self, request: GenerateRequest) -> GenerateRequest:
            raise Overloaded("The queue is full.", 41.2)

    async with running(Full) as client:
        refused = await client.post(INFER, json=prompt())
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "42"


async def test_a_client_that_hangs_up_is_cancelled_and_its_place_given_back() -> None:
    family = Gated()
    async with running(lambda: family) as client:
        app: Any = client._transport
        received = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not received.is_set():
                received.set()
                return {"type": "http.request", "body": json.dumps(prompt()).encode(), "more_body": False}
            await asyncio.to_thread(family.waiting.wait, 30)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            return None

        scope = {"type": "http", "method": "POST", "path": INFER, "headers": [], "query_string": b"",
                 "http_version": "1.1", "scheme": "http", "server": ("runtime", 80)}  # fmt: skip
        await app.app(scope, receive, send)
        family.permit(1000)
        text = await until(client, "/metrics", lambda answer: metric(answer.text, "sdxl_cancelled_total") >= 1)
        assert metric(text, "sdxl_pending_images") == metric(text, "sdxl_running_images") == 0
        assert len(family.passes) <= 1


async def test_a_deadline_of_the_request_is_504() -> None:
    family = Gated()
    async with running(lambda: family) as client:
        answer = asyncio.ensure_future(client.post(INFER, json=prompt(timeout=50_000)))
        await asyncio.to_thread(family.waiting.wait, 30)
        await asyncio.sleep(0.1)
        family.permit(1000)
        assert (await answer).status_code == 504


@pytest.mark.parametrize("parameters", [{}, {"timeout": 10_000_000_000}])
async def test_no_request_has_more_time_than_the_server_gives(parameters: dict[str, Any]) -> None:
    family = Gated()
    async with running(lambda: family, request_timeout=0.05) as client:
        assert (await client.post(INFER, json=prompt(**parameters))).status_code == 504
        family.permit(1000)


async def test_limits_hold_for_the_models_own_defaults_too() -> None:
    async with running(Instant, max_pixels=100) as client:
        refused = await client.post(INFER, json=prompt())
        assert refused.status_code == 400 and "max_pixels" in refused.json()["error"]


@pytest.mark.parametrize(
    ("family", "request_body", "status"),
    [
        pytest.param(FailsAt("step"), prompt("fail"), 500, id="a-step-that-breaks"),
        pytest.param(FailsAt("decode"), prompt("fail"), 500, id="a-decode-that-breaks"),
        pytest.param(RunsOutOfMemory(), prompt(width=128), 507, id="out-of-memory"),
    ],
)
async def test_a_failure_is_one_error_and_the_next_request_gets_its_picture(
    family: Family[Any], request_body: dict[str, Any], status: int
) -> None:
    async with running(lambda: family) as client:
        failed = await client.post(INFER, json=request_body)
        assert failed.status_code == status and list(failed.json()) == ["error"]
        text = (await client.get("/metrics")).text
        assert metric(text, "sdxl_failed_total") == 1 and metric(text, "sdxl_rejected_total") == 0
        assert (await client.post(INFER, json=prompt())).status_code == 200


async def test_a_dead_device_thread_is_not_live() -> None:
    async with running(Dies) as client:
        assert (await client.post(INFER, json=prompt())).status_code == 500
        await until(client, "/v2/health/live", lambda answer: answer.status_code == 503)
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.post(INFER, json=prompt())).status_code == 503


async def test_a_bug_of_ours_is_a_500_in_the_protocols_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("secret detail")

    async with running(Instant) as client:
        monkeypatch.setattr("app.protocol.oip.write_infer", broken)
        answer = await client.post(INFER, json=prompt())
        assert answer.status_code == 500 and list(answer.json()) == ["error"] and "secret" not in answer.text


async def test_metrics_carry_kserves_names_and_no_label_that_a_caller_chose() -> None:
    async with running(Instant) as client:
        await client.post(INFER, json=prompt("a prompt to look for", num_images_per_prompt=3))
        await client.post("/v2/models/unheard-of/infer", json=prompt())
        text = (await client.get("/metrics")).text
    for name in ("preprocess", "predict", "postprocess"):
        assert f'request_{name}_seconds_count{{model_name="m"}} 1.0' in text
        assert f'request_{name}_seconds_bucket{{le="600.0",model_name="m"}} 1.0' in text
        assert metric(text, f"request_{name}_seconds_sum") > 0
    assert 'sdxl_images_total{model_name="m"} 3.0' in text
    assert 'sdxl_steps_total{model_name="m"} 12.0' in text
    assert 'sdxl_rejected_total{model_name="m",reason="model_not_found"} 1.0' in text
    assert "unheard-of" not in text and "look for" not in text


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/openapi.json", "/v2", "/v2/models/m", "/nothing"])
async def test_without_the_key_everything_but_health_is_401(path: str) -> None:
    async with running(Instant, api_key="sesame") as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic sesame"},
            {"Host": "/v2/health/live"},
        ):
            answer = await client.get(path, headers=headers)
            assert answer.status_code == 401 and list(answer.json()) == ["error"]
            assert answer.headers["WWW-Authenticate"].split(", ")[0] == "Bearer"
        allowed = await client.get(path, headers={"Authorization": "Bearer sesame"})
        assert allowed.status_code == (404 if path == "/nothing" else 200)
        assert (await client.get("/v2/health/live")).status_code == 200


async def test_a_request_id_is_echoed_or_made() -> None:
    async with running(Instant) as client:
        given = await client.get("/v2", headers={"X-Request-Id": "abc-1"})
        assert given.headers["X-Request-Id"] == "abc-1"
        made = await client.get("/v2", headers={"X-Request-Id": "evil\tid" * 100})
        assert len(made.headers["X-Request-Id"]) == 32


async def test_the_latency_line_names_the_request_and_its_stages_and_never_the_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        async with running(Instant) as client:
            await client.post(INFER, json=prompt("a secret wish"))
    (record,) = [record for record in caplog.records if record.getMessage() == "infer"]
    fields = record.__dict__["fields"]
    assert fields["model"] == "m" and fields["status"] == 200 and fields["images"] == 1
    assert {"queue_s", "denoise_s", "decode_s", "encode_s", "total_s"} <= set(fields)
    assert "secret wish" not in caplog.text


async def test_no_latency_line_is_written_where_none_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with running(Instant, enable_latency_logging=False) as client:
            assert (await client.post(INFER, json=prompt())).status_code == 200
    assert "infer" not in caplog.messages


async def test_the_access_log_writes_paths_as_they_were_asked_for_and_nothing_else_through(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(Instant, access_log_format="%(r)s %(s)s") as client:
        with caplog.at_level(logging.INFO, "app.access"):
            await client.get("/v1/models/m:predict")
            await client.get("/v2/%0aGET%20/forged")
    assert caplog.messages[-2:] == ["GET /v1/models/m:predict HTTP/1.1 405", "GET /v2/%0AGET%20/forged HTTP/1.1 404"]


async def test_the_access_log_writes_no_line_that_a_proxy_s_word_for_the_client_forges(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forged = '9.9.9.9 "GET /v2 HTTP/1.1" 200\n\x1b[31m'
    async with running(Instant, access_log_format='%(h)s "%(r)s" %(s)s') as client:
        transport: Any = client._transport
        with caplog.at_level(logging.INFO, "app.access"):
            for address in (forged, "fe80::1%eth0", "10.0.0.7"):
                transport.client = (address, 1)
                await client.get("/v2/health/live")
    first, *others = caplog.messages[-3:]
    assert first == '9.9.9.9%20%22GET%20%2Fv2%20HTTP%2F1.1%22%20200%0A%1B%5B31m "GET /v2/health/live HTTP/1.1" 200'
    assert others == [f'{client} "GET /v2/health/live HTTP/1.1" 200' for client in ("fe80::1%eth0", "10.0.0.7")]


async def test_what_has_no_effect_in_protocol_v1_is_told_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    instance = {"prompt": "a secret wish", "denoising_limit": 0.8}
    async with running(Warns) as client:
        for _ in range(3):
            answer = await client.post("/v1/models/m:predict", json={"instances": [instance, instance]})
            assert answer.status_code == 200 and list(answer.json()) == ["predictions"]
    told = [record for record in caplog.records if "denoising_limit has no effect" in record.getMessage()]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "secret wish" not in caplog.text


async def test_seeds_are_drawn_when_nobody_chose_one_and_named_in_the_answer() -> None:
    async with running(Instant) as client:
        answers = [(await client.post(INFER, json=prompt(num_images_per_prompt=2))).json() for _ in range(2)]
        seeds = [answer["outputs"][1]["data"] for answer in answers]
        assert seeds[0] != seeds[1] and all(second == first + 1 for first, second in seeds)
        again = (await client.post(INFER, json=prompt(seed=seeds[0][1]))).json()
        assert again["outputs"][0]["data"][0] == answers[0]["outputs"][0]["data"][1]


@pytest.mark.parametrize("embedded", [True, False])
async def test_a_picture_tells_how_it_was_made_unless_the_server_keeps_that_back(embedded: bool) -> None:
    async with running(Instant, embed_metadata=embedded) as client:
        answer = (await client.post(INFER, json=prompt())).json()
    picture: Any = Image.open(io.BytesIO(base64.b64decode(answer["outputs"][0]["data"][0])))
    assert bool(picture.text) == embedded


def test_every_setting_of_the_engine_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Noted(Batcher):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.update(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr("app.main.Batcher", Noted)
    settings: dict[str, Any] = {
        "max_queue": 17,
        "max_batch_size": 3,
        "max_batch_pixels": 70_000,
        "max_queue_seconds": 11.0,
        "step_timeout": 7.0,
        "idempotency_seconds": 13.0,
        "encode_threads": 5,
        "embed_metadata": False,
        "warm_up": False,
    }
    assert settings.keys() == inspect.signature(Batcher).parameters.keys() & Settings.model_fields.keys()
    create_app(Settings(**settings))
    assert settings.items() <= given.items()
