"""The Python client and the command line against servers that refuse, hesitate, vanish or talk nonsense."""

from __future__ import annotations

import asyncio
import base64
import decimal
import enum
import fractions
import io
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from app.generation import PARAMETERS, ImageFormat, Pixels
from app.images import decode_images
from app.protocol.infer_request import parse_infer
from app.protocol.oip import InferCall
from clients import answers, conversations, paint
from clients.client import AsyncClient, Client, ClientError, Parameters, Picture, ServerError, UnreachableError
from clients.inputs import write_request

ROOT = Path(__file__).parents[2]
URL = "http://server:8080"
IMAGES = [b"first picture", b"second"]
SEEDS = [7, 2**63 - 1]
PNG = {"content_type": "image/png"}

Handler = Callable[[httpx.Request], httpx.Response]


def json_answer(_: httpx.Request | None = None, **fields: Any) -> httpx.Response:
    outputs = [
        {"name": "image", "shape": [2], "datatype": "BYTES", "data": [base64.b64encode(i).decode() for i in IMAGES]},
        {"name": "seed", "shape": [2], "datatype": "INT64", "data": SEEDS},
    ]
    return httpx.Response(200, json={"model_name": "sdxl", "parameters": PNG, "outputs": outputs, **fields})


def binary_body() -> tuple[bytes, int]:
    """The body of a good binary answer, and the length of its JSON."""
    images = b"".join(struct.pack("<I", len(image)) + image for image in IMAGES)
    seeds = struct.pack("<2q", *SEEDS)
    outputs = [
        {"name": "image", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(images)}},
        {"name": "seed", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": len(seeds)}},
    ]
    head = json.dumps({"model_name": "sdxl", "parameters": PNG, "outputs": outputs}).encode()
    return head + images + seeds, len(head)


def binary_answer(body: bytes, json_length: object) -> httpx.Response:
    return httpx.Response(200, content=body, headers={answers.JSON_LENGTH: str(json_length)})


def always(answer: httpx.Response) -> Handler:
    """A server with one answer; each caller gets a copy, as a stream can be read by one client only."""
    return lambda _: httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def in_turn(handlers: list[Handler]) -> Handler:
    """A server of which each request finds the next one of `handlers`."""

    def handle(request: httpx.Request) -> httpx.Response:
        return handlers.pop(0)(request)

    return handle


class Ask(Protocol):
    """Calls one method of a client whose server is `handler`."""

    def __call__(
        self, handler: Handler, method: str, *arguments: Any, options: dict[str, Any] | None = None, **keywords: Any
    ) -> Any: ...


def ask_blocking(
    handler: Handler, method: str, *arguments: Any, options: dict[str, Any] | None = None, **keywords: Any
) -> Any:
    with Client(URL, transport=httpx.MockTransport(handler), **(options or {})) as client:
        return getattr(client, method)(*arguments, **keywords)


def ask_asynchronously(
    handler: Handler, method: str, *arguments: Any, options: dict[str, Any] | None = None, **keywords: Any
) -> Any:
    async def run() -> Any:
        async with AsyncClient(URL, transport=httpx.MockTransport(handler), **(options or {})) as client:
            return await getattr(client, method)(*arguments, **keywords)

    return asyncio.run(run())


@pytest.fixture(params=[ask_blocking, ask_asynchronously], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    asker: Ask = request.param
    return asker


# --- Requests --------------------------------------------------------------------------------------------------


def test_every_parameter_of_the_server_is_a_keyword_of_the_client() -> None:
    assert {"prompt", *Parameters.__annotations__} == set(PARAMETERS)


def read(*arguments: Any, **keywords: Any) -> InferCall:
    """What the server makes of a request."""
    body, json_length = write_request(*arguments, **keywords)
    return parse_infer(body, None if json_length is None else str(json_length))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("height", np.int64(64), 64),
        ("guidance_scale", np.float32(2.5), 2.5),
        ("guidance_scale", decimal.Decimal("2.5"), 2.5),
        ("guidance_scale", fractions.Fraction(5, 2), 2.5),
        ("use_karras_sigmas", np.bool_(True), True),
        ("timesteps", range(900, 0, -300), (900, 600, 300)),
        ("sigmas", np.array([3.0, 1.0, 0.0]), (3.0, 1.0, 0.0)),
        ("original_size", np.array([64, 128]), (64, 128)),
        ("loras", {"style": np.float64(0.5)}, (("style", 0.5),)),
    ],
)
def test_numbers_may_be_of_any_kind(name: str, value: object, expected: object) -> None:
    (request,) = read("p", {name: value}).requests
    assert getattr(request, name) == expected


def test_a_text_of_ones_own_kind_is_a_text() -> None:
    class Colour(enum.StrEnum):
        RED = "red"

    for prompt in (np.str_("red"), Colour.RED):
        (request,) = read(prompt, {"scheduler": np.str_("Euler")}).requests
        assert (request.prompt, request.scheduler) == ("red", "Euler")


def test_an_id_or_a_key_that_cannot_be_sent_is_told_so(ask: Ask) -> None:
    with pytest.raises(ClientError, match="request_id must be text, not int"):
        ask(always(json_answer()), "generate", "a", request_id=5)
    with pytest.raises(ClientError, match="The API key has characters that no header can hold"):
        ask(always(json_answer()), "live", options={"api_key": "a\nb"})


def test_prompts_and_seeds_may_come_as_arrays() -> None:
    requests = read(np.array(["a", "b"]), {"seed": np.array([5, 9])}).requests
    assert [(request.prompt, request.seed) for request in requests] == [("a", 5), ("b", 9)]


@pytest.mark.parametrize(
    ("prompt", "parameters", "message"),
    [
        ([], {}, "prompt is an empty list"),
        (None, {}, "prompt must be a text, a number, True or False, or a list of them, not NoneType"),
        (b"a", {}, "prompt must be .*, not bytes"),
        ("p", {"sigmas": []}, "sigmas is an empty list"),
        ("p", {"seed": [1, None]}, "seed must be .*, not NoneType"),
        ("p", {"seed": {1, 2}}, "seed must be .*, not set"),
        ("p", {"original_size": [[1, 2], [3]]}, "original_size must have lists of one length"),
        ("p", {"original_size": [[1, 2], 3]}, "original_size must have lists of one length"),
    ],
)
def test_what_cannot_be_sent_is_said_in_a_sentence(prompt: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ClientError, match=message):
        write_request(prompt, parameters)


def test_the_request_can_be_asked_about_by_its_id(ask: Ask) -> None:
    seen: list[httpx.Headers] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers)
        return json_answer()

    ask(handler, "generate", "a", request_id="my-circle.1")
    assert seen[-1]["X-Request-Id"] == "my-circle.1"
    # Anything may be an id within the message; not all of it fits into a header.
    for identifier in (None, "", "two words", "☂", "x" * 129):
        ask(handler, "generate", "a", request_id=identifier)
        assert "X-Request-Id" not in seen[-1]


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_a_picture_of_pillows_is_sent_as_a_person_sees_it(orientation: int | None) -> None:
    """Cameras write the picture as it fell on the sensor, and beside it which way is up."""
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    opened = Image.open(buffer)
    (request,) = read("p", {"image": opened}).requests
    (pixels,) = decode_images([("image", request.image)], 100)  # type: ignore[list-item]
    seen = ImageOps.exif_transpose(opened)
    assert (pixels.width, pixels.height) == seen.size and pixels.data == seen.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_the_server_reads_every_parameter_as_it_was_given(binary: bool) -> None:
    parameters = Parameters(
        prompt_2="a circle",
        negative_prompt="blurry ☂",
        negative_prompt_2="text",
        height=64,
        width=128,
        num_inference_steps=2,
        guidance_scale=7.1,
        guidance_rescale=0.7,
        seed=2**63 - 2,
        num_images_per_prompt=2,
        clip_skip=1,
        scheduler="DPM++ 2M Karras",
        original_size=(512, 1024),
        crops_coords_top_left=(0, 8),
        target_size=(64, 128),
        denoising_end=0.8,
        guidance_end=0.5,
        true_cfg_scale=2.5,
        image=b"\x89PNG",
        mask_image=b"RIFF",
        strength=0.6,
        use_karras_sigmas=True,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        timestep_spacing="trailing",
        timesteps=(999, 500),
        sigmas=(14.6, 0.1),
        eta=0.1,
        negative_original_size=(1, 2),
        negative_crops_coords_top_left=(3, 4),
        negative_target_size=(5, 6),
        aesthetic_score=6.5,
        negative_aesthetic_score=2.5,
        denoising_limit=0.7,
        max_sequence_length=128,
        loras={"style": 0.5, "detail": -1},
        output_format="webp",
    )
    assert set(parameters) == set(PARAMETERS) - {"prompt"}
    call = read(["a", "b"], parameters, binary=binary, request_id="mine")
    assert call.id == "mine"
    assert [request.prompt for request in call.requests] == ["a", "b"]
    for request in call.requests:
        for name, value in parameters.items():
            expected = {"output_format": ImageFormat.WEBP, "loras": (("style", 0.5), ("detail", -1.0))}.get(name, value)
            assert getattr(request, name) == expected


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", [1, 2]),
        ("guidance_scale", [1, 2.5]),
        ("negative_prompt", ["a", "b"]),
        ("use_karras_sigmas", [True, False]),
        ("target_size", [(1, 2), (3, 4)]),
        ("sigmas", [[2, 1.5], [3, 0]]),
        ("image", [b"one", b"two"]),
    ],
)
def test_with_several_prompts_a_list_has_one_value_for_each(name: str, values: list[Any]) -> None:
    call = read(["a", "b"], {name: values})
    found = [getattr(request, name) for request in call.requests]
    assert found == [tuple(value) if isinstance(value, list) else value for value in values]


def test_what_is_none_is_left_to_the_model() -> None:
    assert read("a", {"seed": None, "width": None, "image": None}).given == {"prompt"}


@pytest.mark.parametrize("binary", [True, False])
def test_pictures_are_asked_for_as_bytes_or_as_json(binary: bool) -> None:
    assert [output.binary for output in read("a", {}, binary).outputs] == [binary, binary]


# --- Images ----------------------------------------------------------------------------------------------------

PNG_FILE = b"\x89PNG\r\n\x1a\n and so on"


@pytest.mark.parametrize("binary", [True, False])
def test_an_image_may_be_a_path_or_bytes(binary: bool, tmp_path: Path) -> None:
    path = tmp_path / "ein Bild ü.png"
    path.write_bytes(PNG_FILE)
    for value in (path, str(path), PNG_FILE, bytearray(PNG_FILE), memoryview(PNG_FILE)):
        assert read("a", {"image": value}, binary).requests[0].image == PNG_FILE


@pytest.mark.parametrize("binary", [True, False])
def test_an_image_may_be_a_picture_of_pillows(binary: bool) -> None:
    picture = Image.new("RGB", (3, 2), "red")
    (pixels,) = decode_images([("image", read("a", {"image": picture}, binary).requests[0].image or b"")], 6)
    assert pixels == Pixels(bytes([255, 0, 0]) * 6, 2, 3)
    mask = Image.new("1", (3, 2), 1)
    (pixels,) = decode_images(
        [("mask_image", read("a", {"mask_image": mask}, binary).requests[0].mask_image or b"")], 6
    )
    assert pixels == Pixels(bytes([255]) * 6, 2, 3, channels=1)


@pytest.mark.parametrize("binary", [True, False])
def test_an_image_may_be_an_array_of_numpys(binary: bool) -> None:
    image, mask = np.arange(24, dtype=np.uint8).reshape(2, 4, 3), np.arange(8, dtype=np.uint8).reshape(2, 4)
    # A view that lies in another order in memory.
    turned = np.asfortranarray(image)
    for array in (image, turned, [image], image[None]):
        (request,) = read("a", {"image": array, "mask_image": mask}, binary).requests
        assert request.image == Pixels(bytes(range(24)), 2, 4)
        assert request.mask_image == Pixels(bytes(range(8)), 2, 4, channels=1)
    first, second = read(["a", "b"], {"image": [image, image + 1]}, binary).requests
    assert first.image == Pixels(bytes(range(24)), 2, 4) and second.image == Pixels(bytes(range(1, 25)), 2, 4)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("nowhere.png", r"Cannot read 'nowhere\.png' for image: No such file or directory\."),
        ("nul\0", "Cannot read"),
        (7, "image must be a path, the bytes of a file, a picture of Pillow's or an array of numpy's, not int"),
        ([], "image is an empty list"),
        ([None], "not NoneType"),
        (np.zeros((2, 2, 3)), "array of uint8, with values from 0 to 255"),
        ([np.zeros((2, 2, 3), np.uint8), b"file"], "arrays of one shape, or files"),
        ([np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)], "arrays of one shape"),
        (Image.new("F", (1, 1)), "image cannot be written as PNG"),
    ],
)
def test_what_is_no_image_is_told_before_anything_is_sent(ask: Ask, value: Any, words: str) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing was to be sent")

    with pytest.raises(ClientError, match=words):
        ask(handler, "generate", "a", image=value)


def test_bytes_behind_the_json_are_announced(ask: Ask) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return json_answer()

    ask(handler, "generate", "a", image=PNG_FILE)
    ask(handler, "generate", "a", image=PNG_FILE, options={"binary": False})
    behind, inside = seen
    assert behind.headers["Content-Type"] == "application/octet-stream"
    assert parse_infer(behind.content, behind.headers[answers.JSON_LENGTH]).requests[0].image == PNG_FILE
    assert inside.headers["Content-Type"] == "application/json" and answers.JSON_LENGTH not in inside.headers
    assert parse_infer(inside.content, None).requests[0].image == PNG_FILE


def test_a_client_needs_neither_pillow_nor_numpy() -> None:
    code = "import sys, clients.client; print([m for m in ('PIL', 'numpy', 'app') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_key_and_model_are_sent_so_that_any_server_can_read_them(ask: Ask) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return json_answer()

    ask(handler, "generate", "a", options={"model": "my/model ü", "api_key": "schlüssel\n"})
    assert seen[0].url.raw_path == b"/v2/models/my%2Fmodel%20%C3%BC/infer"
    assert (b"Authorization", "Bearer schlüssel".encode()) in seen[0].headers.raw
    assert seen[0].headers["Content-Type"] == "application/json"


def test_a_server_may_live_under_a_path() -> None:
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200 if request.url.path == "/sd/v2" else 404, json={})
    )
    with Client("http://gateway/sd/", transport=transport) as client:
        assert client.server_metadata() == {}


# --- Answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [json_answer(id="mine"), binary_answer(*binary_body())], ids=["json", "binary"])
def test_pictures_come_with_their_seeds_in_json_and_binary(ask: Ask, answer: httpx.Response) -> None:
    result = ask(always(answer), "generate", "a")
    assert result.pictures == [Picture(image, seed, "image/png") for image, seed in zip(IMAGES, SEEDS, strict=True)]
    assert result.parameters == PNG
    assert result.id in ("mine", None)


BODY, LENGTH = binary_body()


def tensors_answer(image: list[Any], seed: list[Any]) -> httpx.Response:
    return json_answer(outputs=[{"name": "image", "data": image}, {"name": "seed", "data": seed}])


MALFORMED = {
    "not JSON": (httpx.Response(200, text="<html>Welcome</html>"), "not JSON"),
    "not UTF-8": (httpx.Response(200, content=b'"\xff\xff"'), "not JSON"),
    "nested without end": (httpx.Response(200, content=b"[" * 100_000), "not JSON"),
    "no object": (httpx.Response(200, json=[1]), "not a JSON object"),
    "no outputs": (httpx.Response(200, json={}), "no outputs"),
    "outputs of another kind": (json_answer(outputs=["image"]), "no name or no data"),
    "parameters of another kind": (json_answer(parameters=[1]), "parameters"),
    "another model's outputs": (json_answer(outputs=[{"name": "logits", "data": [0.5]}]), "lacks the output image"),
    "no base64": (tensors_answer(["?"], [1]), "base64"),
    "image no text": (tensors_answer([{}], [1]), "base64"),
    "seed no number": (tensors_answer(["AA=="], ["1"]), "whole number"),
    "no pictures": (tensors_answer([], []), "0 pictures"),
    "a seed too few": (tensors_answer(["AA==", "AA=="], [1]), "2 pictures and 1 seeds"),
    "header missing": (httpx.Response(200, content=BODY), "not JSON"),
    "header no number": (binary_answer(BODY, "-1"), answers.JSON_LENGTH),
    "header too large": (binary_answer(BODY, len(BODY) + 1), answers.JSON_LENGTH),
    "header too small": (binary_answer(BODY, LENGTH - 1), "not JSON"),
    "cut off in the image": (binary_answer(BODY[: LENGTH + 9], LENGTH), "bytes of image are announced, but 9 came"),
    "cut off in the seed": (binary_answer(BODY[:-1], LENGTH), "16 bytes of seed are announced, but 15 came"),
    "bytes too many": (binary_answer(BODY + b"!", LENGTH), "1 bytes follow"),
}


@pytest.mark.parametrize(("answer", "words"), MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_makes_no_sense_is_an_error_that_says_why(answer: httpx.Response, words: str) -> None:
    with pytest.raises(ServerError, match=words) as caught:
        answers.read_result(answer)
    assert caught.value.status == 200
    assert str(caught.value).startswith("The server's answer cannot be understood: ")


@given(
    start=st.integers(0, len(BODY)),
    end=st.integers(0, len(BODY)),
    noise=st.binary(max_size=12),
    length=st.none() | st.integers(0, len(BODY)).map(str) | st.just(str(LENGTH)),
)
def test_damage_to_an_answer_never_shows_as_anything_but_a_server_error(
    start: int, end: int, noise: bytes, length: str | None
) -> None:
    headers = {} if length is None else {answers.JSON_LENGTH: length}
    try:
        result = answers.read_result(httpx.Response(200, content=BODY[:start] + noise + BODY[end:], headers=headers))
    except ServerError:
        return
    assert all(isinstance(picture.data, bytes) and isinstance(picture.seed, int) for picture in result.pictures)


def test_a_picture_is_saved_as_it_came(tmp_path: Path) -> None:
    path = Picture(b"bytes", 7, "image/webp").save(tmp_path / "a.webp")
    assert path.read_bytes() == b"bytes"


@pytest.mark.parametrize(
    ("media_type", "suffix"),
    [("image/png", ".png"), ("image/jpeg", ".jpg"), ("image/webp", ".webp"), ("image/../../etc", ".bin")],
)
def test_the_ending_of_a_file_is_one_of_a_few(media_type: str, suffix: str) -> None:
    assert Picture(b"", 7, media_type).suffix == suffix


# --- Errors ----------------------------------------------------------------------------------------------------


def test_an_error_is_the_servers_own_sentence(ask: Ask) -> None:
    sentence = "There is no parameter 'stepz'; did you mean 'steps'?"
    with pytest.raises(ServerError) as caught:
        ask(lambda _: httpx.Response(400, json={"error": sentence}), "generate", "a", stepz=2)
    assert (caught.value.status, str(caught.value), caught.value.retry_after) == (400, sentence, None)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(502, text="<html>Bad Gateway</html>"),
        httpx.Response(502, json={"detail": "gone"}),
        httpx.Response(502, json={"error": {"code": 7}}),
        httpx.Response(502),
    ],
)
def test_an_error_without_a_sentence_gets_one(ask: Ask, answer: httpx.Response) -> None:
    with pytest.raises(ServerError, match="The answer is 502 Bad Gateway without a reason") as caught:
        ask(always(answer), "metadata")
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (httpx.ConnectError("refused"), "No server can be reached at http://server:8080 (refused)."),
        (httpx.ReadTimeout(""), "The server at http://server:8080 did not answer within 5 seconds."),
        (httpx.ReadError(""), "The connection to http://server:8080 broke before the answer was whole (ReadError)."),
    ],
)
def test_trouble_with_the_connection_is_one_sentence(ask: Ask, error: httpx.HTTPError, sentence: str) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(UnreachableError) as caught:
        ask(handler, "generate", "a", options={"timeout": 5})
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "url",
    ["server:8080", "ftp://server", "http://", "http://server:port", "http://server:80800", "http://a..b", "", "\0"],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_url_that_is_none_is_told_at_once(kind: type[Client] | type[AsyncClient], url: str) -> None:
    with pytest.raises(UnreachableError, match="must be like http://localhost:8080"):
        kind(url)


# --- Trying again ----------------------------------------------------------------------------------------------


def infer_call() -> conversations.Call:
    return conversations.Call("POST", "/infer", httpx.Timeout(60), b"{}")


def refusal(status: int, retry_after: str | None = None) -> httpx.Response:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return httpx.Response(status, json={"error": "The queue is full."}, headers=headers)


def test_a_busy_server_is_asked_again_after_the_seconds_it_names() -> None:
    conversation = conversations.converse_infer(infer_call(), retries=2)
    assert next(conversation).delay == 0
    again = conversation.send(refusal(429, "3"))
    assert (again.delay, again.content) == (3, b"{}")
    assert conversation.send(refusal(503, "4")).delay == 4
    with pytest.raises(StopIteration) as stop:
        conversation.send(json_answer())
    assert [picture.seed for picture in stop.value.value.pictures] == SEEDS


def test_pauses_double_where_the_server_names_none_that_can_be_read() -> None:
    conversation = conversations.converse_infer(infer_call(), retries=7)
    next(conversation)
    answers = [None, "soon", "Wed, 21 Oct 2026 07:28:00 GMT", "", "-1", "1.5", None]
    assert [conversation.send(refusal(503, text)).delay for text in answers] == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("retries", "answer"),
    [(0, refusal(429, "3")), (5, refusal(400)), (5, refusal(504)), (5, refusal(503, "61"))],
    ids=["no retries", "not its kind of error", "time was up", "a longer wait than the caller's"],
)
def test_other_refusals_are_final(retries: int, answer: httpx.Response) -> None:
    conversation = conversations.converse_infer(infer_call(), retries)
    next(conversation)
    with pytest.raises(ServerError, match=r"^The queue is full\.$"):
        conversation.send(answer)


def test_the_last_refusal_is_the_error_and_still_knows_the_wait(ask: Ask) -> None:
    answers = iter([refusal(429, "0"), refusal(429, "0"), refusal(503, "9")])
    with pytest.raises(ServerError) as caught:
        ask(lambda _: next(answers), "generate", "a", options={"retries": 2})
    assert (caught.value.status, caught.value.retry_after) == (503, 9)
    assert not list(answers)


def test_retries_lead_to_the_picture(ask: Ask) -> None:
    answers = iter([refusal(429, "0"), json_answer()])
    assert len(ask(lambda _: next(answers), "generate", "a", options={"retries": 1}).pictures) == 2


def test_a_server_that_restarts_is_asked_again_until_it_takes_the_request(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "LONGEST_BACKOFF", 0)
    turns: list[Handler] = [always(refusal(503, "0")), refuse_connection, refuse_connection, json_answer]
    assert len(ask(in_turn(turns), "generate", "a", options={"retries": 3}).pictures) == 2


def test_pauses_double_while_a_server_restarts() -> None:
    conversation = conversations.converse_infer(infer_call(), retries=7)
    next(conversation)
    refused = UnreachableError("No server can be reached.", restarting=True)
    assert [conversation.throw(refused).delay for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    with pytest.raises(UnreachableError):
        conversation.throw(refused)


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.WriteError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_what_may_have_been_accepted_is_not_sent_again(ask: Ask, error: type[httpx.HTTPError]) -> None:
    def breaks(_: httpx.Request) -> httpx.Response:
        raise error("")

    turns: list[Handler] = [always(refusal(503, "0")), breaks]
    with pytest.raises(UnreachableError):
        ask(in_turn(turns), "generate", "a", options={"retries": 5})


def test_a_server_that_never_answered_is_not_waited_for(ask: Ask) -> None:
    turns: list[Handler] = [refuse_connection]
    with pytest.raises(UnreachableError, match="No server can be reached"):
        ask(in_turn(turns), "generate", "a", options={"retries": 5})


# --- Health ----------------------------------------------------------------------------------------------------


def refuse_connection(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("Connection refused")


@pytest.mark.parametrize("method", ["live", "ready"])
def test_health_is_yes_or_no(ask: Ask, method: str) -> None:
    assert ask(lambda _: httpx.Response(200, json={}), method) is True
    assert ask(lambda _: httpx.Response(503, json={"error": "The model is loading."}), method) is False
    assert ask(refuse_connection, method) is False


def test_asking_whether_an_unknown_model_is_ready_is_an_error(ask: Ask) -> None:
    with pytest.raises(ServerError, match="There is no model"):
        ask(lambda _: httpx.Response(404, json={"error": "There is no model 'sdxl'."}), "ready")


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "POLL_INTERVAL", 0.001)


@pytest.mark.usefixtures("_impatient")
def test_waiting_ends_when_the_model_is_ready(ask: Ask) -> None:
    handlers: list[Handler] = [refuse_connection, always(httpx.Response(502)), always(refusal(503)), json_answer]
    ask(in_turn(handlers), "wait_until_ready", 60)
    assert not handlers


@pytest.mark.usefixtures("_impatient")
def test_waiting_in_vain_ends_with_what_the_server_said_last(ask: Ask) -> None:
    with pytest.raises(ServerError, match="The model sdxl is loading"):
        ask(lambda _: httpx.Response(503, json={"error": "The model sdxl is loading."}), "wait_until_ready", 0.01)
    with pytest.raises(UnreachableError, match="No server can be reached"):
        ask(refuse_connection, "wait_until_ready", 0.01)


def test_nobody_waits_for_a_model_that_will_never_be_there(ask: Ask) -> None:
    with pytest.raises(ServerError, match="There is no model"):
        ask(lambda _: httpx.Response(404, json={"error": "There is no model 'sdxl'."}), "wait_until_ready", 600)


# --- The command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red circle on a white background", "a-red-circle-on-a-white-background"),
        ("A  *red* circle!", "a-red-circle"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\con\n\0_~", "c-con"),
        ("Ein Käfer, 甲虫", "ein-käfer-甲虫"),
        ("☂ !", "picture"),
        ("", "picture"),
        ("\udcff", "picture"),
        ("very " * 20, "very-" * 9 + "ver"),
    ],
)
def test_a_prompt_becomes_a_safe_name(prompt: str, name: str) -> None:
    assert paint.file_name(prompt) == name
    assert len(name.encode()) <= 200


def test_no_picture_is_ever_overwritten(tmp_path: Path) -> None:
    first, other, third = (Picture(data, 7, "image/png") for data in (b"1", b"2", b"3"))
    names = [paint.save(picture, "A cat!", tmp_path).name for picture in (first, other, third)]
    assert names == ["a-cat-7.png", "a-cat-7_2.png", "a-cat-7_3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"1", b"2", b"3"]


def test_the_same_picture_is_saved_once(tmp_path: Path) -> None:
    picture = Picture(b"1", 7, "image/png")
    assert paint.save(picture, "a cat", tmp_path) == paint.save(picture, "a cat", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-7.png"]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_without_a_server_the_command_says_so_in_one_sentence(
    closed_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paint.main(["a cat", "--url", f"http://127.0.0.1:{closed_port}", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"sdxl-paint: No server can be reached at http://127.0.0.1:{closed_port} (")
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert paint.main(["a cat", "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"sdxl-paint: Cannot write {tmp_path / 'file'}: File exists.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "nowhere.png"], "Cannot read 'nowhere.png' for --image: No such file or directory."),
        (["--image", "."], "Cannot read '.' for --image: Is a directory."),
    ],
)
def test_an_image_that_cannot_be_read_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paint.main(["a cat", "--out", str(tmp_path), *arguments]) == 1
    assert capsys.readouterr().err == f"sdxl-paint: {sentence}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--number", "0"],
        ["a", "--steps", "many"],
        ["a", "--format", "gif"],
        ["a", "--sigmas", "cubic"],
        ["a", "--strength", "half"],
        ["a", "--timeout", "nan"],
        ["a", "--step", "2"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        paint.main(arguments)
    assert stop.value.code == 2
    assert "sdxl-paint: error: " in capsys.readouterr().err


def test_after_the_largest_seed_comes_0_as_on_the_server() -> None:
    largest = 2**63 - 1
    assert [paint.following(largest - 1, number) for number in range(3)] == [largest - 1, largest, 0]
    # One that no server takes is refused there, and not bent into one that it takes.
    assert [paint.following(seed, 1) for seed in (largest + 1, -1)] == [largest + 1, -1]
