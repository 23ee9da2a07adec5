"""What callers get wrong, by accident or on purpose: each gets its status and one sentence, and nobody else notices.

After every group of cases the server still paints the same picture as before, holds no request, and has no traceback
in its log.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Server
from tests.waiting import until

INFER = "/v2/models/sdxl/infer"
JSON_LENGTH = "Inference-Header-Content-Length"
SMALL = {"width": 64, "height": 64, "num_inference_steps": 1, "seed": 7}
LIMIT = 33_554_432
PROMPTLY = 30.0
"""Seconds; a refusal takes milliseconds, but the machine may be busy with something else."""
PATIENCE = 300.0
KEY = "open-sesame-42"


# --- The server before and after -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as connection:
        yield connection


@pytest.fixture(scope="module")
def picture(client: httpx.Client) -> bytes:
    return paint(client)


@pytest.fixture(autouse=True, scope="class")
def _nobody_else_notices(server: Server, client: httpx.Client, picture: bytes) -> Iterator[None]:
    log_before = len(server.log())
    yield
    assert paint(client) == picture
    until(lambda: unfinished_images(server) == 0, "a request is still held")
    assert "Traceback" not in server.log()[log_before:], server.log()[log_before:]


def paint(client: httpx.Client, **headers: str) -> bytes:
    answer = client.post(INFER, json=message(), headers=headers)
    assert answer.status_code == 200, answer.text
    png = base64.b64decode(answer.json()["outputs"][0]["data"][0])
    assert png.startswith(b"\x89PNG")
    return png


def unfinished_images(server: Server) -> float:
    return server.metric("sdxl_pending_images") + server.metric("sdxl_running_images")


def peak_memory(server: Server) -> int:
    """Most bytes of memory that the server ever held."""
    status = Path(f"/proc/{server.pid}/status")
    if not status.exists():
        pytest.skip("only Linux tells a process's peak memory")
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


# --- Requests and what is expected of their answers ------------------------------------------------------------


def tensor(name: Any, *data: Any, datatype: str = "INT64", shape: Any = None, **fields: Any) -> dict[str, Any]:
    values = {"data": list(data)} if data else {}
    return {"name": name, "shape": [len(data)] if shape is None else shape, "datatype": datatype, **values, **fields}


def prompt(*texts: Any, **fields: Any) -> dict[str, Any]:
    return {**tensor("prompt", *(texts or ("a red circle",)), datatype="BYTES"), **fields}


def message(*inputs: Any, **fields: Any) -> dict[str, Any]:
    """A good request, unless `inputs` or `fields` make it a bad one."""
    return {"inputs": list(inputs) or [prompt()], "parameters": SMALL, **fields}


def parameters(**values: Any) -> dict[str, Any]:
    return message(parameters={**SMALL, **values})


def infer(client: httpx.Client, content: Any, headers: dict[str, str] | None = None) -> httpx.Response:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return client.post(INFER, content=raw, headers=headers or {})


def refused(answer: httpx.Response, status: int, says: str) -> None:
    """The answer is exactly ``{"error": "<sentence>"}`` with that status, came promptly, and names what is wrong."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    check_sentence(answer.json(), says)
    assert answer.elapsed.total_seconds() < PROMPTLY


def check_sentence(content: Any, says: str) -> None:
    assert list(content) == ["error"], content
    sentence = content["error"]
    assert says in sentence
    assert re.search(r"(\.\.\.|[^.])[.?]$", sentence), sentence
    assert sentence.isprintable(), sentence
    assert len(sentence) < 500
    for insider in ("Traceback", "pydantic", "Errno", "0x", "operands"):
        assert insider not in sentence


def ids(cases: list[tuple[Any, ...]]) -> list[Any]:
    """Cases whose first member is what stands in the test's name."""
    return [pytest.param(*case[1:], id=case[0].replace(" ", "-")) for case in cases]


# --- JSON ------------------------------------------------------------------------------------------------------


def deep(depth: int, inside: str = "") -> str:
    return "[" * depth + inside + "]" * depth


def around(text: str) -> bytes:
    """A request whose prompt tensor's data is `text`, as it stands."""
    return b'{"inputs":[{"name":"prompt","shape":[1],"datatype":"BYTES","data":[' + text.encode() + b"]}]}"


class TestWhatIsNoJson:
    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("nothing", b"", "The body is not JSON"),
                ("text", b"a red circle", "The body is not JSON: Expecting value at line 1, column 1."),
                ("half a document", b'{"inputs": [', "The body is not JSON"),
                ("two documents", b"{} {}", "The body is not JSON: Extra data"),
                ("single quotes", b"{'inputs': []}", "The body is not JSON"),
                ("a trailing comma", b'{"inputs": [],}', "The body is not JSON"),
                ("a line break in a string", around('"a\nb"'), "not JSON: Invalid control character at line 1, column"),
                ("a byte order mark", b"\xef\xbb\xbf{}", "The body begins with a byte order mark"),
                ("a list", b"[]", "must be a JSON object"),
                ("a number", b"7", "must be a JSON object"),
                ("a string", b'"prompt"', "must be a JSON object"),
                ("null", b"null", "must be a JSON object"),
                ("true", b"true", "must be a JSON object"),
                ("Latin-1", '{"id": "é"}'.encode("latin-1"), "not UTF-8 (byte 8)"),
                ("UTF-16", '{"inputs": []}'.encode("utf-16"), "not UTF-8 (byte 0)"),
                ("a surrogate in UTF-8", around('"')[:-4] + b'\xed\xa0\x80"]}]}', "not UTF-8"),
                ("NaN", around("NaN"), "NaN is not JSON; numbers must be finite."),
                ("Infinity", b'{"parameters": {"guidance_scale": Infinity}}', "Infinity is not JSON"),
                ("minus Infinity", b'{"parameters": {"guidance_scale": -Infinity}}', "-Infinity is not JSON"),
                ("5000 digits", b'{"parameters": {"seed": ' + b"1" * 5000 + b"}}", "too many digits"),
                ("a million digits", b'{"parameters": {"seed": -' + b"9" * 1_000_000 + b"}}", "too many digits"),
                ("lists 100000 deep", deep(100_000).encode(), "nested too deeply"),
                ("lists 100000 deep and never closed", b"[" * 100_000, "nested too deeply"),
                ("objects 100000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
                ("lists 100000 deep in data", around(deep(100_000)), "nested too deeply"),
                ("a high surrogate alone", around(r'"\ud800"'), "half of a surrogate pair"),
                ("a low surrogate alone", around(r'"\udc00"'), "half of a surrogate pair"),
                ("a surrogate pair the wrong way round", around(r'"\udc00\ud800"'), "half of a surrogate pair"),
                ("a lone surrogate in a name", rb'{"\uDABC": 1, "inputs": []}', "half of a surrogate pair"),
                ("a name twice", b'{"inputs": [], "inputs": []}', "'inputs' stands twice in one JSON object."),
                ("an inner name twice", b'{"parameters": {"seed": 1, "seed": 2}}', "'seed' stands twice"),
            ]
        ),
    )
    def test_is_told_so(self, client: httpx.Client, content: bytes, says: str) -> None:
        refused(infer(client, content), 400, says)

    @pytest.mark.parametrize(
        "template",
        [
            pytest.param('{"inputs": %s}', id="inputs"),
            pytest.param('{"inputs": [], "id": %s}', id="id"),
            pytest.param('{"inputs": [], "parameters": {"seed": %s}}', id="parameter"),
            pytest.param('{"inputs": [{"name": "prompt", "shape": %s, "datatype": "BYTES"}]}', id="shape"),
            pytest.param(
                '{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [%s]}]}', id="data"
            ),
            pytest.param(
                '{"inputs": [{"name": "prompt", "shape": [1,1,1], "datatype": "BYTES", "data": %s}]}', id="nested-data"
            ),
            pytest.param(
                '{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "outputs": [%s]}',
                id="output",
            ),
            pytest.param('{"inputs": [], "unknown": %s}', id="unknown-field"),
        ],
    )
    def test_no_depth_of_nesting_gets_through_wherever_it_stands(self, client: httpx.Client, template: str) -> None:
        for depth in [5, 9, 100, 500, *range(900, 1010), 2_000, 20_000]:
            answer = infer(client, (template % deep(depth)).encode())
            assert (answer.status_code, list(answer.json())) == (400, ["error"]), (depth, answer.text)


# --- Fields ----------------------------------------------------------------------------------------------------


class TestMessagesOfTheWrongForm:
    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("no inputs", {}, "inputs is missing."),
                ("inputs null", {"inputs": None}, "inputs must be a valid list"),
                ("inputs an object", {"inputs": {"prompt": "a"}}, "inputs must be a valid list"),
                ("inputs text", {"inputs": "a red circle"}, "inputs must be a valid list"),
                ("no input", {"inputs": []}, "The input prompt is missing."),
                ("input text", {"inputs": ["a red circle"]}, "inputs[0] must be"),
                ("input without name", {"inputs": [{"shape": [1]}]}, "inputs[0].name is missing."),
                (
                    "input without shape",
                    message({"name": "prompt", "datatype": "BYTES"}),
                    "inputs[0].shape is missing.",
                ),
                ("input without datatype", message({"name": "prompt", "shape": [1]}), "inputs[0].datatype is missing."),
                ("second input bad", message(prompt(), {"name": 5}), "inputs[1].name must be a valid string, not 5."),
                ("name a number", message(tensor(7, 7)), "inputs[0].name must be a valid string"),
                ("shape a number", message(prompt(shape=1)), "inputs[0].shape must be a valid list"),
                ("shape of text", message(prompt(shape=["1"])), "inputs[0].shape[0] must be a valid integer"),
                ("shape of fractions", message(prompt(shape=[1.5])), "inputs[0].shape[0] must be a valid integer"),
                ("shape of truth", message(prompt(shape=[True])), "inputs[0].shape[0] must be a valid integer"),
                ("shape of null", message(prompt(shape=[None])), "inputs[0].shape[0] must be a valid integer"),
                ("datatype a number", message(prompt(datatype=7)), "inputs[0].datatype must be a valid string"),
                ("data text", message(prompt(data="a")), "inputs[0].data must be a valid list"),
                ("data an object", message(prompt(data={"b64": "YQ=="})), "inputs[0].data must be a valid list"),
                ("unknown field", message(input=[]), "input is not a field of the protocol (did you mean 'inputs'?)"),
                ("unknown field of an input", message(prompt(dtype="BYTES")), "did you mean 'datatype'?"),
                ("unknown field like no other", message(zzz=1), "zzz is not a field of the protocol."),
                ("id a number", message(id=42), "id must be a valid string, not 42."),
                ("id a list", message(id=["a"]), "id must be a valid string"),
                ("id too long", message(id="x" * 1025), "at most 1024 characters"),
                ("parameters a list", message(parameters=["seed"]), "parameters must be a valid dictionary"),
                ("parameter null", parameters(seed=None), "parameters.seed must be"),
                ("parameter an object", parameters(seed={"value": 7}), "parameters.seed must be"),
                ("parameter a list", parameters(original_size=[64, 64]), "parameters.original_size must be"),
                ("outputs text", message(outputs="image"), "outputs must be a valid list"),
                ("output text", message(outputs=["image"]), "outputs[0] must be"),
                ("output without name", message(outputs=[{}]), "outputs[0].name is missing."),
                (
                    "output with data",
                    message(outputs=[{"name": "image", "data": []}]),
                    "outputs[0].data is not a field",
                ),
                ("a name of a million letters", message(**{"x" * 1_000_000: 1}), "is not a field of the protocol."),
            ]
        ),
    )
    def test_are_told_the_place_and_what_belongs_there(self, client: httpx.Client, content: Any, says: str) -> None:
        refused(infer(client, content), 400, says)

    def test_a_list_of_a_million_wrong_things_costs_neither_time_nor_memory(
        self, client: httpx.Client, server: Server
    ) -> None:
        before = peak_memory(server)
        seconds_before = server.metric("process_cpu_seconds_total")
        for content, says in (
            ({"inputs": [1] * 1_000_000}, "inputs[0] must be an object, not 1."),
            (message(outputs=[1] * 1_000_000), "outputs[0] must be an object, not 1."),
            (message(prompt(shape=["x"] * 1_000_000)), "inputs[0].shape[0] must be a valid integer, not 'x'."),
            (message(prompt(*["a"] * 1_000_000)), "at most 8192 elements, not 1000000."),
            (message(prompt(*[["a"]] * 1_000_000)), "at most 8192 elements, not 1000000."),
            (parameters(**{f"p{i}": None for i in range(500_000)}), "One JSON object has more than 256 names."),
            (message(**{f"p{i}": 0 for i in range(500_000)}), "One JSON object has more than 256 names."),
        ):
            refused(infer(client, content), 400, says)
        assert peak_memory(server) - before < 300e6
        assert server.metric("process_cpu_seconds_total") - seconds_before < 15


# --- Inputs ----------------------------------------------------------------------------------------------------


class TestInputs:
    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("no prompt", message(tensor("clip_skip", 0)), "The input prompt is missing."),
                ("prompt twice", message(prompt(), prompt()), "Input prompt is given twice."),
                (
                    "an unknown one",
                    message(prompt(), tensor("sed", 7)),
                    "There is no input 'sed' (did you mean 'seed'?)",
                ),
                ("an unknown one like no other", message(prompt(), tensor("zzz", 7)), "There is no input 'zzz'."),
                ("the prompt misspelt", message(prompt(name="promt")), "did you mean 'prompt'?"),
                ("also a parameter", message(prompt(), tensor("seed", 7)), "seed is given twice, as an input and as"),
                ("more seeds than prompts", message(prompt("a", "b"), tensor("clip_skip", 0, 0, 0)), "needs 1, or 2"),
                ("neither data nor bytes", message(prompt(data=None)), "exactly one of data and the parameter"),
                (
                    "data and bytes",
                    message(prompt(parameters={"binary_data_size": 3})),
                    "exactly one of data and the parameter",
                ),
                (
                    "a parameter of shared memory",
                    message(prompt(parameters={"shared_memory_region": "a"})),
                    "'shared_memory_region' is not a parameter of an input.",
                ),
                (
                    "an image by address",
                    message(prompt(), tensor("image", "http://169.254.169.254/", datatype="BYTES")),
                    "addresses and file names are not read.",
                ),
                (
                    "an image from a file",
                    message(prompt(), tensor("mask_image", "/etc/passwd", datatype="BYTES")),
                    "addresses and file names are not read.",
                ),
            ]
        ),
    )
    def test_that_make_no_sense_together_are_refused(self, client: httpx.Client, content: Any, says: str) -> None:
        refused(infer(client, content), 400, says)

    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("too few elements", message(prompt(shape=[2])), "shape [2] needs 2 elements, but data has 1."),
                (
                    "too many elements",
                    message(prompt("a", "b", shape=[1])),
                    "shape [1] needs 1 elements, but data has 2.",
                ),
                ("no dimension", message(prompt(shape=[])), "shape must be [1] or [n], not []."),
                ("two dimensions", message(prompt(shape=[1, 1])), "shape must be [1] or [n], not [1, 1]."),
                ("no element", message(prompt(shape=[0], data=[])), "it has no element."),
                ("a negative dimension", message(prompt(shape=[-1])), "shape [-1] has a negative dimension."),
                ("two negative dimensions", message(prompt(shape=[-1, -1])), "has a negative dimension."),
                ("an overflow", message(prompt(shape=[2**32, 2**32])), "more elements than a request can carry."),
                ("an overflow to zero", message(prompt(shape=[2**63, 2])), "more elements than a request can carry."),
                ("a huge dimension", message(prompt(shape=[2**64 + 1])), "more elements than a request can carry."),
                ("a hundred dimensions", message(prompt(shape=[1] * 100)), "at most 8 dimensions, not 100."),
                (
                    "a dimension of 4000 digits",
                    message(prompt(shape=[10**3999])),
                    "more elements than a request can carry.",
                ),
                ("a negative one of 4000 digits", message(prompt(shape=[-(10**3999)])), "has a negative dimension."),
                (
                    "4000 digits times nothing",
                    message(prompt(shape=[10**3999, 0], data=[])),
                    "it has no element.",
                ),
                ("a million dimensions", message(prompt(shape=[1] * 1_000_000)), "at most 8 dimensions"),
                ("nested too deeply", message(prompt(["a"])), "the nesting of data does not follow shape [1]."),
                ("nested unevenly", message(prompt(["a"], "b", shape=[2, 1])), "the nesting of data does not follow"),
                ("nested with a gap", message(prompt(["a"], [], shape=[2, 1])), "the nesting of data does not follow"),
                (
                    "nested in the wrong order",
                    message(prompt(["a", "b"], shape=[2, 1])),
                    "the nesting of data does not",
                ),
                ("nested late", message(prompt("a", ["b"])), "elements of BYTES data must be text, not ['b']."),
            ]
        ),
    )
    def test_whose_shape_and_data_disagree_are_refused(self, client: httpx.Client, content: Any, says: str) -> None:
        answer = infer(client, content)
        refused(answer, 400, says)
        assert answer.json()["error"].startswith("Input prompt: ")

    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("lower case", message(prompt(datatype="bytes")), "datatype 'bytes' is not one of BYTES, BOOL"),
                ("unknown", message(prompt(datatype="STRING")), "datatype 'STRING' is not one of"),
                ("empty", message(prompt(datatype="")), "datatype '' is not one of"),
                ("endless", message(prompt(datatype="X" * 100_000)), "is not one of"),
                ("a number for text", message(prompt(7, datatype="INT64")), "datatype must be BYTES, not INT64."),
                ("text for a number", message(prompt(), tensor("clip_skip", "1", datatype="BYTES")), "a number type"),
                ("truth for a number", message(prompt(), tensor("clip_skip", True, datatype="BOOL")), "not BOOL."),
                (
                    "truth as text",
                    message(prompt(), tensor("use_karras_sigmas", "true", datatype="BOOL")),
                    "elements of BOOL data must be true or false.",
                ),
                (
                    "truth as number",
                    message(prompt(), tensor("use_karras_sigmas", 1, datatype="BOOL")),
                    "must be true or false.",
                ),
                (
                    "FP16 in JSON",
                    message(prompt(), tensor("guidance_scale", 5.0, datatype="FP16")),
                    "FP16 has no JSON form",
                ),
                (
                    "BF16 in JSON",
                    message(prompt(), tensor("guidance_scale", 5.0, datatype="BF16")),
                    "BF16 has no JSON form",
                ),
                ("number in text", message(prompt(7)), "elements of BYTES data must be text, not 7."),
                ("null in text", message(prompt(None)), "elements of BYTES data must be text, not null."),
                ("text in numbers", message(prompt(), tensor("clip_skip", "1")), "must be numbers, not '1'."),
                ("truth in numbers", message(prompt(), tensor("clip_skip", True)), "must be numbers, not true."),
                ("null in numbers", message(prompt(), tensor("clip_skip", None)), "must be numbers, not null."),
                ("a fraction in integers", message(prompt(), tensor("clip_skip", 1.5)), "whole numbers, not 1.5."),
                (
                    "infinity in integers",
                    around('"a"')[:-2] + b',{"name":"clip_skip","shape":[1],"datatype":"INT64","data":[1e999]}]}',
                    "whole numbers, not inf.",
                ),
                (
                    "infinity in fractions",
                    around('"a"')[:-2] + b',{"name":"guidance_scale","shape":[1],"datatype":"FP64","data":[1e999]}]}',
                    "does not fit FP64.",
                ),
                ("300 in a byte", message(prompt(), tensor("clip_skip", 300, datatype="UINT8")), "does not fit UINT8."),
                ("minus 1 unsigned", message(prompt(), tensor("clip_skip", -1, datatype="UINT64")), "not fit UINT64."),
                ("2 to the 63rd", message(prompt(), tensor("clip_skip", 2**63)), "does not fit INT64."),
                ("4000 digits", message(prompt(), tensor("clip_skip", 10**4000)), "does not fit INT64."),
                ("1e39 in single", message(prompt(), tensor("guidance_scale", 1e39, datatype="FP32")), "not fit FP32."),
            ]
        ),
    )
    def test_of_the_wrong_type_are_refused(self, client: httpx.Client, content: Any, says: str) -> None:
        refused(infer(client, content), 400, says)

    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("NUL in the prompt", message(prompt("a\0b")), "prompt holds a NUL character."),
                ("NUL in a parameter", parameters(negative_prompt="\0"), "negative_prompt holds a NUL character."),
                ("a prompt too long", message(prompt("a" * 10_001)), "prompt must have at most 10000 characters"),
                ("a prompt of 10 MB", message(prompt("a" * 10_000_000)), "prompt must have at most 10000 characters"),
                (
                    "negative too long",
                    parameters(negative_prompt="é" * 10_001),
                    "negative_prompt must have at most 10000",
                ),
                ("17 prompts", message(prompt(*"abcdefghijklmnopq")), "at most 16 images"),
                ("1000 prompts", message(prompt(*["a"] * 1000)), "at most 16 images"),
                ("a million prompts", message(prompt(*["a"] * 1_000_000)), "at most 8192 elements, not 1000000."),
            ]
        ),
    )
    def test_with_unfit_text_are_refused(self, client: httpx.Client, content: Any, says: str) -> None:
        refused(infer(client, content), 400, says)

    def test_no_address_in_a_request_is_ever_visited(self, client: httpx.Client) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/image.png"
            for name, as_input, as_parameter in (
                ("image", "addresses and file names are not read.", "image is an image; give it as an input."),
                ("mask_image", "addresses and file names are not read.", "mask_image is an image; give it as an"),
                ("image_url", "There is no input", "There is no parameter 'image_url'"),
                ("init_image", "did you mean 'image'?", "did you mean 'image'?"),
            ):
                refused(infer(client, message(prompt(), tensor(name, address, datatype="BYTES"))), 400, as_input)
                refused(infer(client, parameters(**{name: address})), 400, as_parameter)
            answer = client.post(INFER, json=message(prompt(address)))
            assert answer.status_code == 200
            with pytest.raises(BlockingIOError):
                listener.accept()


# --- Binary data -----------------------------------------------------------------------------------------------


def string(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def sized(size: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}, **fields}


def sized_number(size: Any, datatype: str) -> dict[str, Any]:
    return {"name": "guidance_scale", "shape": [1], "datatype": datatype, "parameters": {"binary_data_size": size}}


class TestBinaryData:
    @pytest.mark.parametrize(
        "header", ["abc", "-1", "+5", "1.5", "1e2", "0x10", "1_0", "5,5", "", "9" * 18, "9" * 19, "9" * 5000]
    )
    def test_behind_a_header_that_is_no_length_in_the_body_is_refused(self, client: httpx.Client, header: str) -> None:
        refused(infer(client, message(), {JSON_LENGTH: header}), 400, JSON_LENGTH)

    @pytest.mark.parametrize("off_by", [-1, 1])
    def test_behind_a_header_that_is_off_by_one_is_refused(self, client: httpx.Client, off_by: int) -> None:
        tail = string(b"a red circle")
        head = json.dumps({"inputs": [sized(len(tail))]}).encode()
        answer = infer(client, head + tail, {JSON_LENGTH: str(len(head) + off_by)})
        refused(answer, 400, "The body is not JSON" if off_by < 0 else "")

    @pytest.mark.parametrize(
        ("inputs", "tail", "says"),
        ids(
            [
                ("one byte short", [sized(8)], string(b"abcd")[:-1], "binary_data_size is 8, but 7 bytes are left."),
                ("one byte too many", [sized(8)], string(b"abcd") + b"e", "1 bytes follow the data of the last input."),
                ("bytes that nobody claims", [prompt()], b"abc", "3 bytes follow the data of the last input."),
                ("a negative size", [sized(-8)], string(b"abcd"), "binary_data_size must be a number of bytes."),
                ("a size as text", [sized("8")], string(b"abcd"), "binary_data_size must be a number of bytes."),
                ("a size as fraction", [sized(8.0)], string(b"abcd"), "binary_data_size must be a number of bytes."),
                ("a size as truth", [sized(True)], b"a", "binary_data_size must be a number of bytes."),
                ("a size of 4000 digits", [sized(10**3999)], string(b"abcd"), "but 8 bytes are left."),
                ("a huge size", [sized(10**30)], string(b"abcd"), "but 8 bytes are left."),
                ("data and size", [sized(8, data=["abcd"])], string(b"abcd"), "exactly one of data and the parameter"),
                ("no length before the text", [sized(3)], b"abc", "BYTES data ends after 0 of 1 elements."),
                ("a length too large", [sized(8)], struct.pack("<I", 5) + b"abcd", "claims 5 bytes, but 4 are left."),
                ("a huge length", [sized(8)], struct.pack("<I", 2**32 - 1) + b"abcd", "claims 4294967295 bytes"),
                ("a length too small", [sized(8)], struct.pack("<I", 3) + b"abcd", "1 bytes follow the last of 1"),
                ("too few texts", [sized(8, shape=[2])], string(b"abcd"), "BYTES data ends after 1 of 2 elements."),
                (
                    "two milliards of texts",
                    [sized(8, shape=[2**31])],
                    string(b"abcd"),
                    "at most 8192 elements, not 2147483648.",
                ),
                ("too many texts", [sized(16)], string(b"abcd") * 2, "8 bytes follow the last of 1 elements"),
                ("no text", [sized(0, shape=[0])], b"", "it has no element."),
                ("no bytes", [sized(0)], b"", "BYTES data ends after 0 of 1 elements."),
                ("text that is no UTF-8", [sized(6)], string(b"\xff\xfe"), "prompt is not UTF-8 text."),
                ("text with a NUL", [sized(7)], string(b"a\0b"), "prompt holds a NUL character."),
                (
                    "half a number",
                    [prompt(), sized_number(2, "FP32")],
                    b"ab",
                    "FP32 data of shape [1] needs 4 bytes, got 2.",
                ),
                (
                    "half a bfloat",
                    [prompt(), sized_number(1, "BF16")],
                    b"a",
                    "BF16 data of shape [1] needs 2 bytes, got 1.",
                ),
                ("NaN", [prompt(), sized_number(4, "FP32")], struct.pack("<f", float("nan")), "holds NaN or infinity."),
                ("infinity", [prompt(), sized_number(8, "FP64")], struct.pack("<d", float("inf")), "NaN or infinity."),
                ("half infinity", [prompt(), sized_number(2, "FP16")], b"\x00\x7c", "holds NaN or infinity."),
                ("bfloat NaN", [prompt(), sized_number(2, "BF16")], b"\xff\x7f", "holds NaN or infinity."),
            ]
        ),
    )
    def test_whose_bytes_do_not_add_up_is_refused(
        self, client: httpx.Client, inputs: list[Any], tail: bytes, says: str
    ) -> None:
        head = json.dumps({"inputs": inputs}).encode()
        refused(infer(client, head + tail, {JSON_LENGTH: str(len(head))}), 400, says)

    def test_that_is_announced_but_has_no_header_is_refused(self, client: httpx.Client) -> None:
        tail = string(b"a red circle")
        head = json.dumps({"inputs": [sized(len(tail))]}).encode()
        refused(infer(client, head, None), 400, "binary_data_size is 16, but 0 bytes are left.")
        refused(infer(client, head + tail, None), 400, "The body is not JSON: Extra data")

    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                ("no UTF-8", b"a red \xff circle", "prompt is not UTF-8 text."),
                ("NUL", b"a red \0 circle", "prompt holds a NUL character."),
                ("too long", b"a" * 10_001, "prompt must have at most 10000 characters"),
            ]
        ),
    )
    def test_as_the_bare_prompt_must_be_fit_to_be_one(self, client: httpx.Client, content: bytes, says: str) -> None:
        refused(infer(client, content, {JSON_LENGTH: "0"}), 400, says)


# --- Packed bodies ---------------------------------------------------------------------------------------------

GOOD = json.dumps(message()).encode()
RAW_DEFLATE = zlib.compressobj(wbits=-15)


def flipped(packed: bytes, position: int) -> bytes:
    damaged = bytearray(packed)
    damaged[position] ^= 0xFF
    return bytes(damaged)


class TestPackedBodies:
    @pytest.mark.parametrize(
        ("encoding", "content"),
        [
            ("gzip", gzip.compress(GOOD)),
            ("x-gzip", gzip.compress(GOOD)),
            ("GZIP", gzip.compress(GOOD)),
            ("deflate", zlib.compress(GOOD)),
            ("deflate", RAW_DEFLATE.compress(GOOD) + RAW_DEFLATE.flush()),
            ("identity", GOOD),
        ],
        ids=["gzip", "x-gzip", "upper-case", "deflate", "deflate-without-header", "identity"],
    )
    def test_that_are_whole_are_read(self, client: httpx.Client, picture: bytes, encoding: str, content: bytes) -> None:
        answer = infer(client, content, {"Content-Encoding": encoding})
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["outputs"][0]["data"][0]) == picture

    @pytest.mark.parametrize(
        ("encoding", "content", "says"),
        ids(
            [
                ("not packed", "gzip", GOOD, "The body is not gzip data as its Content-Encoding says."),
                ("nothing", "gzip", b"", "The gzip data of the body does not end where the body ends."),
                ("cut in the middle", "gzip", gzip.compress(GOOD)[:-20], "does not end where the body ends."),
                ("cut before the last byte", "gzip", gzip.compress(GOOD)[:-1], "does not end where the body ends."),
                ("more behind it", "gzip", gzip.compress(GOOD) + b"x", "does not end where the body ends."),
                ("a damaged header", "gzip", flipped(gzip.compress(GOOD), 0), "The body is not gzip data"),
                ("a damaged middle", "gzip", flipped(gzip.compress(GOOD), 40), "gzip data"),
                ("a damaged checksum", "gzip", flipped(gzip.compress(GOOD), -6), "The body is not gzip data"),
                ("a damaged length", "gzip", flipped(gzip.compress(GOOD), -1), "The body is not gzip data"),
                ("deflate not packed", "deflate", GOOD, "deflate data"),
                ("deflate cut", "deflate", zlib.compress(GOOD)[:-5], "does not end where the body ends."),
                ("deflate damaged", "deflate", flipped(zlib.compress(GOOD), -1), "The body is not deflate data"),
                ("gzip called deflate", "deflate", gzip.compress(GOOD), "deflate data"),
                ("gzip of gzip", "gzip", gzip.compress(gzip.compress(GOOD)), "The JSON is not UTF-8"),
            ]
        ),
    )
    def test_that_are_damaged_are_refused(self, client: httpx.Client, encoding: str, content: bytes, says: str) -> None:
        refused(infer(client, content, {"Content-Encoding": encoding}), 400, says)

    @pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "ĝzip", "x" * 5000])
    def test_in_an_encoding_that_is_not_spoken_are_told_which_are(self, client: httpx.Client, encoding: str) -> None:
        answer = client.post(INFER, content=GOOD, headers={b"Content-Encoding": encoding.encode()})
        refused(answer, 415, "use gzip or deflate.")

    @pytest.mark.parametrize("encoding", ["gzip", "deflate"])
    def test_that_unpack_to_a_gigabyte_are_refused_and_memory_stays_flat(
        self, client: httpx.Client, server: Server, encoding: str
    ) -> None:
        packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
        zeros = bytes(2**24)
        bomb = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
        before = peak_memory(server)
        for _ in range(3):
            refused(infer(client, bomb, {"Content-Encoding": encoding}), 413, f"more than {LIMIT} bytes")
        assert peak_memory(server) - before < 200e6


# --- Values ----------------------------------------------------------------------------------------------------


class TestValues:
    @pytest.mark.parametrize(
        ("values", "says"),
        ids(
            [
                ("width 100", {"width": 100}, "width must be a multiple of 8"),
                ("height 63", {"height": 63}, "height must be a multiple of 8"),
                ("width 0", {"width": 0}, "width must be at least 8, not 0."),
                ("width -8", {"width": -8}, "width must be at least 8, not -8."),
                ("width a fraction", {"width": 64.5}, "width must be a whole number, not 64.5."),
                ("width text", {"width": "64"}, "width must be a whole number, not '64'."),
                ("width true", {"width": True}, "width must be a whole number, not true."),
                ("4096 by 4096", {"width": 4096, "height": 4096}, "at most 2048"),
                ("100000 by 100000", {"width": 100_000, "height": 100_000}, "at most 2048"),
                ("8 by a milliard", {"width": 8, "height": 10**9}, "at most 2048"),
                ("width 2 to the 64th", {"width": 2**64}, "at most 2048"),
                ("width of 4000 digits", {"width": 10**3999}, "at most 2048"),
                ("a strip", {"width": 8, "height": 2056}, "height must be at most 2048"),
                ("no steps", {"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0."),
                ("-1 steps", {"num_inference_steps": -1}, "num_inference_steps must be at least 1, not -1."),
                ("151 steps", {"num_inference_steps": 151}, "num_inference_steps must be at most 150, not 151"),
                ("a milliard of steps", {"num_inference_steps": 10**9}, "num_inference_steps must be at most 150"),
                ("steps of 4000 digits", {"num_inference_steps": 10**3999}, "num_inference_steps must be at most 150"),
                ("steps a fraction", {"num_inference_steps": 1.5}, "must be a whole number, not 1.5."),
                ("no image", {"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, not 0."),
                ("17 images", {"num_images_per_prompt": 17}, "at most 16 images"),
                ("a million images", {"num_images_per_prompt": 10**6}, "at most 16 images"),
                ("a seed of -1", {"seed": -1}, "seed must be at least 0, not -1."),
                ("a seed of 2 to the 63rd", {"seed": 2**63}, "seed must be at most 9223372036854775807"),
                ("a seed of 4000 digits", {"seed": 10**3999}, "not a number with more than 30 digits."),
                ("a seed a fraction", {"seed": 0.5}, "seed must be a whole number, not 0.5."),
                ("a seed as text", {"seed": "7"}, "seed must be a whole number, not '7'."),
                ("guidance -1", {"guidance_scale": -1}, "guidance_scale must be at least 0, not -1."),
                (
                    "guidance text",
                    {"guidance_scale": "strong"},
                    "guidance_scale must be a finite number, not 'strong'.",
                ),
                ("guidance of 4000 digits", {"guidance_scale": 10**3999}, "guidance_scale must be"),
                ("guidance 1e308", {"guidance_scale": 1e308}, "guidance_scale must be at most"),
                ("guidance 1e38", {"guidance_scale": 1e38}, "guidance_scale must be at most"),
                ("rescale 1.1", {"guidance_rescale": 1.1}, "guidance_rescale must be at most 1, not 1.1."),
                ("clip_skip of 4000 digits", {"clip_skip": 10**3999}, "clip_skip must be at most"),
                ("clip_skip 1000", {"clip_skip": 1000}, "clip_skip must be"),
                ("clip_skip -1", {"clip_skip": -1}, "clip_skip must be at least 0, not -1."),
                ("denoising_end 0", {"denoising_end": 0}, "denoising_end must be more than 0"),
                ("denoising_end 2", {"denoising_end": 2}, "denoising_end must be at most 1, not 2."),
                (
                    "an unknown scheduler",
                    {"scheduler": "Eular"},
                    "There is no scheduler 'Eular' (did you mean 'Euler'?)",
                ),
                ("a scheduler like no other", {"scheduler": "zzz"}, "There is no scheduler 'zzz'; there are Euler,"),
                ("too few steps for it", {"scheduler": "PNDM"}, "The scheduler PNDM cannot do 1 step;"),
                ("too many steps for it", {"scheduler": "LCM", "num_inference_steps": 150}, "LCM cannot do 150 steps"),
                ("a scheduler a number", {"scheduler": 1}, "scheduler must be text, not 1."),
                ("a scheduler by module", {"scheduler": "os.system"}, "There is no scheduler 'os.system'"),
                ("a scheduler without end", {"scheduler": "x" * 100_000}, "There is no scheduler 'xxx"),
                ("a BMP", {"output_format": "bmp"}, "output_format must be one of png, jpeg, webp, not 'bmp'."),
                ("a format a number", {"output_format": 1}, "output_format must be text, not 1."),
                (
                    "an unknown name",
                    {"guidance": 5},
                    "There is no parameter 'guidance' (did you mean 'guidance_scale'?)",
                ),
                ("steps by a short name", {"steps": 5}, "'steps' (did you mean 'num_inference_steps'?)."),
                ("a size in one", {"size": "64x64"}, "'size' (did you mean 'height' and 'width'?)."),
                ("strength without image", {"strength": 0.5}, "strength needs the input image."),
                ("a strength of 2", {"strength": 2}, "strength must be at most 1, not 2."),
                ("two spacings", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas"),
                ("a spacing as text", {"use_karras_sigmas": "yes"}, "must be true or false, not 'yes'."),
                (
                    "a spacing that DDIM lacks",
                    {"use_karras_sigmas": True, "scheduler": "DDIM"},
                    "DDIM has no use_karras",
                ),
                ("an unknown spacing", {"timestep_spacing": "cubic"}, "must be one of linspace, leading, trailing"),
                ("a list as parameter", {"timesteps": "999,500"}, "timesteps is a list; give it as an input"),
                ("eta 2", {"eta": 2}, "eta must be at most 1, not 2."),
                ("a score of 11", {"aesthetic_score": 11}, "aesthetic_score must be at most 10, not 11."),
                ("a limit of 0", {"denoising_limit": 0}, "denoising_limit must be more than 0"),
                ("a limit by its alias, twice", {"denoising_limit": 0.5, "high_noise_frac": 0.5}, "is given twice"),
                ("a parameter of FLUX", {"true_cfg_scale": 2}, "This model does not take true_cfg_scale"),
                ("adapters that are not there", {"loras": "style:0.5"}, "does not take loras; no adapter is loaded"),
                ("an adapter's scale in words", {"loras": "style:much"}, "the scale in 'style:much' is not a number."),
                ("an adapter twice", {"loras": "a,a:2"}, "loras names an adapter twice."),
                ("an adapter without name", {"loras": ":0.5"}, "loras must be names such as"),
                ("a hundred adapters", {"loras": ",".join(map(str, range(100)))}, "at most 16 adapters"),
                ("adapters without end", {"loras": "x," * 10_000}, "at most 4096 characters"),
                ("a name like no other", {"zzz": 5}, "There is no parameter 'zzz'."),
                ("an empty name", {"": 5}, "There is no parameter ''."),
                ("a pair as parameter", {"original_size": "[64, 64]"}, "original_size is a pair; give it as an input"),
                ("a negative timeout", {"timeout": -1}, "timeout must be a whole number of microseconds."),
                ("a timeout text", {"timeout": "1s"}, "timeout must be a whole number of microseconds."),
                ("a timeout of 2 to the 63rd", {"timeout": 2**63}, "timeout must be a whole number of microseconds."),
                ("a sequence", {"sequence_id": 1}, "There is no parameter 'sequence_id'"),
            ]
        ),
    )
    def test_outside_their_bounds_are_refused(self, client: httpx.Client, values: dict[str, Any], says: str) -> None:
        refused(infer(client, parameters(**values)), 400, says)

    @pytest.mark.parametrize("name", ["guidance_scale", "seed", "width", "timeout"])
    def test_that_overflow_to_infinity_are_refused(self, client: httpx.Client, name: str) -> None:
        raw = GOOD[:-2] + f', "{name}": 1e999}}}}'.encode() if name not in SMALL else None
        content = raw or json.dumps(parameters(**{name: 0})).replace(f'"{name}": 0', f'"{name}": 1e999').encode()
        refused(infer(client, content), 400, f"{name} must be")

    @pytest.mark.parametrize(
        ("content", "says"),
        ids(
            [
                (
                    "a pair of one",
                    message(prompt(), tensor("target_size", 64)),
                    "shape must be [2] or [n, 2], not [1].",
                ),
                ("a pair of three", message(prompt(), tensor("target_size", 1, 2, 3)), "shape must be [2] or [n, 2]"),
                (
                    "a pair in three dimensions",
                    message(prompt(), tensor("target_size", 1, 2, shape=[1, 1, 2])),
                    "shape must be [2] or [n, 2]",
                ),
                ("a negative pair", message(prompt(), tensor("original_size", -1, 2)), "must be at least 0, not -1."),
                (
                    "a pair of 1e300",
                    message(prompt(), tensor("original_size", 1e300, 1, datatype="FP64")),
                    "original_size must be at most",
                ),
                (
                    "a pair of 2 to the 63rd",
                    message(prompt(), tensor("crops_coords_top_left", 2**63, 1, datatype="UINT64")),
                    "crops_coords_top_left must be at most",
                ),
                (
                    "a pair of halves",
                    message(prompt(), tensor("original_size", 0.5, 2, datatype="FP32")),
                    "must be a whole number, not 0.5.",
                ),
                (
                    "timesteps that rise",
                    message(prompt(), tensor("timesteps", 1, 2)),
                    "timesteps must fall from each number to the next.",
                ),
                (
                    "timesteps and steps",
                    message(prompt(), tensor("timesteps", 900, 400)),
                    "timesteps has 2 numbers, so leave num_inference_steps out.",
                ),
                (
                    "timesteps and sigmas",
                    message(prompt(), tensor("timesteps", 900), tensor("sigmas", 14.6, datatype="FP32")),
                    "Give timesteps or sigmas, not both.",
                ),
                (
                    "timesteps that DDIM does not take",
                    message(prompt(), tensor("timesteps", 900), parameters={**SMALL, "scheduler": "DDIM"}),
                    "takes no timesteps of one's own",
                ),
                (
                    "half a timestep",
                    message(prompt(), tensor("timesteps", 900.5, datatype="FP32")),
                    "timesteps must be whole numbers.",
                ),
                (
                    "a timestep of 1e300",
                    message(prompt(), tensor("timesteps", 1e300, datatype="FP64")),
                    "timesteps must be at most 1000",
                ),
                (
                    "a thousand and one sigmas",
                    message(prompt(), tensor("sigmas", *range(1001, 0, -1))),
                    "sigmas must be 1 to 1000 numbers",
                ),
                (
                    "152 sigmas",
                    message(prompt(), tensor("sigmas", *range(152, 0, -1)), parameters={}),
                    "at most 151 numbers, not 152",
                ),
                (
                    "a list in three dimensions",
                    message(prompt(), tensor("sigmas", 1, shape=[1, 1, 1])),
                    "shape must be [k] or [n, k], not [1, 1, 1].",
                ),
                (
                    "adapters in two elements",
                    message(prompt(), tensor("loras", "a", "b", datatype="BYTES")),
                    "Several adapters for one prompt go into one text, with commas.",
                ),
                (
                    "two formats",
                    message(prompt("a", "b"), tensor("output_format", "png", "webp", datatype="BYTES")),
                    "output_format must be the same for all prompts",
                ),
                (
                    "two sizes for one tensor of pixels",
                    message(
                        prompt("a", "b"),
                        tensor("width", 64, 128),
                        outputs=[{"name": "pixels"}],
                        parameters={"height": 64, "num_inference_steps": 1},
                    ),
                    "pictures of one size",
                ),
                (
                    "9 prompts with 2 images each",
                    message(prompt(*"abcdefghi"), parameters={"num_images_per_prompt": 2}),
                    "at most 16 images",
                ),
                (
                    "one prompt of two too large",
                    message(prompt("a", "b"), tensor("width", 64, 10**6), parameters={"height": 64}),
                    "width must be at most 2048",
                ),
            ]
        ),
    )
    def test_that_do_not_fit_together_are_refused(self, client: httpx.Client, content: Any, says: str) -> None:
        refused(infer(client, content), 400, says)

    @pytest.mark.parametrize(
        ("fields", "says"),
        ids(
            [
                (
                    "an unknown one",
                    {"outputs": [{"name": "imag"}]},
                    "There is no output 'imag' (did you mean 'image'?)",
                ),
                ("one twice", {"outputs": [{"name": "image"}, {"name": "image"}]}, "Output image is asked for twice."),
                (
                    "binary as text",
                    {"outputs": [{"name": "image", "parameters": {"binary_data": "yes"}}]},
                    "binary_data must be true or false, not 'yes'.",
                ),
                (
                    "classification",
                    {"outputs": [{"name": "image", "parameters": {"classification": 3}}]},
                    "'classification' is not a parameter of an output.",
                ),
                (
                    "all binary as a number",
                    {"parameters": {**SMALL, "binary_data_output": 1}},
                    "binary_data_output must be true or false, not 1.",
                ),
            ]
        ),
    )
    def test_of_outputs_that_cannot_be_given_are_refused(
        self, client: httpx.Client, fields: dict[str, Any], says: str
    ) -> None:
        refused(infer(client, message(**fields)), 400, says)


# --- Paths and methods -----------------------------------------------------------------------------------------


@contextmanager
def connected(server: Server) -> Iterator[http.client.HTTPConnection]:
    """A connection that sends paths as they are, dots and all."""
    connection = http.client.HTTPConnection(server.host, timeout=PATIENCE)
    try:
        yield connection
    finally:
        connection.close()


class TestPaths:
    @pytest.mark.parametrize(
        ("path", "says"),
        ids(
            [
                ("an unknown model", "/v2/models/other/infer", "There is no model 'other'; there is sdxl."),
                ("another case", "/v2/models/SDXL/infer", "There is no model 'SDXL'"),
                ("two dots", "/v2/models/../infer", "There is no model '..'"),
                ("the way up", "/v2/models/../../etc/passwd/infer", "There is nothing at"),
                ("encoded dots", "/v2/models/%2e%2e/infer", "There is no model '..'"),
                ("an encoded way up", "/v2/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd/infer", "There is nothing at"),
                ("NUL", "/v2/models/%00/infer", "There is no model"),
                ("the right name and NUL", "/v2/models/sdxl%00/infer", "There is no model"),
                ("line breaks", "/v2/models/a%0d%0aX-Evil:%201/infer", "There is no model"),
                ("no UTF-8", "/v2/models/%ff%fe/infer", "There is no model"),
                ("a smiling name", "/v2/models/%F0%9F%99%82/infer", "There is no model '🙂'"),
                ("300 letters", f"/v2/models/{'x' * 300}/infer", "There is no model 'xxx"),
                ("10000 letters", f"/v2/models/{'x' * 10_000}/infer", "There is no model 'xxx"),
                (
                    "an unknown version",
                    "/v2/models/sdxl/versions/2/infer",
                    "The model sdxl has no version '2'; it has 1.",
                ),
                ("version 01", "/v2/models/sdxl/versions/01/infer", "has no version '01'"),
                ("version latest", "/v2/models/sdxl/versions/latest/infer", "has no version 'latest'"),
                ("version two dots", "/v2/models/sdxl/versions/%2e%2e/infer", "has no version '..'"),
                ("a version of 10000 letters", f"/v2/models/sdxl/versions/{'9' * 10_000}/infer", "has no version '999"),
                ("an unknown path", "/v2/nothing", "There is nothing at /v2/nothing; see /docs for what there is."),
                ("an endless path", "/" + "x" * 10_000, "There is nothing at /xxx"),
                ("another protocol", "/v3/models/sdxl:predict", "There is nothing at /v3/models/sdxl:predict"),
                ("the model repository", "/v2/repository/index", "There is nothing at /v2/repository/index"),
                ("a load", "/v2/repository/models/sdxl/load", "There is nothing at"),
                ("an empty model", "/v2/models//infer", "There is nothing at"),
            ]
        ),
    )
    def test_that_lead_nowhere_are_told_so(self, server: Server, path: str, says: str) -> None:
        with connected(server) as connection:
            connection.request("POST", path, GOOD)
            answer = connection.getresponse()
            content = json.load(answer)
        assert answer.status == 404
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["X-Evil"] is None
        check_sentence(content, says)

    @pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/ready", "/v2/models/sdxl/versions/7"])
    def test_of_models_that_are_not_there_are_told_so(self, client: httpx.Client, path: str) -> None:
        refused(client.get(path), 404, "")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("GET", INFER, "POST"),
            ("PUT", INFER, "POST"),
            ("DELETE", INFER, "POST"),
            ("PATCH", "/v2/models/sdxl/versions/1/infer", "POST"),
            ("OPTIONS", INFER, "POST"),
            ("POST", "/v2", "GET"),
            ("POST", "/v2/health/live", "GET"),
            ("POST", "/v2/health/ready", "GET"),
            ("DELETE", "/v2/models/sdxl", "GET"),
            ("POST", "/v2/models/sdxl/ready", "GET"),
            ("POST", "/metrics", "GET"),
            ("TRACE", "/v2", "GET"),
        ],
    )
    def test_asked_by_the_wrong_method_say_which_is_allowed(
        self, client: httpx.Client, method: str, path: str, allowed: str
    ) -> None:
        answer = client.request(method, path)
        refused(answer, 405, f"{method} is not allowed at {path}.")
        names = answer.headers["allow"].split(", ")
        assert allowed in names
        assert ("GET" in names) == ("HEAD" in names)

    @pytest.mark.parametrize(
        "path", ["/", "/v2", "/v2/health/ready", "/v2/models/sdxl", "/metrics", "/docs", "/nothing"]
    )
    def test_asked_for_their_head_alone_have_what_they_have_otherwise(self, client: httpx.Client, path: str) -> None:
        whole, head_alone = client.get(path), client.head(path)
        assert head_alone.status_code == whole.status_code
        assert head_alone.headers["content-type"] == whole.headers["content-type"]
        assert not head_alone.content
        # What follows on the same connection is not taken for a body.
        assert client.get("/v2/health/live").json() == {"live": True}

    def test_with_a_slash_at_the_end_lead_where_they_would_without(self, client: httpx.Client) -> None:
        assert client.get("/v2/").json() == client.get("/v2").json()
        assert client.get("/v2/models/sdxl/").json()["name"] == "sdxl"


# --- Large bodies ----------------------------------------------------------------------------------------------


class TestLargeBodies:
    def test_of_exactly_the_limit_are_read(self, client: httpx.Client, picture: bytes) -> None:
        answer = infer(client, GOOD + b" " * (LIMIT - len(GOOD)))
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["outputs"][0]["data"][0]) == picture

    def test_that_declare_too_much_are_refused_before_they_are_sent(self, server: Server) -> None:
        for length in (LIMIT + 1, 10**12, 10**19):
            started = time.monotonic()
            with connected(server) as connection:
                connection.putrequest("POST", INFER)
                connection.putheader("Content-Length", str(length))
                connection.endheaders()
                answer = connection.getresponse()
                check_sentence(json.load(answer), f"more than {LIMIT} bytes (the server's setting max_body_size).")
            assert answer.status == 413
            assert time.monotonic() - started < PROMPTLY

    def test_get_their_answer_where_the_client_looks_for_one_only_in_the_end(self, server: Server) -> None:
        before = peak_memory(server)
        with connected(server) as connection:
            connection.request("POST", INFER, bytes(3 * LIMIT))
            answer = connection.getresponse()
            check_sentence(json.load(answer), f"more than {LIMIT} bytes")
            assert answer.status == 413
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().status == 200
        assert peak_memory(server) - before < 200e6

    def test_are_not_sent_by_a_client_that_asks_first(self, server: Server) -> None:
        with connect(server) as connection:
            connection.sendall(head(3 * LIMIT, "Expect: 100-continue"))
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 413
            check_sentence(json.load(answer), f"more than {LIMIT} bytes")

    def test_that_are_sent_nevertheless_get_the_same_answer(self, server: Server) -> None:
        before = peak_memory(server)
        for _ in range(3):
            answer = httpx.post(f"{server.url}{INFER}", content=bytes(3 * LIMIT), timeout=PATIENCE)
            assert answer.status_code == 413
            check_sentence(answer.json(), f"more than {LIMIT} bytes")
        assert peak_memory(server) - before < 200e6

    def test_that_come_in_chunks_are_refused_when_they_pass_the_limit(self, server: Server) -> None:
        before = peak_memory(server)
        for _ in range(3):
            chunks = (bytes(2**20) for _ in range(96))
            answer = httpx.post(f"{server.url}{INFER}", content=chunks, timeout=PATIENCE)
            assert answer.status_code == 413
            check_sentence(answer.json(), f"more than {LIMIT} bytes")
        assert peak_memory(server) - before < 200e6


# --- Sockets ---------------------------------------------------------------------------------------------------


def head(length: int, *lines: str) -> bytes:
    return "\r\n".join([f"POST {INFER} HTTP/1.1", "Host: x", f"Content-Length: {length}", *lines, "", ""]).encode()


def connect(server: Server) -> socket.socket:
    name, port = server.host.split(":")
    return socket.create_connection((name, int(port)), timeout=PATIENCE)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer after which the server closes the connection."""
    raw = b""
    while part := connection.recv(65536):
        raw += part
    first, _, rest = raw.partition(b"\r\n")
    lines, _, content = rest.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines.decode().split("\r\n"))
    return int(first.split()[1]), headers, json.loads(content)


class TestClientsThatLeave:
    def test_with_half_a_body_leave_nothing_behind(self, server: Server) -> None:
        for part in (b"", GOOD[:1], GOOD[: len(GOOD) // 2], GOOD[:-1]):
            with connect(server) as connection:
                connection.sendall(head(len(GOOD)) + part)
        for part in (b"", b"5\r\n", b"5\r\nabc", b"3\r\nabc\r\n"):
            with connect(server) as connection:
                connection.sendall(head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + part)
        time.sleep(1)

    def test_with_half_a_header_leave_nothing_behind(self, server: Server) -> None:
        for part in (b"", b"POST", head(5)[:-2], b"\r\n\r\n"):
            with connect(server) as connection:
                connection.sendall(part)
        time.sleep(1)

    @pytest.mark.parametrize(
        "content",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v2\0 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + b"X-Many: x\r\n" * 20_000 + b"\r\n",
        ],
        ids=[
            "tls",
            "http2",
            "http9",
            "nul",
            "negative-length",
            "two-lengths",
            "bad-chunk",
            "long-header",
            "many-headers",
        ],
    )
    def test_after_talking_nonsense_leave_nothing_behind(self, server: Server, content: bytes) -> None:
        with connect(server) as connection:
            connection.settimeout(2)
            try:
                connection.sendall(content)
                assert not connection.recv(65536).startswith(b"HTTP/1.1 5")
            except (TimeoutError, ConnectionError):
                pass

    @pytest.mark.parametrize("content", [b"GARBAGE\r\n\r\n", b"GET /v2 HTTP/1.1\r\n\r\n"], ids=["garbage", "no-host"])
    def test_of_no_http_are_told_so_as_everybody_is(self, server: Server, content: bytes) -> None:
        with connect(server) as connection:
            connection.sendall(content)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ") and b"application/json" in head and b"onnection: close" in head
        assert json.loads(body) == {"error": "This is no HTTP request that can be understood."}

    def test_or_speak_http_in_an_unusual_way_are_understood(self, server: Server) -> None:
        ask = b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: %b\r\n\r\n"
        whole = ask.replace(b"/v2", b"http://x:8080/v2/?a=/b") % b"close"
        bare = ask.replace(b"/v2", b"HTTP://x") % b"close"
        for parts in ([b"\r\n", ask % b"close"], [b"\r\n" + whole], [bare], [whole]):
            with connect(server) as connection:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(0.05)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200 "), (parts, answer)
        with connect(server) as connection:
            body = b'{"prompt":'  # no JSON, so that its answer comes at once
            connection.sendall(b"\r\n\r\n" + head(len(body)) + body + b"\r\n" + ask % b"keep-alive" + b"\n")
            connection.sendall(b"\r\n" + ask % b"close" + b"\r\n")
            answers = b"".join(iter(lambda: connection.recv(65536), b"")).split(b"HTTP/1.1 ")[1:]
            assert [int(answer[:3]) for answer in answers] == [400, 200, 200], answers

    def test_after_their_answer_is_out_end_without_a_trace(self, server: Server) -> None:
        with connect(server) as connection:
            connection.sendall(b"POST /v2/models/no/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 404 ")
            connection.sendall(b"no length of a chunk\r\n")
            answer += b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.count(b"HTTP/1.1") == 1

    @pytest.mark.parametrize("part", [b"x" * 1_000_000, b"X-Many: x\r\n" * 100_000], ids=["one", "many"])
    def test_or_never_end_their_headers_are_cut_off_before_memory_fills(self, server: Server, part: bytes) -> None:
        before = peak_memory(server)
        with connect(server) as connection:
            connection.settimeout(PROMPTLY)
            with pytest.raises(ConnectionError):
                connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Long: ")
                for _ in range(100):
                    connection.sendall(part)
        assert peak_memory(server) - before < 50e6

    def test_in_the_middle_of_a_generation_end_it(self, server: Server) -> None:
        cancelled, steps = server.metric("sdxl_cancelled_total"), server.metric("sdxl_steps_total")
        content = json.dumps(parameters(width=512, height=512, num_inference_steps=150)).encode()
        with connect(server) as connection:
            connection.sendall(head(len(content)) + content)
            until(lambda: server.metric("sdxl_steps_total") > steps, "no step was taken")
            assert server.metric("sdxl_running_images") == 1
        until(lambda: server.metric("sdxl_cancelled_total") == cancelled + 1, "it was not cancelled")
        until(lambda: unfinished_images(server) == 0, "its place was not given back")
        assert server.metric("sdxl_steps_total") - steps < 150

    def test_of_which_there_are_many_end_only_their_own_generations(self, server: Server, client: httpx.Client) -> None:
        cancelled = server.metric("sdxl_cancelled_total")
        content = json.dumps(parameters(width=128, height=128, num_inference_steps=50)).encode()
        connections = [connect(server) for _ in range(20)]  # more than fit in one batch, so that some still wait
        for connection in connections:
            connection.sendall(head(len(content)) + content)
        until(lambda: unfinished_images(server) == 20, "they were not all accepted")
        for connection in connections:
            connection.close()
        assert paint(client).startswith(b"\x89PNG")
        until(lambda: server.metric("sdxl_cancelled_total") == cancelled + 20, "not all were cancelled")


# --- Keys and slow bodies: a server of their own ---------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_server(start_server: Callable[..., Server]) -> Server:
    return start_server("--body_timeout", "1", env={"API_KEY": KEY})


@pytest.fixture(scope="module")
def outsider(locked_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked_server.url, timeout=PATIENCE) as connection:
        yield connection


class TestKeys:
    def test_are_wanted_on_every_route_but_health(self, outsider: httpx.Client) -> None:
        routes = outsider.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()["paths"]
        assert INFER.replace("sdxl", "{model_name}") in routes
        paths = [path.format(model_name="sdxl", model_version="1", request_id="my-circle") for path in routes]
        paths += ["/openapi.json", "/docs", "/docs/", "/docs/files/swagger-ui.css", "/", "/nothing", "/metrics/", "//"]
        for path in paths:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                answer = outsider.request(method, path)
                if path.startswith("/v2/health/") or path in ("/", "//"):
                    assert answer.status_code == (200 if method in ("GET", "HEAD") else 405), (method, path)
                    continue
                assert answer.status_code == 401, (method, path)
                challenge = answer.headers["www-authenticate"]
                if method in ("GET", "HEAD") and path.startswith(("/docs", "/openapi.json")):
                    assert challenge == 'Bearer, Basic realm="the key is the password", charset="UTF-8"'
                else:
                    assert challenge == "Bearer", "a browser would send a password wherever another site likes"
                if method != "HEAD":
                    check_sentence(answer.json(), "Send the server's key as 'Authorization: Bearer KEY'.")

    @pytest.mark.parametrize(
        "value",
        [
            "",
            "Bearer",
            KEY,
            f"Basic {KEY}",
            f"Basic {base64.b64encode(KEY.encode()).decode()}",
            f"Basic {base64.b64encode(f':{KEY}'.encode()).decode()}",
            f"Bearer {KEY[:-1]}",
            f"Bearer {KEY}x",
            f"Bearer {KEY.upper()}",
            f"Bearer {KEY} {KEY}",
            f"Bearer {KEY}, Bearer {KEY}",
            f"Bearer{KEY}",
            f"Bearer {'x' * 10_000}",
            "Bearer \xff",
        ],
        ids=lambda value: value.replace(KEY, "KEY").encode("ascii", "replace").decode()[:30] or "empty",
    )
    def test_that_are_wrong_are_refused(self, outsider: httpx.Client, value: str) -> None:
        headers = {b"Authorization": value.encode("latin-1")}
        refused(outsider.post(INFER, content=GOOD, headers=headers), 401, "Send the server's key")

    def test_are_a_password_for_browsers_that_open_the_page(self, outsider: httpx.Client) -> None:
        for path in ("/docs", "/docs/", "/docs/files/swagger-ui.css", "/openapi.json"):
            for user in ("", "somebody"):
                assert outsider.get(path, auth=(user, KEY)).status_code == 200
            for wrong in (httpx.BasicAuth(KEY, ""), httpx.BasicAuth("", KEY + "x")):
                assert outsider.get(path, auth=wrong).status_code == 401
            for value in ("Basic", "Basic :", f"Basic :{KEY}", "Basic ä", "Basic a"):
                refused(outsider.get(path, headers={b"Authorization": value.encode()}), 401, "Send the server's key")
        assert outsider.get("/metrics", auth=("", KEY)).status_code == 401

    def test_that_are_right_are_accepted_however_the_scheme_is_written(
        self, outsider: httpx.Client, picture: bytes
    ) -> None:
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert paint(outsider, Authorization=f"{scheme} {KEY}") == picture

    @pytest.mark.parametrize(
        ("target", "headers"),
        [
            (INFER, {"Host": "evil/v2/health/live?"}),
            (INFER, {"Host": "x/v2/health/live#"}),
            (INFER, {"X-Original-URL": "/v2/health/live"}),
            (INFER, {"X-Rewrite-URL": "/v2/health/live"}),
            (INFER, {"X-Forwarded-Prefix": "/v2/health/live", "X-Forwarded-For": "127.0.0.1"}),
            (INFER + "?/v2/health/live", {}),
            (INFER + "#/v2/health/live", {}),
            (INFER + ";/v2/health/live", {}),
            ("/v2/health/live/../../models/sdxl/infer", {}),
            ("/v2/health/live/%2e%2e/%2e%2e/models/sdxl/infer", {}),
            ("/v2/health/live%2f..%2f..%2fmodels%2fsdxl%2finfer", {}),
            ("/v2/health/live%3f/../../models/sdxl/infer", {}),
            ("//v2/health/live", {}),
            ("http://x" + INFER, {}),
        ],
    )
    def test_are_wanted_whatever_host_and_path_pretend(
        self, locked_server: Server, target: str, headers: dict[str, str]
    ) -> None:
        with connected(locked_server) as connection:
            connection.putrequest("POST", target, skip_host="Host" in headers)
            for name, value in {**headers, "Content-Length": str(len(GOOD))}.items():
                connection.putheader(name, value)
            connection.endheaders(GOOD)
            answer = connection.getresponse()
            content = json.load(answer)
        assert answer.status == 401
        check_sentence(content, "Send the server's key")

    def test_open_nothing_but_health_to_a_request_with_a_whole_address(self, locked_server: Server) -> None:
        for target, statuses in (("http://x/v2/health/live", (401, 405)), (f"http://x{INFER}", (401,))):
            with connected(locked_server) as connection:
                connection.request("POST", target, GOOD)
                assert connection.getresponse().status in statuses

    def test_never_appear_in_the_log(self, locked_server: Server) -> None:
        assert KEY not in locked_server.log()
        assert "Traceback" not in locked_server.log()


class TestSlowBodies:
    def test_get_408_when_their_time_is_up(self, locked_server: Server) -> None:
        for part in (b"", GOOD[:20]):
            started = time.monotonic()
            with connect(locked_server) as connection:
                connection.sendall(head(len(GOOD), f"Authorization: Bearer {KEY}") + part)
                status, headers, content = read_answer(connection)
            assert status == 408
            assert headers["connection"] == "close"
            check_sentence(content, "The body did not arrive within 1 seconds.")
            assert 1 <= time.monotonic() - started < 1 + PROMPTLY

    def test_get_408_although_they_keep_dripping(self, locked_server: Server) -> None:
        with connect(locked_server) as connection:
            connection.sendall(head(len(GOOD), f"Authorization: Bearer {KEY}"))
            started = time.monotonic()
            try:
                for byte in GOOD[:100]:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.1)
            except ConnectionError:
                pass
            status, _, content = read_answer(connection)
            assert time.monotonic() - started < 10 + PROMPTLY
        assert status == 408
        check_sentence(content, "The body did not arrive within 1 seconds.")

    def test_leave_room_for_others(self, locked_server: Server, outsider: httpx.Client, picture: bytes) -> None:
        connections = [connect(locked_server) for _ in range(50)]
        for connection in connections:
            connection.sendall(head(len(GOOD), f"Authorization: Bearer {KEY}"))
        assert paint(outsider, Authorization=f"Bearer {KEY}") == picture
        for connection in connections:
            connection.close()
        assert "Traceback" not in locked_server.log()
