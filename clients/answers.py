"""Answers of the Open Inference Protocol v2, from bytes to pictures, seeds and errors; functions without I/O.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from clients.errors import ServerError

if TYPE_CHECKING:
    from PIL.Image import Image

JSON_LENGTH = "Inference-Header-Content-Length"
SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as an encoded file, and the seed that paints it again."""

    data: bytes
    seed: int
    media_type: str

    @property
    def suffix(self) -> str:
        """How the name of its file should end, such as ``.png``."""
        return SUFFIXES.get(self.media_type, ".bin")

    @property
    def image(self) -> Image:
        """The decoded picture; needs Pillow."""
        from PIL import Image

        return Image.open(io.BytesIO(self.data))

    def save(self, path: str | Path) -> Path:
        """Write the file, over one that may be there.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        path.write_bytes(self.data)
        return path


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one call.

    Attributes:
        pictures: in the order of the prompts, all pictures of the first one first.
        parameters: what the model chose for the caller, and the seconds spent in each stage.
        id: of the request, where the caller gave one.
    """

    pictures: list[Picture]
    parameters: dict[str, Any]
    id: str | None


# --- Reading ---------------------------------------------------------------------------------------------------


class _MalformedError(Exception):
    """What is wrong with an answer, as the end of a sentence."""


def read_result(response: httpx.Response) -> Result:
    """The pictures of an answer to an infer call.

    Raises:
        ServerError: it is an error, or it does not follow the protocol.
    """
    require_ok(response)
    try:
        return _parse_result(response.content, response.headers.get(JSON_LENGTH))
    except _MalformedError as error:
        raise _not_understood(response, error) from None


def read_object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        ServerError: it is an error, or no JSON object.
    """
    require_ok(response)
    try:
        return _parse_object(response.content)
    except _MalformedError as error:
        raise _not_understood(response, error) from None


def read_error(response: httpx.Response) -> ServerError:
    """The error that an answer stands for: the server's sentence, or what the status says where it has none."""
    status = response.status_code
    try:
        sentence = _parse_object(response.content).get("error")
    except _MalformedError:
        sentence = None
    if not isinstance(sentence, str) or not sentence:
        status_line = f"{status} {httpx.codes.get_reason_phrase(status)}".rstrip()
        sentence = f"The answer is {status_line} without a reason; is this the address of the server?"
    retry_after = response.headers.get("Retry-After", "")
    # Its other form, a date, says nothing that the client's own pace does not cover.
    seconds = float(retry_after) if re.fullmatch(r"[0-9]{1,9}", retry_after) else None
    return ServerError(status, sentence, seconds)


def require_ok(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise read_error(response)


def _not_understood(response: httpx.Response, error: _MalformedError) -> ServerError:
    return ServerError(response.status_code, f"The server's answer cannot be understood: {error}.")


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise _MalformedError("it is not JSON") from None
    if not isinstance(document, dict):
        raise _MalformedError("it is not a JSON object")
    return document


def _parse_result(body: bytes, json_length: str | None) -> Result:
    head, tail = _split(body, json_length)
    message = _parse_object(head)
    parameters = message.get("parameters", {})
    if not isinstance(parameters, dict):
        raise _MalformedError("its parameters are not a JSON object")
    tensors = _parse_outputs(message.get("outputs"), tail)
    if "image" not in tensors or "seed" not in tensors:
        raise _MalformedError("it lacks the output image or seed")
    images = _parse_images(tensors["image"])
    seeds = _parse_seeds(tensors["seed"])
    if not images or len(images) != len(seeds):
        raise _MalformedError(f"it has {len(images)} pictures and {len(seeds)} seeds")
    media_type = str(parameters.get("content_type", "application/octet-stream"))
    pictures = [Picture(data, seed, media_type) for data, seed in zip(images, seeds, strict=True)]
    identifier = message.get("id")
    return Result(pictures, parameters, identifier if isinstance(identifier, str) else None)


def _split(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not re.fullmatch(r"[0-9]{1,18}", json_length) or int(json_length) > len(body):
        raise _MalformedError(f"its header {JSON_LENGTH} is {json_length[:40]!r}, but it has {len(body)} bytes")
    return body[: int(json_length)], body[int(json_length) :]


def _parse_outputs(outputs: object, tail: bytes) -> dict[str, bytes | list[Any]]:
    """Each output's elements by its name: the bytes of a binary one, otherwise its list."""
    if not isinstance(outputs, list):
        raise _MalformedError("it has no outputs")
    tensors: dict[str, bytes | list[Any]] = {}
    for output in outputs:
        match output:
            case {"name": str(name), "parameters": {"binary_data_size": int(size)}}:
                if not 0 <= size <= len(tail):
                    raise _MalformedError(f"{size} bytes of {name} are announced, but {len(tail)} came")
                tensors[name], tail = tail[:size], tail[size:]
            case {"name": str(name), "data": list(data)}:
                tensors[name] = data
            case _:
                raise _MalformedError("an output has no name or no data")
    if tail:
        raise _MalformedError(f"{len(tail)} bytes follow the last output")
    return tensors


def _parse_images(data: bytes | list[Any]) -> list[bytes]:
    if isinstance(data, list):
        try:
            return [base64.b64decode(element, validate=True) for element in data]
        except (TypeError, ValueError):
            raise _MalformedError("an image is not base64") from None
    images = []
    position = 0
    while position < len(data):
        start = position + 4
        # Short of 4 bytes, this reads a length that `data` cannot hold either.
        position = start + int.from_bytes(data[position:start], "little")
        if position > len(data):
            raise _MalformedError("an image is cut off")
        images.append(data[start:position])
    return images


def _parse_seeds(data: bytes | list[Any]) -> list[int]:
    if isinstance(data, bytes):
        if len(data) % 8:
            raise _MalformedError("a seed is cut off")
        return list(struct.unpack(f"<{len(data) // 8}q", data))
    if not all(type(element) is int for element in data):
        raise _MalformedError("a seed is not a whole number")
    return data
