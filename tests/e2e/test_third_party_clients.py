"""Clients that people bring along, unmodified, against one running server.

The strongest thing to say of two clients is that the same seed gives the same bytes of PNG through both, so every
picture here is compared with the one that plain JSON gives.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.errors import InferenceError
from kserve.protocol.infer_type import RequestedOutput
from open_inference import openapi
from open_inference.openapi.client import AsyncOpenInferenceClient, OpenInferenceClient
from open_inference.openapi.core.api_error import ApiError
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import Server

PROMPT = "a red circle on a white background"
SEED = 7
WIDTH, HEIGHT = 96, 64
PARAMETERS: dict[str, Any] = {"seed": SEED, "num_inference_steps": 2, "width": WIDTH, "height": HEIGHT}
INFER = "/v2/models/sdxl/infer"
TIMEOUT = 300.0
JSON_LENGTH = "Inference-Header-Content-Length"


def body(**fields: Any) -> dict[str, Any]:
    prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
    return {"inputs": [prompt], "parameters": PARAMETERS, **fields}


def size_of(png: bytes) -> tuple[int, int]:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    image.load()
    return image.size


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture(scope="module")
def picture(http: httpx.Client) -> bytes:
    """The PNG that plain JSON gives for `PROMPT` and `PARAMETERS`."""
    answer = http.post(INFER, json=body())
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert outputs["seed"]["data"] == [SEED]
    png = base64.b64decode(outputs["image"]["data"][0], validate=True)
    assert size_of(png) == (WIDTH, HEIGHT)
    return png


# --- httpx and what curl sends ---------------------------------------------------------------------------------


class TestHttpx:
    def test_the_same_seed_gives_the_same_bytes_again(self, http: httpx.Client, picture: bytes) -> None:
        answer = http.post(INFER, json=body())
        assert answer.headers["content-type"] == "application/json"
        assert base64.b64decode(answer.json()["outputs"][0]["data"][0]) == picture

    def test_another_seed_gives_another_picture(self, http: httpx.Client, picture: bytes) -> None:
        answer = http.post(INFER, json=body(parameters={**PARAMETERS, "seed": SEED + 1}))
        assert base64.b64decode(answer.json()["outputs"][0]["data"][0]) != picture

    @pytest.mark.parametrize(
        "content_type",
        ["application/json", "application/x-www-form-urlencoded", "application/octet-stream", "text/plain", None],
    )
    def test_the_content_type_does_not_matter(
        self, http: httpx.Client, picture: bytes, content_type: str | None
    ) -> None:
        headers = {"Content-Type": content_type} if content_type else {}
        answer = http.post(INFER, content=json.dumps(body()), headers=headers)
        assert base64.b64decode(answer.json()["outputs"][0]["data"][0]) == picture

    def test_binary_tensors_go_in_and_come_out(self, http: httpx.Client, picture: bytes) -> None:
        prompt = PROMPT.encode()
        tensor_data = struct.pack("<I", len(prompt)) + prompt + struct.pack("<q", SEED) + struct.pack("<f", 5.0)
        inputs = [
            {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(prompt) + 4}},
            {"name": "seed", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
            {"name": "guidance_scale", "shape": [1], "datatype": "FP32", "parameters": {"binary_data_size": 4}},
        ]
        outputs = [
            {"name": "seed", "parameters": {"binary_data": False}},
            {"name": "pixels", "parameters": {"binary_data": True}},
            {"name": "image", "parameters": {"binary_data": True}},
        ]
        parameters = {name: value for name, value in PARAMETERS.items() if name != "seed"}
        head = json.dumps({"id": "one", "inputs": inputs, "outputs": outputs, "parameters": parameters}).encode()
        answer = http.post(INFER, content=head + tensor_data, headers={JSON_LENGTH: str(len(head))})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/octet-stream"

        length = int(answer.headers[JSON_LENGTH])
        message, tail = json.loads(answer.content[:length]), answer.content[length:]
        assert message["id"] == "one"
        seed, pixels, image = message["outputs"]
        assert (seed["name"], seed["data"]) == ("seed", [SEED])
        assert (pixels["name"], pixels["shape"], pixels["datatype"]) == ("pixels", [1, HEIGHT, WIDTH, 3], "UINT8")
        assert pixels["parameters"]["binary_data_size"] == HEIGHT * WIDTH * 3
        assert (image["name"], image["shape"], image["datatype"]) == ("image", [1], "BYTES")
        raw_pixels, raw_image = tail[: HEIGHT * WIDTH * 3], tail[HEIGHT * WIDTH * 3 :]
        assert image["parameters"]["binary_data_size"] == len(raw_image)
        assert struct.unpack("<I", raw_image[:4]) == (len(raw_image) - 4,)
        assert raw_image[4:] == picture
        assert Image.open(io.BytesIO(picture)).convert("RGB").tobytes() == raw_pixels

    def test_a_body_that_is_nothing_but_the_prompt_gets_its_picture(self, http: httpx.Client) -> None:
        """``curl --data-binary 'a red circle' -H 'Inference-Header-Content-Length: 0'``."""
        answer = http.post(INFER, content=PROMPT.encode(), headers={JSON_LENGTH: "0"})
        assert answer.status_code == 200, answer.text
        length = int(answer.headers[JSON_LENGTH])
        message, tail = json.loads(answer.content[:length]), answer.content[length:]
        image, seed = message["outputs"]
        png = tail[4 : image["parameters"]["binary_data_size"]]
        (number,) = struct.unpack("<q", tail[image["parameters"]["binary_data_size"] :])
        parameters = message["parameters"]
        assert size_of(png) == (parameters["width"], parameters["height"])
        assert seed["name"] == "seed"

        again = http.post(INFER, json=body(parameters={"seed": number}))
        assert base64.b64decode(again.json()["outputs"][0]["data"][0]) == png

    def test_an_output_asked_for_in_no_special_way_comes_as_json(self, http: httpx.Client, picture: bytes) -> None:
        answer = http.post(INFER, json=body(outputs=[{"name": "image"}]))
        (image,) = answer.json()["outputs"]
        assert base64.b64decode(image["data"][0]) == picture


# --- tritonclient ----------------------------------------------------------------------------------------------


def triton_inputs(binary: bool) -> list[triton.InferInput]:
    """The prompt and the seed as tensors, the rest goes as parameters."""
    prompt = triton.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([PROMPT], dtype=np.object_), binary_data=binary)
    seed = triton.InferInput("seed", [1], "INT64")
    seed.set_data_from_numpy(np.array([SEED], dtype=np.int64), binary_data=binary)
    return [prompt, seed]


TRITON_PARAMETERS = {name: value for name, value in PARAMETERS.items() if name != "seed"}


def triton_picture(result: triton.InferResult) -> bytes:
    """The PNG in `result`, raw or as base64, as the output came."""
    image = result.as_numpy("image")
    assert image.shape == (1,)
    return image[0] if isinstance(image[0], bytes) else base64.b64decode(image[0], validate=True)


class TestTritonclient:
    @pytest.fixture
    def client(self, server: Server) -> Iterator[triton.InferenceServerClient]:
        with triton.InferenceServerClient(server.host, connection_timeout=TIMEOUT, network_timeout=TIMEOUT) as client:
            yield client

    @pytest.mark.parametrize("binary_output", [True, False], ids=["binary_output", "json_output"])
    @pytest.mark.parametrize("binary_input", [True, False], ids=["binary_input", "json_input"])
    def test_gets_the_picture(
        self, client: triton.InferenceServerClient, picture: bytes, binary_input: bool, binary_output: bool
    ) -> None:
        outputs = [triton.InferRequestedOutput(name, binary_data=binary_output) for name in ("image", "seed")]
        result = client.infer("sdxl", triton_inputs(binary_input), outputs=outputs, parameters=TRITON_PARAMETERS)
        assert triton_picture(result) == picture
        assert size_of(triton_picture(result)) == (WIDTH, HEIGHT)
        assert result.as_numpy("seed").tolist() == [SEED]

    def test_gets_raw_bytes_when_it_names_no_outputs(
        self, client: triton.InferenceServerClient, picture: bytes
    ) -> None:
        result = client.infer("sdxl", triton_inputs(binary=True), parameters=TRITON_PARAMETERS)
        assert result.as_numpy("image")[0] == picture
        assert "binary_data_size" in result.get_output("image")["parameters"]

    @pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_may_compress_its_request_and_ask_for_a_compressed_answer(
        self, client: triton.InferenceServerClient, picture: bytes, algorithm: str, binary: bool
    ) -> None:
        result = client.infer(
            "sdxl",
            triton_inputs(binary),
            outputs=[triton.InferRequestedOutput("image", binary_data=binary)],
            parameters=TRITON_PARAMETERS,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert triton_picture(result) == picture

    def test_gets_the_pixels_as_an_array(self, client: triton.InferenceServerClient, picture: bytes) -> None:
        outputs = [triton.InferRequestedOutput("pixels")]
        result = client.infer("sdxl", triton_inputs(binary=True), outputs=outputs, parameters=TRITON_PARAMETERS)
        pixels = result.as_numpy("pixels")
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[None])

    def test_gets_one_picture_for_each_prompt_in_their_order(
        self, client: triton.InferenceServerClient, picture: bytes
    ) -> None:
        prompt = triton.InferInput("prompt", [2], "BYTES")
        prompt.set_data_from_numpy(np.array([PROMPT, "a blue square"], dtype=np.object_))
        seed = triton.InferInput("seed", [2], "INT64")
        seed.set_data_from_numpy(np.array([SEED, 3], dtype=np.int64))
        result = client.infer("sdxl", [prompt, seed], parameters=TRITON_PARAMETERS)
        first, second = result.as_numpy("image")
        assert result.as_numpy("seed").tolist() == [SEED, 3]
        assert size_of(first) == size_of(second) == (WIDTH, HEIGHT)
        # In company a picture may differ from the one painted alone by what the eye cannot see.
        images = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in (first, picture)]
        assert np.abs(images[0] - images[1]).max() <= 2
        assert first != second

    def test_its_asynchronous_call_gets_the_picture(self, client: triton.InferenceServerClient, picture: bytes) -> None:
        waiting = client.async_infer("sdxl", triton_inputs(binary=True), parameters=TRITON_PARAMETERS)
        assert triton_picture(waiting.get_result(timeout=TIMEOUT)) == picture

    def test_its_id_version_and_timeout_are_understood(
        self, client: triton.InferenceServerClient, picture: bytes
    ) -> None:
        result = client.infer(
            "sdxl",
            triton_inputs(binary=True),
            model_version="1",
            request_id="mine",
            timeout=int(TIMEOUT * 1e6),
            parameters=TRITON_PARAMETERS,
        )
        response = result.get_response()
        assert (response["id"], response["model_name"], response["model_version"]) == ("mine", "sdxl", "1")
        assert triton_picture(result) == picture

    def test_its_health_calls_say_yes(self, client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("sdxl")
        assert client.is_model_ready("sdxl", "1")
        assert not client.is_model_ready("other")
        assert not client.is_model_ready("sdxl", "2")

    def test_its_metadata_calls_name_every_tensor(self, client: triton.InferenceServerClient) -> None:
        server_metadata = client.get_server_metadata()
        assert server_metadata["name"]
        assert "binary_tensor_data" in server_metadata["extensions"]
        metadata = client.get_model_metadata("sdxl")
        assert metadata["name"] == "sdxl"
        assert metadata == client.get_model_metadata("sdxl", "1")
        inputs = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]}
        assert inputs["prompt"] == ("BYTES", [-1])
        assert inputs["seed"] == ("INT64", [-1])
        outputs = {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["outputs"]}
        assert outputs["image"] == ("BYTES", [-1])

    def test_its_exception_carries_our_sentence(self, client: triton.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="did you mean 'guidance_scale'") as caught:
            client.infer("sdxl", triton_inputs(binary=True), parameters={"guidance": 5})
        assert caught.value.status() == "400"

    @pytest.mark.parametrize("call", ["get_model_config", "get_model_repository_index", "get_inference_statistics"])
    def test_a_call_of_tritons_own_that_is_not_served_is_told_so(
        self, client: triton.InferenceServerClient, call: str
    ) -> None:
        arguments = [] if call == "get_model_repository_index" else ["sdxl"]
        with pytest.raises(InferenceServerException, match="There is nothing at /v2/") as caught:
            getattr(client, call)(*arguments)
        assert caught.value.status() == "404"


class TestTritonclientAio:
    @pytest.fixture
    async def client(self, server: Server) -> AsyncIterator[triton_aio.InferenceServerClient]:
        async with triton_aio.InferenceServerClient(server.host, conn_timeout=TIMEOUT) as client:
            yield client

    @pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
    @pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
    async def test_gets_the_picture(
        self, client: triton_aio.InferenceServerClient, picture: bytes, binary: bool, algorithm: str | None
    ) -> None:
        result = await client.infer(
            "sdxl",
            triton_inputs(binary),
            outputs=[triton_aio.InferRequestedOutput("image", binary_data=binary)],
            parameters=TRITON_PARAMETERS,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert triton_picture(result) == picture

    async def test_gets_raw_bytes_when_it_names_no_outputs(
        self, client: triton_aio.InferenceServerClient, picture: bytes
    ) -> None:
        result = await client.infer("sdxl", triton_inputs(binary=True), parameters=TRITON_PARAMETERS)
        assert result.as_numpy("image")[0] == picture

    async def test_its_health_and_metadata_calls_work(self, client: triton_aio.InferenceServerClient) -> None:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("sdxl")
        assert not await client.is_model_ready("other")
        assert "binary_tensor_data" in (await client.get_server_metadata())["extensions"]
        assert (await client.get_model_metadata("sdxl"))["name"] == "sdxl"

    async def test_its_exception_carries_our_sentence(self, client: triton_aio.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="There is no model 'other'") as caught:
            await client.infer("other", triton_inputs(binary=True))
        assert caught.value.status() == "404"


# --- kserve ----------------------------------------------------------------------------------------------------


def kserve_request(binary: bool, outputs: list[RequestedOutput] | None = None) -> InferRequest:
    prompt = InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([PROMPT], dtype=np.object_), binary_data=binary)
    seed = InferInput("seed", [1], "INT64")
    seed.set_data_from_numpy(np.array([SEED], dtype=np.int64), binary_data=binary)
    parameters = dict(TRITON_PARAMETERS)
    return InferRequest("sdxl", [prompt, seed], "mine", parameters=parameters, request_outputs=outputs)


class TestKserve:
    @pytest.fixture
    async def client(self) -> AsyncIterator[InferenceRESTClient]:
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=TIMEOUT))
        yield client
        await client.close()

    @pytest.mark.parametrize("binary", [True, False], ids=["binary_input", "json_input"])
    async def test_gets_the_picture(
        self, client: InferenceRESTClient, server: Server, picture: bytes, binary: bool
    ) -> None:
        response = await client.infer(server.url, kserve_request(binary), model_name="sdxl")
        assert (response.model_name, response.id) == ("sdxl", "mine")
        image, seed = response.outputs
        assert base64.b64decode(image.as_numpy()[0], validate=True) == picture
        assert seed.as_numpy().tolist() == [SEED]

    async def test_a_plain_dictionary_gets_the_picture(
        self, client: InferenceRESTClient, server: Server, picture: bytes
    ) -> None:
        response = await client.infer(server.url, body(), model_name="sdxl")
        assert base64.b64decode(response.outputs[0].data[0]) == picture

    async def test_gets_the_pixels_as_raw_bytes(
        self, client: InferenceRESTClient, server: Server, picture: bytes
    ) -> None:
        outputs = [RequestedOutput("pixels", {"binary_data": True})]
        response = await client.infer(server.url, kserve_request(True, outputs), model_name="sdxl")
        expected = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[None]
        assert np.array_equal(response.outputs[0].as_numpy(), expected)

    async def test_reads_no_raw_png_by_its_own_limit_so_base64_is_what_it_gets_unasked(
        self, client: InferenceRESTClient, server: Server
    ) -> None:
        """It reads every string as UTF-8, which a PNG never is. Should this begin to pass, raw PNG works with it."""
        outputs = [RequestedOutput("image", {"binary_data": True})]
        with pytest.raises(InferenceError, match="UTF-8"):
            await client.infer(server.url, kserve_request(True, outputs), model_name="sdxl")

    async def test_its_health_calls_say_yes(self, client: InferenceRESTClient, server: Server) -> None:
        assert await client.is_server_live(server.url) is True
        assert await client.is_server_ready(server.url) is True
        assert await client.is_model_ready(server.url, "sdxl") is True
        assert await client.is_model_ready(server.url, "other") is False

    async def test_its_exception_carries_our_sentence(self, client: InferenceRESTClient, server: Server) -> None:
        with pytest.raises(httpx.HTTPStatusError, match=r"There is no parameter 'colour'\., '400 Bad Request'"):
            await client.infer(server.url, body(parameters={"colour": 5}), model_name="sdxl")


# --- open-inference-openapi ------------------------------------------------------------------------------------


def open_inference_request(**parameters: Any) -> openapi.InferenceRequest:
    data = openapi.TensorData.parse_obj([PROMPT])
    return openapi.InferenceRequest(
        id="mine",
        inputs=[openapi.RequestInput(name="prompt", shape=[1], datatype="BYTES", data=data)],
        parameters={**PARAMETERS, **parameters},
    )


def open_inference_picture(response: openapi.InferenceResponse) -> bytes:
    assert (response.model_name, response.id) == ("sdxl", "mine")
    (image,) = [output for output in response.outputs if output.name == "image"]
    return base64.b64decode(image.data.__root__[0], validate=True)


class TestOpenInferenceOpenapi:
    @pytest.fixture
    def client(self, server: Server) -> Iterator[OpenInferenceClient]:
        with httpx.Client(timeout=TIMEOUT) as connection:
            yield OpenInferenceClient(base_url=server.url, httpx_client=connection)

    def test_gets_the_picture(self, client: OpenInferenceClient, picture: bytes) -> None:
        response = client.model_infer("sdxl", request=open_inference_request())
        assert open_inference_picture(response) == picture
        response = client.model_version_infer("sdxl", "1", request=open_inference_request())
        assert open_inference_picture(response) == picture
        assert response.model_version == "1"

    def test_gets_the_picture_although_it_writes_whole_numbers_with_a_decimal_point(
        self, client: OpenInferenceClient, picture: bytes
    ) -> None:
        """It makes 7 into 7.0 in every tensor, and to JSON both are the same number."""
        request = open_inference_request()
        tensors = [
            openapi.RequestInput(name=name, shape=[1], datatype="INT64", data=openapi.TensorData.parse_obj([value]))
            for name, value in PARAMETERS.items()
        ]
        request = openapi.InferenceRequest(id="mine", inputs=[*request.inputs, *tensors])
        assert b"7.0" in json.dumps(json.loads(request.json())).encode()
        assert open_inference_picture(client.model_infer("sdxl", request=request)) == picture

    def test_its_health_calls_say_yes(self, client: OpenInferenceClient) -> None:
        client.check_server_liveness()
        client.check_server_readiness()
        client.check_model_readiness("sdxl")
        client.check_model_version_readiness("sdxl", "1")
        with pytest.raises(openapi.NotFoundError):
            client.check_model_readiness("other")

    def test_its_metadata_calls_name_every_tensor(self, client: OpenInferenceClient) -> None:
        assert "binary_tensor_data" in client.read_server_metadata().extensions
        metadata = client.read_model_metadata("sdxl")
        assert metadata == client.read_model_version_metadata("sdxl", "1")
        assert "prompt" in [tensor.name for tensor in metadata.inputs]
        assert "image" in [tensor.name for tensor in metadata.outputs]

    def test_its_exceptions_carry_our_sentence(self, client: OpenInferenceClient) -> None:
        with pytest.raises(openapi.BadRequestError) as caught:
            client.model_infer("sdxl", request=open_inference_request(width=97))
        assert "97" in caught.value.body["error"]
        with pytest.raises(ApiError) as missing:
            client.model_infer("other", request=open_inference_request())
        assert missing.value.status_code == 404
        assert missing.value.body["error"].startswith("There is no model 'other'")

    async def test_its_asynchronous_client_gets_the_picture(self, server: Server, picture: bytes) -> None:
        async with httpx.AsyncClient(timeout=TIMEOUT) as connection:
            client = AsyncOpenInferenceClient(base_url=server.url, httpx_client=connection)
            await client.check_server_readiness()
            response = await client.model_infer("sdxl", request=open_inference_request())
        assert open_inference_picture(response) == picture
