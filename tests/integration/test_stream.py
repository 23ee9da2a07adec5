"""Streams of events, requests by their ids, and requests that come twice, over ASGI on families without a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import json
import logging
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image

from app.engine.family import Family
from app.engine.ticket import Ticket
from app.generation import GenerateRequest
from app.main import create_app
from app.settings import Settings
from tests.fakes import CannotPreview, Dies, FailsAt, Gated, Instant, LosesTheDevice, Previews
from tests.integration.test_app import is_ready, metric, until

WAIT = 30
MODEL = "/v2/models/m"


class Stream:
    """One streaming answer, read event by event; `hang_up` closes the connection."""

    def __init__(self, app: Any, path: str, body: Any, headers: dict[str, str]) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._sent = False
        self._body = json.dumps(body).encode()
        self.heartbeats = 0
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": path, "headers": raw, "query_string": b"",
                 "http_version": "1.1", "scheme": "http", "server": ("runtime", 80)}  # fmt: skip
        self._task = asyncio.ensure_future(app(scope, self._receive, self._messages.put))

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _message(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._messages.get(), WAIT)

    async def start(self) -> tuple[int, dict[str, str]]:
        message = await self._message()
        assert message["type"] == "http.response.start"
        return message["status"], {name.decode(): value.decode() for name, value in message["headers"]}

    async def event(self) -> tuple[str, Any] | None:
        """The next event, ``None`` at the end."""
        while True:
            message = await self._message()
            if not message.get("more_body"):
                return None
            text = message["body"].decode()
            assert text.endswith("\n\n")
            if text.startswith(":"):
                self.heartbeats += 1
                continue
            name, data = text.removesuffix("\n\n").split("\n")
            return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def events(self) -> list[tuple[str, Any]]:
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        await asyncio.wait_for(self._task, WAIT)
        return found

    async def hang_up(self) -> None:
        self._gone.set()
        await asyncio.wait_for(self._task, WAIT)


class Server:
    def __init__(self, app: Any, client: httpx.AsyncClient) -> None:
        self._app = app
        self.client = client

    def stream(self, body: Any, path: str = f"{MODEL}/generate_stream", **headers: str) -> Stream:
        return Stream(self._app, path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    async def metric(self, name: str) -> float:
        return metric((await self.client.get("/metrics")).text, name)

    async def until(self, name: str, value: float) -> None:
        await until(self.client, "/metrics", lambda answer: metric(answer.text, name) == value)

    async def assert_empty(self) -> None:
        for name in ("sdxl_pending_images", "sdxl_running_images", "sdxl_open_streams", "sdxl_queue_seconds"):
            await self.until(name, 0)


@contextlib.asynccontextmanager
async def running(family: Family[Any], **settings: Any) -> AsyncIterator[Server]:
    options: dict[str, Any] = {"model_name": "m", "warm_up": False, "grace_period": 1.0, **settings}
    app = create_app(Settings(**options), load=lambda: family)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://r") as client:
        await until(client, "/v2/health/ready", is_ready)
        try:
            yield Server(app, client)
        finally:
            if isinstance(family, Gated):
                family.permit(10_000)


def infer_body(text: str = "a cat", **parameters: Any) -> dict[str, Any]:
    inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [text]}]
    return {"inputs": inputs, "parameters": parameters}


# --- The short form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a cat", "seed": 3, "num_inference_steps": 2},
        {"text_input": "a cat", "parameters": {"seed": 3, "num_inference_steps": 2}},
        {"prompt": "a cat", "parameters": {"seed": 3}, "num_inference_steps": 2, "negative_prompt": None},
        infer_body(seed=3, num_inference_steps=2),
    ],
)
async def test_the_short_form_gets_the_answer_of_infer(body: dict[str, Any]) -> None:
    async with running(Instant()) as server:
        infer = (await server.client.post(f"{MODEL}/infer", json=infer_body(seed=3, num_inference_steps=2))).json()
        for path in ("generate", "versions/1/generate"):
            answer = await server.client.post(f"{MODEL}/{path}", json=body)
            assert answer.status_code == 200
            assert answer.json()["outputs"] == infer["outputs"]
            assert "num_inference_steps" not in answer.json()["parameters"], "it was given"


async def test_the_short_form_takes_pairs_images_and_options_and_gives_its_id_back() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    body = {
        "id": "mine",
        "prompt": "a cat",
        "image": base64.b64encode(picture.getvalue()).decode(),
        "original_size": [16, 16],
        "timeout": 30_000_000,
        "priority": 1,
    }
    async with running(Instant()) as server:
        answer = await server.client.post(f"{MODEL}/generate", json=body)
        assert answer.status_code == 200 and answer.json()["id"] == "mine"
        binary = await server.client.post(f"{MODEL}/generate", json={"prompt": "p", "binary_data_output": True})
        assert binary.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ([], "a JSON object with a prompt"),
        ({}, "prompt is missing"),
        ({"prompt": "a", "text_input": "b"}, "not both"),
        ({"prompt": "a", "seed": 1, "parameters": {"seed": 2}}, "given twice"),
        ({"prompt": "a", "parameters": [1]}, "parameters must be an object"),
        ({"prompt": "a", "parameters": []}, r"parameters must be an object, not []"),
        ({"prompt": "a", "parameters": False}, "parameters must be an object, not false"),
        ({"prompt": "a", "id": 7}, "id must be text"),
        ({"prompt": "a", "num_steps": 7}, "num_steps"),
        ({"prompt": "a", "priority": 10}, "priority must be"),
        ({"prompt": "a", "priority": True}, "priority must be"),
        ({"prompt": "a", "priority": 1.5}, "priority must be"),
        ({"prompt": "a", "timeout": "soon"}, "timeout must be"),
        ({"prompt": "a", "preview": "latents"}, "preview needs a stream"),
        (infer_body(preview="vae"), "preview needs a stream"),
        ({"prompt": "a", "preview": "photo"}, "none, latents or vae"),
        ({"prompt": "a", "preview_every": 2}, "preview_every needs preview"),
    ],
)
async def test_what_the_short_form_cannot_be_is_one_sentence(body: Any, sentence: str) -> None:
    async with running(Instant()) as server:
        answer = await server.client.post(f"{MODEL}/generate", json=body)
        assert answer.status_code == 400 and sentence in answer.json()["error"]


@pytest.mark.parametrize("path", ["infer_stream", "generate_stream"])
@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [([64, 128], "needs pictures of one size"), ([2048, 2048], "ask for it as binary data above")],
)
async def test_pixels_that_no_answer_can_hold_are_refused_before_they_are_painted(
    path: str, sizes: list[int], sentence: str
) -> None:
    inputs = [
        {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a", "b"]},
        *({"name": side, "shape": [2], "datatype": "INT64", "data": sizes} for side in ("height", "width")),
    ]
    async with running(family := Instant()) as server:
        passes = len(family.passes)
        answer = await server.client.post(f"{MODEL}/{path}", json={"inputs": inputs, "outputs": [{"name": "pixels"}]})
        assert answer.status_code == 400 and sentence in answer.json()["error"]
        assert len(family.passes) == passes


async def test_while_a_request_is_read_the_server_answers_others() -> None:
    """Planning many steps, or taking long prompts apart, may take a second; health is asked for in the meantime."""

    class Ponders(Instant):
        go = threading.Event()

        def resolve(self, request: GenerateRequest) -> GenerateRequest:
            assert request.prompt != "hard" or self.go.wait(WAIT)
            return super().resolve(request)

    async with running(family := Ponders()) as server:
        asked = asyncio.ensure_future(server.client.post(f"{MODEL}/generate", json={"prompt": "hard"}))
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await server.client.get(path)).status_code == 200
        assert (await server.client.post(f"{MODEL}/generate", json={"prompt": "easy"})).status_code == 200
        assert not asked.done()
        family.go.set()
        assert (await asked).status_code == 200


async def test_a_priority_may_be_written_with_a_fraction_that_is_none() -> None:
    async with running(Instant()) as server:
        assert (await server.client.post(f"{MODEL}/generate", json={"prompt": "a", "priority": 3.0})).status_code == 200


async def test_a_path_with_two_methods_names_both() -> None:
    async with running(Instant()) as server:
        answer = await server.client.put("/v2/requests/x")
        assert answer.status_code == 405 and answer.headers["allow"] == "DELETE, GET, HEAD"


async def test_infer_has_no_previews_either() -> None:
    async with running(Instant()) as server:
        answer = await server.client.post(f"{MODEL}/infer", json=infer_body(preview="latents"))
        assert answer.status_code == 400 and "generate_stream" in answer.json()["error"]


# --- Events ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["generate_stream", "infer_stream", "versions/1/infer_stream"])
@pytest.mark.parametrize("body", [{"prompt": "a cat", "seed": 3}, infer_body(seed=3)])
async def test_a_stream_tells_of_place_and_steps_and_ends_with_the_answer_of_infer(path: str, body: Any) -> None:
    async with running(Instant()) as server:
        infer = (await server.client.post(f"{MODEL}/infer", json=infer_body(seed=3))).json()
        stream = server.stream(body, f"{MODEL}/{path}", X_Request_Id="abc")
        status, headers = await stream.start()
        assert status == 200
        assert headers["content-type"] == "text/event-stream" and headers["cache-control"] == "no-store"
        assert headers["x-accel-buffering"] == "no" and headers["x-request-id"] == "abc"
        events = await stream.events()
        assert [name for name, _ in events] == ["queued", "step", "step", "step", "step", "done"]
        assert events[0][1]["request_id"] == "abc" and events[0][1]["place"] == 1
        assert [data["step"] for name, data in events if name == "step"] == [1, 2, 3, 4]
        assert all(data["steps"] == 4 and data["remaining_seconds"] >= 0 for name, data in events if name == "step")
        assert events[-1][1]["outputs"] == infer["outputs"]
        assert events[-1][1].get("model_version") == ("1" if "versions" in path else None)
        for name, count in (("queued", 1), ("step", 4), ("done", 1), ("error", 0)):
            assert await server.metric(f'sdxl_stream_events_total{{event="{name}"') == count
        await server.assert_empty()


async def test_those_who_wait_hear_how_their_place_changes() -> None:
    family = Gated()
    async with running(family, max_batch_size=1) as server:
        first = server.stream({"prompt": "p", "num_inference_steps": 1, "guidance_scale": 1.0})
        await first.start()
        await asyncio.to_thread(family.waiting.wait, WAIT)
        waiting = []
        for _ in range(2):
            stream = server.stream({"prompt": "p", "num_inference_steps": 1, "guidance_scale": 1.0})
            await stream.start()
            name, data = await stream.event() or ("", {})
            waiting.append((name, data["place"]))
        assert waiting == [("queued", 1), ("queued", 2)]
        family.permit(2)
        name, data = await stream.event() or ("", {})
        assert (name, data["place"]) == ("queued", 1)
        family.permit(100)
        assert [name for name, _ in await stream.events()] == ["step", "done"]


@pytest.mark.parametrize(
    ("body", "path", "status"),
    [
        ({"prompt": "a", "steps": 3}, f"{MODEL}/generate_stream", 400),
        ({"prompt": "a", "binary_data_output": True}, f"{MODEL}/generate_stream", 400),
        ({"prompt": "a"}, "/v2/models/x/generate_stream", 404),
    ],
)
async def test_what_goes_wrong_before_the_first_event_is_an_error_like_any_other(
    body: Any, path: str, status: int
) -> None:
    async with running(Instant()) as server:
        answer = await server.client.post(path, json=body)
        assert answer.status_code == status and list(answer.json()) == ["error"]
        assert answer.headers["content-type"] == "application/json"
        await server.assert_empty()


async def test_a_full_queue_refuses_a_stream_as_it_refuses_infer() -> None:
    family = Gated()
    async with running(family, max_queue=1, max_images_per_request=1) as server:
        await server.stream({"prompt": "p"}).start()
        answer = await server.client.post(f"{MODEL}/generate_stream", json={"prompt": "p"})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("family", "body", "status", "code"),
    [
        (FailsAt("step"), {"prompt": "fail"}, 500, "generation_failed"),
        (LosesTheDevice(), {"prompt": "p"}, 500, "device_lost"),
        (Dies(), {"prompt": "p"}, 500, "generation_failed"),
    ],
)
async def test_what_goes_wrong_later_is_the_last_event_and_the_status_in_the_log(
    family: Any, body: Any, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(family) as server:
        stream = server.stream(body)
        assert (await stream.start())[0] == 200
        name, data = (await stream.events())[-1]
        assert name == "error" and (data["status"], data["code"]) == (status, code) and data["error"].endswith(".")
        await server.assert_empty()
    assert [each.fields["status"] for each in caplog.records if each.getMessage() == "stream"] == [status]  # type: ignore[attr-defined]


async def test_a_deadline_ends_a_stream_too() -> None:
    family = Gated()
    async with running(family) as server:
        stream = server.stream({"prompt": "p", "timeout": 20_000})
        await stream.start()
        name, data = (await stream.events())[-1]
        assert name == "error" and data["status"] == 504


async def test_proxies_hear_that_the_server_is_still_there_and_nothing_goes_on_after_the_end() -> None:
    family = Gated()
    async with running(family, heartbeat_seconds=0.01) as server:
        tasks = asyncio.all_tasks()
        stream = server.stream({"prompt": "p"})
        await stream.start()
        assert (await stream.event() or ("",))[0] == "queued"
        next_event = asyncio.ensure_future(stream.event())
        while stream.heartbeats < 3:
            await asyncio.sleep(0.005)
        family.permit(100)
        assert (await next_event or ("",))[0] == "step"
        await stream.events()
        async with asyncio.timeout(300):
            while not asyncio.all_tasks() <= tasks:
                await asyncio.sleep(0.01)


async def test_a_client_that_hangs_up_cancels_its_request_and_its_neighbour_gets_the_picture() -> None:
    family = Gated()
    async with running(family) as server:
        leaving, staying = (server.stream({"prompt": "p", "seed": seed, "num_inference_steps": 3}) for seed in (1, 2))
        await leaving.start()
        await staying.start()
        await asyncio.to_thread(family.waiting.wait, WAIT)
        await leaving.hang_up()
        assert await server.metric("sdxl_cancelled_total") == 1
        family.permit(100)
        assert (await staying.events())[-1][0] == "done"
        assert sum(1 in seeds for seeds in family.passes) <= 1
        await server.assert_empty()


@pytest.mark.parametrize("kind", ["latents", "vae"])
async def test_previews_come_at_the_steps_that_were_asked_for(kind: str) -> None:
    async with running(Previews(), encode_threads=1) as server:
        stream = server.stream(
            {"prompt": "p", "num_inference_steps": 6, "num_images_per_prompt": 2, "preview": kind, "preview_every": 2}
        )
        await stream.start()
        events = await stream.events()
        # The encoder works in order, so all previews come before the pictures.
        previews = [data for name, data in events if name == "preview"]
        assert sorted((data["image"], data["step"]) for data in previews) == [(0, 2), (0, 4), (1, 2), (1, 4)]
        picture = Image.open(io.BytesIO(base64.b64decode(previews[0]["data"])))
        assert previews[0]["content_type"] == "image/jpeg"
        assert picture.format == "JPEG" and picture.size == ((2, 2) if kind == "latents" else (16, 16))
        assert events[-1][0] == "done"


@pytest.mark.parametrize(("family", "outcome"), [(CannotPreview(), "failed"), (Instant(), "none")])
async def test_a_picture_comes_without_previews_where_there_are_none(family: Any, outcome: str) -> None:
    async with running(family) as server:
        stream = server.stream({"prompt": "p", "preview": "latents", "preview_every": 1})
        await stream.start()
        names = [name for name, _ in await stream.events()]
        assert "preview" not in names and names[-1] == "done"
        assert await server.metric(f'sdxl_previews_total{{model_name="m",outcome="{outcome}"') == 3


# --- Requests by their ids -------------------------------------------------------------------------------------


async def test_a_request_is_followed_and_cancelled_by_its_id() -> None:
    family = Gated()
    async with running(family) as server:
        painting = asyncio.ensure_future(
            server.client.post(f"{MODEL}/infer", json=infer_body(), headers={"X-Request-Id": "mine"})
        )
        await asyncio.to_thread(family.waiting.wait, WAIT)
        status = (await server.client.get("/v2/requests/mine")).json()
        assert status == {"id": "mine", "state": "running", "step": 0, "steps": 4}
        cancelled = await server.client.delete("/v2/requests/mine")
        assert cancelled.status_code == 200 and cancelled.json()["state"] == "cancelled"
        answer = await painting
        assert answer.status_code == 499 and "cancelled" in answer.json()["error"]
        for ask in (server.client.get, server.client.delete):
            assert (await ask("/v2/requests/mine")).status_code == 404
        family.permit(100)
        done = await server.client.post(f"{MODEL}/infer", json=infer_body(), headers={"X-Request-Id": "other"})
        assert done.status_code == 200
        status = (await server.client.get("/v2/requests/other")).json()
        assert status == {"id": "other", "state": "done", "step": 4, "steps": 4}
        assert sum(map(len, family.passes)) == 1 + 4
        await server.assert_empty()


async def test_an_id_that_nobody_has_is_404() -> None:
    async with running(Instant()) as server:
        for ask in (server.client.get, server.client.delete):
            answer = await ask("/v2/requests/nobody")
            assert answer.status_code == 404 and "X-Request-Id" in answer.json()["error"]


async def test_with_a_key_only_its_owner_sees_and_cancels() -> None:
    family = Gated()
    async with running(family, api_key="sesame") as server:
        headers = {"Authorization": "Bearer sesame"}
        painting = asyncio.ensure_future(
            server.client.post(f"{MODEL}/infer", json=infer_body(), headers={**headers, "X-Request-Id": "mine"})
        )
        await asyncio.to_thread(family.waiting.wait, WAIT)
        for ask in (server.client.get, server.client.delete):
            assert (await ask("/v2/requests/mine")).status_code == 401
            assert (await ask("/v2/requests/mine", headers={"Authorization": "Bearer x"})).status_code == 401
        family.permit(100)
        assert (await painting).status_code == 200


async def test_a_failed_request_says_why_when_it_is_asked_about() -> None:
    async with running(FailsAt("step")) as server:
        headers = {"X-Request-Id": "broken"}
        failed = await server.client.post(f"{MODEL}/infer", json=infer_body("fail"), headers=headers)
        status = (await server.client.get("/v2/requests/broken")).json()
        assert status["state"] == "failed" and status["error"] == failed.json()["error"]


# --- The same request twice ------------------------------------------------------------------------------------


async def test_a_request_that_comes_twice_is_painted_once_while_it_runs_and_after() -> None:
    family = Gated()
    async with running(family) as server:
        headers = {"Idempotency-Key": "order 1"}
        first, second = (
            asyncio.ensure_future(server.client.post(f"{MODEL}/infer", json=infer_body(), headers=headers))
            for _ in range(2)
        )
        await server.until('sdxl_idempotent_total{model_name="m",outcome="joined"', 1)
        family.permit(100)
        answers = [await first, await second]
        answers.append(await server.client.post(f"{MODEL}/infer", json=infer_body(), headers=headers))
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert len({answer.content for answer in answers}) == 1
        assert len(family.began) == 1
        other = await server.client.post(f"{MODEL}/infer", json=infer_body("a dog"), headers=headers)
        assert other.status_code == 409 and "new key" in other.json()["error"]
        stream = server.stream(infer_body(), f"{MODEL}/infer_stream", Idempotency_Key="order 1")
        assert (await stream.start())[0] == 409, "another path is another request"
        headers["Inference-Header-Content-Length"] = str(len(answers[0].request.content))
        other = await server.client.post(f"{MODEL}/infer", json=infer_body(), headers=headers)
        assert other.status_code == 409, "another length of the JSON is another request"
        await server.assert_empty()


async def test_a_server_that_keeps_no_answers_paints_anew_what_comes_after_the_end() -> None:
    async with running(family := Instant(), idempotency_seconds=0) as server:
        for _ in range(2):
            answer = await server.client.post(f"{MODEL}/infer", json=infer_body(), headers={"Idempotency-Key": "k"})
            assert answer.status_code == 200
        assert len(family.began) == 2


async def test_a_stream_that_comes_again_after_its_end_is_told_the_answer_at_once() -> None:
    async with running(Instant()) as server:
        ends = []
        for _ in range(2):
            stream = server.stream({"prompt": "p"}, Idempotency_Key="k")
            await stream.start()
            ends.append(await stream.events())
        assert [name for name, _ in ends[1]] == ["done"]
        assert ends[0][-1] == ends[1][-1]


@pytest.mark.parametrize("key", ["", " ", "a" * 256, "ü"])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    async with running(Instant()) as server:
        headers = [(b"idempotency-key", key.encode("latin-1"))]
        answer = await server.client.post(f"{MODEL}/infer", json=infer_body(), headers=headers)
        assert answer.status_code == 400 and "Idempotency-Key" in answer.json()["error"]


async def test_the_first_callers_hanging_up_leaves_the_second_its_picture() -> None:
    family = Gated()
    async with running(family) as server:
        first = server.stream({"prompt": "p"}, Idempotency_Key="k", X_Request_Id="first")
        await first.start()
        await asyncio.to_thread(family.waiting.wait, WAIT)
        second = server.stream({"prompt": "p"}, Idempotency_Key="k", X_Request_Id="second")
        await second.start()
        await first.hang_up()
        states = [(await server.client.get(f"/v2/requests/{each}")).json()["state"] for each in ("first", "second")]
        assert states == ["cancelled", "running"]
        (ticket,) = (each for each in gc.get_objects() if type(each) is Ticket and "second" in each.request_ids)
        assert len(ticket.listeners) == 1
        family.permit(100)
        assert (await second.events())[-1][0] == "done"
        assert await server.metric("sdxl_cancelled_total") == 0
        await server.assert_empty()
