"""A client for Stable Diffusion XL over the Open Inference Protocol v2, blocking and asynchronous.

One file over httpx that knows nothing of the server's code, so it may be copied anywhere::

    with Client("http://localhost:8080") as client:
        client.generate("a red circle on a white background", seed=7).pictures[0].save("circle.png")

What is sent and how answers are read lives in functions and generators without I/O; `Client` and `AsyncClient` only
carry their calls to the server.

Source: KServe ``open-inference-protocol`` (REST) and Triton ``extension_binary_data.md``.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import time
import urllib.parse
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack

import httpx

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AsyncClient", "Client", "ClientError", "Parameters", "Picture", "Result", "ServerError", "UnreachableError"]

JSON_LENGTH = "Inference-Header-Content-Length"
CONNECT_TIMEOUT = 10.0
QUICK_TIMEOUT = httpx.Timeout(10.0)
"""For answers that need no model."""
POLL_INTERVAL = 0.5
LONGEST_BACKOFF = 30.0
TRY_AGAIN = frozenset({429, 503})
"""Statuses after which the same request may succeed later."""
UNAVAILABLE = frozenset({502, 503, 504})
"""Statuses by which a server, or a gateway in front of it, says that it is not ready."""
SUFFIXES = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}

T = TypeVar("T")


# --- What can go wrong -----------------------------------------------------------------------------------------


class ClientError(Exception):
    """Base of all; `str()` is one sentence for the person who reads it."""


class UnreachableError(ClientError):
    """Nobody answered: wrong address, connection refused or broken, time over."""


class ServerError(ClientError):
    """The server answered, but not with what was asked for.

    Args:
        status: of HTTP; 200 when the answer cannot be understood.
        message: the server's own sentence where it has one.
        retry_after: seconds after which to try again, where the server names them.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


# --- What goes in and comes out --------------------------------------------------------------------------------


class Parameters(TypedDict, total=False):
    """What shapes a picture besides its prompt; whatever is left out or ``None`` is the model's own choice.

    Sizes are pairs of height and width in pixels. Images are bytes of PNG, JPEG or WebP files. `seed` is that of the
    first picture of a prompt, the next has ``seed + 1``. The server judges every value and names the ones it refuses.
    """

    prompt_2: str | None
    negative_prompt: str | None
    negative_prompt_2: str | None
    height: int | None
    width: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    guidance_rescale: float | None
    true_cfg_scale: float | None
    image: bytes | None
    mask_image: bytes | None
    strength: float | None
    seed: int | None
    num_images_per_prompt: int | None
    clip_skip: int | None
    scheduler: str | None
    use_karras_sigmas: bool | None
    use_exponential_sigmas: bool | None
    use_beta_sigmas: bool | None
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int] | None
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int] | None
    negative_target_size: tuple[int, int] | None
    aesthetic_score: float | None
    negative_aesthetic_score: float | None
    denoising_limit: float | None
    denoising_end: float | None
    max_sequence_length: int | None
    loras: str | None
    output_format: Literal["png", "jpeg", "webp"] | None


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


# --- Writing ---------------------------------------------------------------------------------------------------


def write_request(
    prompt: str | Sequence[str], parameters: Mapping[str, object], binary: bool = True, request_id: str | None = None
) -> bytes:
    """The JSON body of an infer call.

    Args:
        prompt: one, or several to be painted together.
        parameters: as in `Parameters`; the server refuses others by name.
        binary: ask for raw bytes behind the JSON of the answer instead of base64 inside it.
        request_id: comes back with the answer.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    inputs: list[dict[str, Any]] = [{"name": "prompt", "shape": [len(prompts)], "datatype": "BYTES", "data": prompts}]
    scalars: dict[str, object] = {"binary_data_output": binary}
    for name, value in parameters.items():
        # Parameters of the protocol are scalars; everything else needs a tensor.
        if isinstance(value, tuple | list):
            datatype = "INT64" if all(isinstance(element, int) for element in value) else "FP64"
            inputs.append({"name": name, "shape": [len(value)], "datatype": datatype, "data": list(value)})
        elif isinstance(value, bytes):
            text = base64.b64encode(value).decode("ascii")
            inputs.append({"name": name, "shape": [1], "datatype": "BYTES", "data": [text]})
        elif value is not None:
            scalars[name] = value
    message: dict[str, Any] = {"inputs": inputs, "parameters": scalars}
    if request_id is not None:
        message["id"] = request_id
    return json.dumps(message).encode()


# --- Reading ---------------------------------------------------------------------------------------------------


class _MalformedError(Exception):
    """What is wrong with an answer, as the end of a sentence."""


def read_result(response: httpx.Response) -> Result:
    """The pictures of an answer to an infer call.

    Raises:
        ServerError: it is an error, or it does not follow the protocol.
    """
    _require_ok(response)
    try:
        return _parse_result(response.content, response.headers.get(JSON_LENGTH))
    except _MalformedError as error:
        raise _not_understood(response, error) from None


def read_object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        ServerError: it is an error, or no JSON object.
    """
    _require_ok(response)
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


def _require_ok(response: httpx.Response) -> None:
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


# --- Conversations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request to make."""

    method: Literal["GET", "POST"]
    path: str
    timeout: httpx.Timeout
    content: bytes = b""
    delay: float = 0.0
    """Seconds to wait before it."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For httpx's method ``request``."""
        headers = {"Content-Type": "application/json"} if self.content else {}
        return {
            "method": self.method,
            "url": self.path,
            "timeout": self.timeout,
            "content": self.content,
            "headers": headers,
        }


Conversation = Generator[Call, httpx.Response, T]
"""Yields calls, is sent their responses or thrown `UnreachableError`, and returns what the caller wanted to know."""


def converse_infer(call: Call, retries: int) -> Conversation[Result]:
    """Make `call`, and again up to `retries` times while the server is busy.

    The server says how long to wait; where it does not, the pauses double from one second on. A longer pause than the
    caller would wait for an answer is none that the caller wants.
    """
    patience = call.timeout.read or 0.0
    for attempt in range(retries):
        try:
            return read_result((yield call))
        except ServerError as error:
            pause = min(2.0**attempt, LONGEST_BACKOFF) if error.retry_after is None else error.retry_after
            if error.status not in TRY_AGAIN or pause > patience:
                raise
            call = replace(call, delay=pause)
    return read_result((yield call))


def converse_object(path: str) -> Conversation[dict[str, Any]]:
    """The JSON object at `path`."""
    return read_object((yield Call("GET", path, QUICK_TIMEOUT)))


def converse_health(path: str) -> Conversation[bool]:
    """Whether the answer at `path` is yes; no answer is a no."""
    try:
        response = yield Call("GET", path, QUICK_TIMEOUT)
    except UnreachableError:
        return False
    if response.status_code in UNAVAILABLE:
        return False
    _require_ok(response)
    return True


def converse_wait(path: str, timeout: float) -> Conversation[None]:
    """Ask at `path` until the answer is yes; after `timeout` seconds, raise what the last answer said."""
    deadline = time.monotonic() + timeout
    call = Call("GET", path, QUICK_TIMEOUT)
    while True:
        try:
            _require_ok((yield call))
        except ClientError as error:
            hopeless = isinstance(error, ServerError) and error.status not in UNAVAILABLE
            if hopeless or time.monotonic() + POLL_INTERVAL > deadline:
                raise
        else:
            return
        call = replace(call, delay=POLL_INTERVAL)


class _Endpoint:
    """One model on one server: everything that both clients share."""

    def __init__(
        self, url: str, model: str, api_key: str | None, timeout: float, *, binary: bool, retries: int
    ) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UnreachableError(f"{url!r} is no address of a server; it must be like http://localhost:8080.")
        self._place = f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"
        self._model_path = f"/v2/models/{urllib.parse.quote(model, safe='')}"
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
        self._binary = binary
        self._retries = retries
        self.http_options: dict[str, Any] = {"base_url": parsed}
        if api_key:
            self.http_options["headers"] = {"Authorization": f"Bearer {api_key.strip()}".encode()}

    def live(self) -> Conversation[bool]:
        return converse_health("/v2/health/live")

    def ready(self) -> Conversation[bool]:
        return converse_health(f"{self._model_path}/ready")

    def wait_until_ready(self, timeout: float) -> Conversation[None]:
        return converse_wait(f"{self._model_path}/ready", timeout)

    def server_metadata(self) -> Conversation[dict[str, Any]]:
        return converse_object("/v2")

    def metadata(self) -> Conversation[dict[str, Any]]:
        return converse_object(self._model_path)

    def generate(
        self, prompt: str | Sequence[str], parameters: Parameters, request_id: str | None
    ) -> Conversation[Result]:
        body = write_request(prompt, parameters, self._binary, request_id)
        return converse_infer(Call("POST", f"{self._model_path}/infer", self._timeout, body), self._retries)

    def unreachable(self, error: httpx.HTTPError, call: Call) -> UnreachableError:
        """What an error of httpx means for the person who called."""
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UnreachableError(f"No server can be reached at {self._place} ({reason}).")
        if isinstance(error, httpx.TimeoutException):
            return UnreachableError(f"The server at {self._place} did not answer within {call.timeout.read:g} seconds.")
        return UnreachableError(f"The connection to {self._place} broke before the answer was whole ({reason}).")


# --- The two clients -------------------------------------------------------------------------------------------


class Client:
    """A model on a server, for code that waits. One client may be shared by threads.

    Args:
        url: of the server, such as ``http://localhost:8080``.
        model: its name there.
        api_key: the server's key, where it wants one.
        timeout: seconds to wait for an answer.
        binary: let pictures travel as raw bytes; otherwise as base64 in JSON, a third larger.
        retries: how often to try again while the server is busy (429) or not ready (503), after as many seconds as
            it asks for, if that is no more than `timeout`.
        transport: httpx's way to the server, where it is not the usual one.

    Raises:
        UnreachableError: `url` is not the address of a server.
    """

    def __init__(
        self,
        url: str,
        model: str = "sdxl",
        api_key: str | None = None,
        timeout: float = 600.0,
        *,
        binary: bool = True,
        retries: int = 0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._endpoint = _Endpoint(url, model, api_key, timeout, binary=binary, retries=retries)
        self._http = httpx.Client(transport=transport, **self._endpoint.http_options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def live(self) -> bool:
        """Whether a server answers, and is in working order.

        Raises:
            ServerError: an answer that is neither yes nor no.
        """
        return self._run(self._endpoint.live())

    def ready(self) -> bool:
        """Whether a server answers, and has the model ready.

        Raises:
            ServerError: an answer that is neither yes nor no, such as that it has no such model.
        """
        return self._run(self._endpoint.ready())

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Return once the model is ready.

        Args:
            timeout: seconds.

        Raises:
            ServerError: it was not ready in time, or it never will be, such as a model that the server does not have.
            UnreachableError: no server answered in time.
        """
        self._run(self._endpoint.wait_until_ready(timeout))

    def server_metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server.

        Raises:
            ClientError: it could not be asked.
        """
        return self._run(self._endpoint.server_metadata())

    def metadata(self) -> dict[str, Any]:
        """Inputs and outputs of the model.

        Raises:
            ClientError: it could not be asked.
        """
        return self._run(self._endpoint.metadata())

    def generate(
        self, prompt: str | Sequence[str], *, request_id: str | None = None, **parameters: Unpack[Parameters]
    ) -> Result:
        """Paint pictures.

        Args:
            prompt: what they show; several prompts are painted together.
            request_id: comes back as the result's `id`.
            **parameters: see `Parameters`.

        Raises:
            ServerError: the server refused or failed, and says why.
            UnreachableError: no answer.
        """
        return self._run(self._endpoint.generate(prompt, parameters, request_id))

    def _run(self, conversation: Conversation[T]) -> T:
        try:
            call = next(conversation)
            while True:
                time.sleep(call.delay)
                try:
                    response = self._http.request(**call.arguments)
                except httpx.HTTPError as error:
                    call = conversation.throw(self._endpoint.unreachable(error, call))
                else:
                    call = conversation.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result


class AsyncClient:
    """A model on a server, for asyncio; otherwise like `Client`."""

    def __init__(
        self,
        url: str,
        model: str = "sdxl",
        api_key: str | None = None,
        timeout: float = 600.0,
        *,
        binary: bool = True,
        retries: int = 0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._endpoint = _Endpoint(url, model, api_key, timeout, binary=binary, retries=retries)
        self._http = httpx.AsyncClient(transport=transport, **self._endpoint.http_options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def live(self) -> bool:
        """See `Client.live`."""
        return await self._run(self._endpoint.live())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._run(self._endpoint.ready())

    async def wait_until_ready(self, timeout: float = 600.0) -> None:  # noqa: ASYNC109 (as `Client` has it)
        """See `Client.wait_until_ready`."""
        await self._run(self._endpoint.wait_until_ready(timeout))

    async def server_metadata(self) -> dict[str, Any]:
        """See `Client.server_metadata`."""
        return await self._run(self._endpoint.server_metadata())

    async def metadata(self) -> dict[str, Any]:
        """See `Client.metadata`."""
        return await self._run(self._endpoint.metadata())

    async def generate(
        self, prompt: str | Sequence[str], *, request_id: str | None = None, **parameters: Unpack[Parameters]
    ) -> Result:
        """See `Client.generate`."""
        return await self._run(self._endpoint.generate(prompt, parameters, request_id))

    async def _run(self, conversation: Conversation[T]) -> T:
        try:
            call = next(conversation)
            while True:
                await asyncio.sleep(call.delay)
                try:
                    response = await self._http.request(**call.arguments)
                except httpx.HTTPError as error:
                    call = conversation.throw(self._endpoint.unreachable(error, call))
                else:
                    call = conversation.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result
