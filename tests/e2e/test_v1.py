"""Protocol v1 over a real socket: as its clients send it, as KServe's own client sends it, and as nobody should.

One server for all; after the bad input it still paints, holds no request, and has no traceback in its log.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from kserve import InferenceRESTClient, RESTConfig
from PIL import Image, ImageChops

from tests.e2e.conftest import Server

PREDICT = "/v1/models/sdxl:predict"
PROMPT = "a red circle on a white background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
LIMIT = 33_554_432
TIMEOUT = 300.0


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as connection:
        yield connection


def instances(*more: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    """One good instance, unless `keywords` make it a bad one, and `more`."""
    return {"instances": [{"prompt": PROMPT, **SMALL, **keywords}, *more]}


def pictures(answer: httpx.Response) -> list[Image.Image]:
    assert answer.status_code == 200, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert list(content) == ["predictions"]
    found: list[Image.Image] = []
    for prediction in content["predictions"]:
        assert list(prediction) == ["model_name", "prompt", "image"] and list(prediction["image"]) == ["format", "b64"]
        picture = Image.open(io.BytesIO(base64.b64decode(prediction["image"]["b64"], validate=True)))
        assert picture.format == prediction["image"]["format"] and prediction["model_name"] == "sdxl"
        found.append(picture)
    return found


def seeds(answer: httpx.Response) -> list[int]:
    return [int(seed) for seed in answer.headers["X-Seed"].split(", ")]


# --- As its clients send it ------------------------------------------------------------------------------------


class TestClients:
    def test_an_instance_with_the_pipelines_keywords_gets_one_prediction(self, client: httpx.Client) -> None:
        """`denoising_limit` has no effect without a refiner, and is not refused."""
        sent = {
            "prompt": PROMPT,
            "guidance_scale": 8.0,
            "num_inference_steps": 4,
            "crops_coords_top_left": [256, 0],
            "width": 96,
            "height": 64,
            "denoising_limit": 0.8,
        }
        answer = client.post(PREDICT, json={"instances": [sent]})
        (picture,) = pictures(answer)
        assert picture.size == (96, 64)
        assert answer.json()["predictions"][0]["prompt"] == PROMPT
        assert picture.info["seed"] == answer.headers["X-Seed"]
        again = client.post(PREDICT, json={"instances": [{**sent, "seed": seeds(answer)[0]}]})
        assert again.json() == answer.json()

    def test_the_picture_is_that_of_protocol_v2(self, client: httpx.Client) -> None:
        prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
        pair = {"name": "crops_coords_top_left", "shape": [2], "datatype": "INT64", "data": [16, 0]}
        other = client.post("/v2/models/sdxl/infer", json={"inputs": [prompt, pair], "parameters": SMALL})
        answer = client.post(PREDICT, json=instances(crops_coords_top_left=[16, 0]))
        expected = Image.open(io.BytesIO(base64.b64decode(other.json()["outputs"][0]["data"][0])))
        assert pictures(answer)[0].tobytes() == expected.tobytes()

    def test_every_instance_is_answered_in_order_with_its_pictures_and_seeds(self, client: httpx.Client) -> None:
        second = {"prompt": "a blue star", **SMALL, "width": 72, "seed": 40, "output_format": "webp"}
        answer = client.post(PREDICT, json=instances(second, num_images_per_prompt=2))
        assert [picture.size for picture in pictures(answer)] == [(64, 64), (64, 64), (72, 64)]
        assert [picture.format for picture in pictures(answer)] == ["PNG", "PNG", "WEBP"]
        assert [each["prompt"] for each in answer.json()["predictions"]] == [PROMPT, PROMPT, "a blue star"]
        assert seeds(answer) == [7, 8, 40]
        alone = client.post(PREDICT, json=instances(seed=8))
        # In company a picture may differ by 2 of 255.
        differences = ImageChops.difference(pictures(alone)[0], pictures(answer)[1])
        assert np.asarray(differences).max() <= 2

    def test_instances_without_a_seed_get_different_ones(self, client: httpx.Client) -> None:
        answer = client.post(PREDICT, json=instances({"prompt": "b", **SMALL, "seed": None}, seed=None))
        first, second = seeds(answer)
        assert first != second

    def test_null_and_the_names_of_the_pipeline_change_nothing(self, client: httpx.Client) -> None:
        plain = client.post(PREDICT, json=instances())
        wordy = instances(negative_prompt=None, generator=None, latents=None, output_type="pil", return_dict=True)
        assert client.post(PREDICT, json=wordy).json() == plain.json()

    def test_any_content_type_and_a_packed_body_do(self, client: httpx.Client) -> None:
        raw = json.dumps(instances()).encode()
        for content_type in ("application/json", "application/x-www-form-urlencoded", "text/plain", ""):
            assert len(pictures(client.post(PREDICT, content=raw, headers={"Content-Type": content_type}))) == 1
        packed = client.post(PREDICT, content=gzip.compress(raw), headers={"Content-Encoding": "gzip"})
        assert len(pictures(packed)) == 1

    def test_what_has_no_effect_is_told_in_the_log_once(self, server: Server, client: httpx.Client) -> None:
        for _ in range(3):
            pictures(client.post(PREDICT, json=instances(denoising_limit=0.8)))
        told = [line for line in server.log().splitlines() if "denoising_limit has no effect" in line]
        assert len(told) == 1
        assert PROMPT not in server.log()

    def test_the_log_has_its_line_for_each_request(self, server: Server, client: httpx.Client) -> None:
        pictures(client.post(PREDICT, json=instances(), headers={"X-Request-Id": "v1-line"}))
        (line,) = [line for line in server.log().splitlines() if "[v1-line] predict" in line]
        assert "model=sdxl status=200 images=1 queue_s=" in line


def test_the_same_requests_are_served_with_a_refiner(start_server: Callable[..., Server]) -> None:
    refined = start_server("--use_refiner")
    sent = {
        "prompt": PROMPT,
        "guidance_scale": 8.0,
        "num_inference_steps": 10,
        "crops_coords_top_left": [256, 0],
        "width": 96,
        "height": 64,
    }
    with httpx.Client(base_url=refined.url, timeout=TIMEOUT) as client:
        drawn = client.post(PREDICT, json={"instances": [{**sent, "denoising_limit": 0.8}]})
        seed = seeds(drawn)[0]
        alone = client.post(PREDICT, json={"instances": [{**sent, "denoising_limit": 1.0, "seed": seed}]})
    (together,), (base,) = pictures(drawn), pictures(alone)
    assert together.size == base.size == (96, 64)
    assert together.tobytes() != base.tobytes()
    assert "has no effect" not in refined.log()


class TestPaths:
    def test_the_models_are_listed_and_ready(self, client: httpx.Client) -> None:
        for slash in ("", "/"):
            assert client.get(f"/v1/models{slash}").json() == {"models": ["sdxl"]}
            assert client.get(f"/v1/models/sdxl{slash}").json() == {"name": "sdxl", "ready": True}
        assert client.get("/").json() == {"status": "alive"}
        assert len(pictures(client.post(f"{PREDICT}/", json=instances()))) == 1
        assert len(pictures(client.post("/v1/models/sdxl%3Apredict", json=instances()))) == 1

    @pytest.mark.parametrize(
        ("method", "path", "status", "says"),
        [
            ("POST", "/v1/models/sdxl:explain", 404, "The model sdxl has no verb 'explain'; it has predict."),
            ("POST", "/v1/models/sdxl:PREDICT", 404, "The model sdxl has no verb 'PREDICT'; it has predict."),
            ("POST", "/v1/models/other:predict", 404, "There is no model 'other'; there is sdxl."),
            ("POST", "/v1/models/other:explain", 404, "There is no model 'other'; there is sdxl."),
            ("POST", "/v1/models/..%2F..%2Fetc:predict", 404, "There is nothing at"),
            ("POST", "/v1/models/%00:predict", 404, "There is no model"),
            ("POST", f"/v1/models/{'x' * 300}:predict", 404, "There is no model 'xxx"),
            ("GET", "/v1/models/other", 404, "There is no model 'other'; there is sdxl."),
            ("GET", "/v1/models/other:predict", 404, "There is no model 'other'; there is sdxl."),
            ("GET", "/v1", 404, "There is nothing at /v1"),
            ("GET", "/v1/models/sdxl/infer", 404, "There is nothing at"),
            ("GET", PREDICT, 405, "GET is not allowed at /v1/models/sdxl:predict."),
            ("PUT", PREDICT, 405, "PUT is not allowed at /v1/models/sdxl:predict."),
            ("POST", "/v1/models/sdxl", 405, "POST is not allowed at /v1/models/sdxl."),
            ("POST", "/v1/models", 405, "POST is not allowed at /v1/models."),
            ("DELETE", "/", 405, "DELETE is not allowed at /."),
        ],
    )
    def test_anything_else_is_one_sentence(
        self, client: httpx.Client, method: str, path: str, status: int, says: str
    ) -> None:
        answer = client.request(method, path, json=instances() if method == "POST" else None)
        refused(answer, status, says)
        if status == 405:
            assert answer.headers["allow"] == ("POST" if path == PREDICT else "GET, HEAD")


class TestKserve:
    @pytest.fixture
    async def kserve(self) -> AsyncIterator[InferenceRESTClient]:
        client = InferenceRESTClient(RESTConfig(protocol="v1", timeout=TIMEOUT))
        yield client
        await client.close()

    async def test_gets_the_picture(self, kserve: InferenceRESTClient, server: Server, client: httpx.Client) -> None:
        response = await kserve.infer(server.url, instances(), model_name="sdxl")
        assert response == (await asyncio.to_thread(client.post, PREDICT, json=instances())).json()

    async def test_its_health_calls_say_yes(self, kserve: InferenceRESTClient, server: Server) -> None:
        assert await kserve.is_server_live(server.url) is True
        assert await kserve.is_model_ready(server.url, "sdxl") is True

    async def test_its_exception_carries_our_sentence(self, kserve: InferenceRESTClient, server: Server) -> None:
        with pytest.raises(httpx.HTTPStatusError, match=r"There is no parameter 'colour'\., '400 Bad Request'"):
            await kserve.infer(server.url, instances(colour=5), model_name="sdxl")
        with pytest.raises(httpx.HTTPStatusError, match="404 Not Found"):
            await kserve.is_model_ready(server.url, "other")
        with pytest.raises(httpx.HTTPStatusError, match="has no verb 'explain'"):
            await kserve.explain(server.url, "sdxl", instances())


# --- As nobody should ------------------------------------------------------------------------------------------


@pytest.fixture
def _nobody_else_notices(server: Server, client: httpx.Client) -> Iterator[None]:
    before = len(server.log())
    expected = client.post(PREDICT, json=instances()).json()
    yield
    assert client.post(PREDICT, json=instances()).json() == expected
    deadline = time.monotonic() + TIMEOUT
    while server.metric("sdxl_pending_images") + server.metric("sdxl_running_images"):
        assert time.monotonic() < deadline, "a request is still held"
        time.sleep(0.05)
    assert "Traceback" not in server.log()[before:], server.log()[before:]


def refused(answer: httpx.Response, status: int, says: str) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert list(content) == ["error"]
    sentence = content["error"]
    assert says in sentence
    assert re.search(r"(\.\.\.|[^.])[.?]$", sentence) and sentence.isprintable() and len(sentence) < 500, sentence
    for insider in ("Traceback", "pydantic", "Errno", "0x"):
        assert insider not in sentence


def body(text: str) -> bytes:
    """A request whose only instance is `text` as it stands."""
    return b'{"instances": [' + text.encode() + b"]}"


def png(width: int, height: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.usefixtures("_nobody_else_notices")
class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            pytest.param(b"", "The body is not JSON", id="nothing"),
            pytest.param(b"a red circle", "The body is not JSON", id="text"),
            pytest.param(b'{"instances": [{"prompt": "a"}', "The body is not JSON", id="half"),
            pytest.param(b"[]", "must be a JSON object with a list of instances", id="list"),
            pytest.param(b"null", "must be a JSON object with a list of instances", id="null"),
            pytest.param(b"{}", "instances is missing.", id="empty"),
            pytest.param(b'{"inputs": [{"name": "prompt", "shape": [1]}]}', "no parameter 'name'", id="a-v2-request"),
            pytest.param(b'{"instances": [{"prompt": "\xff"}]}', "not UTF-8 (byte 27)", id="latin-1"),
            pytest.param(body('{"prompt": "a", "guidance_scale": NaN}'), "NaN is not JSON", id="NaN"),
            pytest.param(body('{"prompt": "a", "guidance_scale": 1e999}'), "must be a finite number", id="1e999"),
            pytest.param(body('{"prompt": "a", "seed": ' + "1" * 5000 + "}"), "too many digits", id="5000-digits"),
            pytest.param(body('{"prompt": "a", "seed": ' + "1" * 50 + "}"), "more than 30 digits", id="50-digits"),
            pytest.param(body('{"prompt": "\\ud800"}'), "half of a surrogate pair", id="surrogate"),
            pytest.param(body('{"prompt": "a\\u0000b"}'), "holds a NUL character", id="NUL"),
            pytest.param(body('{"prompt": "a", "prompt": "b"}'), "'prompt' stands twice", id="twice"),
            pytest.param(body("[" * 100_000 + "]" * 100_000), "nested too deeply", id="deep"),
            pytest.param(body('{"prompt": ' + "[" * 200 + "]" * 200 + "}"), "prompt must be text", id="deep-prompt"),
            pytest.param(
                body("{" + ", ".join(f'"{i}": 1' for i in range(300)) + "}"), "more than 256 names", id="names"
            ),
            pytest.param(
                b'{"instances": [' + b",".join([b'{"prompt":"a"}'] * 100_000) + b"]}",
                "at most 8192",
                id="100000-instances",
            ),
            pytest.param(
                b'{"instances": [' + b",".join([b'{"prompt":"a"}'] * 17) + b"]}", "at most 16 images", id="17-instances"
            ),
        ],
    )
    def test_what_cannot_be_read_is_told_so(self, client: httpx.Client, content: bytes, says: str) -> None:
        refused(client.post(PREDICT, content=content), 400, says)

    @pytest.mark.parametrize(
        ("keywords", "says"),
        [
            ({"prompt": "x" * 10_001}, "at most 10000 characters"),
            ({"num_inference_steps": 10**9}, "num_inference_steps must be at most 150"),
            ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0."),
            ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, not 2.5."),
            ({"width": 100_000, "height": 100_000}, "height must be at most 2048"),
            ({"width": 2048, "height": 2056}, "height must be at most 2048"),
            ({"width": 65}, "width must be a multiple of 8, not 65; the nearest fitting: 64 and 72."),
            ({"width": -64}, "width must be at least 8, not -64."),
            ({"num_images_per_prompt": 10**6}, "at most 16 images"),
            ({"guidance_scale": "8.0"}, "guidance_scale must be a finite number, not '8.0'."),
            ({"guidance_scale": -1}, "guidance_scale must be at least 0, not -1."),
            ({"denoising_limit": 1.5}, "denoising_limit must be at most 1, not 1.5."),
            ({"denoising_limit": 0}, "denoising_limit must be more than 0"),
            ({"denoising_limit": "0.8"}, "denoising_limit must be a finite number"),
            ({"crops_coords_top_left": [256]}, "crops_coords_top_left must be two whole numbers, not [256]."),
            ({"crops_coords_top_left": [256, None]}, "crops_coords_top_left must be a whole number, not null."),
            ({"crops_coords_top_left": "256,0"}, "crops_coords_top_left must be two whole numbers"),
            ({"scheduler": "Eulre"}, "Eulre"),
            ({"scheduler": 7}, "scheduler must be text, not 7."),
            ({"seed": 2**63}, "seed must be at most 9223372036854775807"),
            ({"output_format": "bmp"}, "output_format must be one of png, jpeg, webp"),
            ({"output_type": "latent"}, "output_type may only be 'pil'"),
            ({"return_dict": 3}, "return_dict may only be true or false"),
            ({"generator": {"seed": 7}}, "generator is an object of torch; send a number as seed."),
            ({"strength": 0.5}, "strength needs the input image."),
            ({"image": "http://169.254.169.254/latest"}, "addresses and file names are not read"),
            ({"image": "file:///etc/passwd"}, "addresses and file names are not read"),
            ({"image": base64.b64encode(b"GIF89a").decode()}, "image is no PNG, JPEG or WebP file"),
            ({"image": png(16, 16)[:60]}, "image"),
            (
                {"image": png(8192, 4096)},
                "image has 8192 x 4096 pixels; all images of a request may have 16777216 together",
            ),
            ({"image": [[0, 0, 0]]}, "image must be a picture's file as base64 text"),
            ({"num_steps": 5}, "There is no parameter 'num_steps' (did you mean 'num_inference_steps'?)."),
            ({"guidance": None}, "There is no parameter 'guidance' (did you mean 'guidance_scale'?)."),
            ({"x" * 100_000: 1}, "There is no parameter 'xxx"),
            ({"\u202e": 1}, "There is no parameter '\\u202e'"),
        ],
        ids=lambda value: ",".join(value)[:30] if isinstance(value, dict) else None,
    )
    def test_what_does_not_fit_is_told_with_its_name(
        self, client: httpx.Client, keywords: dict[str, Any], says: str
    ) -> None:
        refused(client.post(PREDICT, json=instances(**keywords)), 400, says)

    def test_one_bad_instance_refuses_them_all_and_is_named(self, server: Server, client: httpx.Client) -> None:
        steps = server.metric("sdxl_steps_total")
        good = {"prompt": "b", **SMALL}
        answer = client.post(PREDICT, json=instances(good, {**good, "width": "wide"}))
        refused(answer, 400, "instances[2]: width must be a whole number, not 'wide'.")
        assert server.metric("sdxl_steps_total") == steps

    def test_a_body_that_is_too_large_is_refused_declared_or_not(self, client: httpx.Client) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(LIMIT // 1_000_000 + 2):
                yield b" " * 1_000_000

        refused(client.post(PREDICT, content=b" " * (LIMIT + 1)), 413, "more than 33554432 bytes")
        refused(client.post(PREDICT, content=chunks()), 413, "more than 33554432 bytes")
        bomb = gzip.compress(b" " * (LIMIT + 1))
        refused(client.post(PREDICT, content=bomb, headers={"Content-Encoding": "gzip"}), 413, "more than 33554432")

    def test_an_unknown_packing_is_415(self, client: httpx.Client) -> None:
        refused(client.post(PREDICT, content=b"x", headers={"Content-Encoding": "br"}), 415, "use gzip or deflate")

    def test_refusals_are_counted_by_their_reason(self, server: Server, client: httpx.Client) -> None:
        before = server.metric("sdxl_rejected_total", reason="invalid_request")
        refused(client.post(PREDICT, json={}), 400, "instances is missing.")
        assert server.metric("sdxl_rejected_total", reason="invalid_request") == before + 1

    def test_a_client_that_hangs_up_is_cancelled(self, server: Server) -> None:
        before = server.metric("sdxl_cancelled_total")
        raw = json.dumps(instances(num_inference_steps=150, num_images_per_prompt=8)).encode()
        host, port = server.host.split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
            connection.sendall(head + raw)
            deadline = time.monotonic() + TIMEOUT
            while not server.metric("sdxl_running_images"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        while server.metric("sdxl_cancelled_total") == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
