"""A client for Stable Diffusion XL over the Open Inference Protocol v2, blocking and asynchronous.

It needs httpx, the command line tqdm too, and nothing here the server's code, so the folder may be copied anywhere::

    with Client("http://localhost:8080") as client:
        client.generate("a red circle on a white background", seed=7).pictures[0].save("circle.png")

What is asked and answered lives in `conversations.py`, without I/O; `Client` and `AsyncClient` only carry its calls to
the server. Bodies are written in `inputs.py` and read in `answers.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
import urllib.parse
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from clients.answers import Picture, Result
from clients.conversations import Call, Conversation, converse_health, converse_infer, converse_object, converse_wait
from clients.errors import ClientError, ServerError, UnreachableError
from clients.events import MEDIA_TYPE, OnStep, StreamReader
from clients.inputs import Parameters, write_request

__all__ = ["AsyncClient", "Client", "ClientError", "Parameters", "Picture", "Result", "ServerError", "UnreachableError"]

CONNECT_TIMEOUT = 10.0
LARGEST_PORT = 65_535

T = TypeVar("T")


def parse_url(url: str) -> httpx.URL:
    """The address of a server.

    Raises:
        UnreachableError: there can be no server at it.
    """
    try:
        parsed = httpx.URL(url)
        parsed.raw_host.decode("ascii").encode("idna")  # as sockets do; some names fit no resolver
    except (httpx.InvalidURL, UnicodeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.raw_host or (parsed.port or 0) > LARGEST_PORT:
        raise UnreachableError(f"{url!r} is no address of a server; it must be like http://localhost:8080.")
    return parsed


class _Endpoint:
    """One model on one server: everything that both clients share."""

    def __init__(
        self, url: str, model: str, api_key: str | None, timeout: float, *, binary: bool, retries: int
    ) -> None:
        parsed = parse_url(url)
        self._place = f"{parsed.scheme}://{parsed.netloc.decode('ascii')}"
        self._model_path = f"/v2/models/{urllib.parse.quote(model, safe='')}"
        self._timeout = httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
        self._binary = binary
        self._retries = retries
        self.has_answered = False
        self.http_options: dict[str, Any] = {"base_url": parsed}
        if api_key and not api_key.strip().isprintable():
            raise ClientError("The API key has characters that no header can hold, such as a line break.")
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
        self, prompt: str | Sequence[str], parameters: Parameters, request_id: str | None, on_step: OnStep | None
    ) -> Conversation[Result]:
        # Events are text, so a stream's pictures are too.
        body, json_length = write_request(prompt, parameters, self._binary and on_step is None, request_id)
        verb = "infer" if on_step is None else "infer_stream"
        path = f"{self._model_path}/{verb}"
        call = Call("POST", path, self._timeout, body, json_length, on_step=on_step, request_id=request_id)
        return converse_infer(call, self._retries)

    def unreachable(self, error: httpx.HTTPError, call: Call) -> UnreachableError:
        """What an error of httpx means for the person who called."""
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            sentence = f"No server can be reached at {self._place} ({reason})."
            return UnreachableError(sentence, restarting=self.has_answered)
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
            it asks for, if that is no more than `timeout`; and while a server that has answered before takes no
            connection, as it does while it restarts.
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
        self,
        prompt: str | Sequence[str],
        *,
        request_id: str | None = None,
        on_step: OnStep | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """Paint pictures.

        Args:
            prompt: what they show; several prompts are painted together.
            request_id: comes back as the result's `id`; by it the request stands in the server's log, and can be asked
                about and cancelled there.
            on_step: called after each denoising step with the steps done and the steps that there are.
            **parameters: see `Parameters`.

        Raises:
            ClientError: an image cannot be read, or a parameter cannot be sent.
            ServerError: the server refused or failed, and says why.
            UnreachableError: no answer.
        """
        return self._run(self._endpoint.generate(prompt, parameters, request_id, on_step))

    def _run(self, conversation: Conversation[T]) -> T:
        try:
            call = next(conversation)
            while True:
                time.sleep(call.delay)
                try:
                    response = self._request(call)
                except httpx.HTTPError as error:
                    call = conversation.throw(self._endpoint.unreachable(error, call))
                else:
                    self._endpoint.has_answered = True
                    call = conversation.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _request(self, call: Call) -> httpx.Response:
        """The response, read to its end."""
        if call.on_step is None:
            return self._http.request(**call.arguments)
        with self._http.stream(**call.arguments) as response:
            if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
                response.read()
                return response
            reader = StreamReader(call.on_step, call.timeout.read or math.inf)
            for data in response.iter_bytes():
                reader.feed(data)
            return reader.finish()


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
        self,
        prompt: str | Sequence[str],
        *,
        request_id: str | None = None,
        on_step: OnStep | None = None,
        **parameters: Unpack[Parameters],
    ) -> Result:
        """See `Client.generate`."""
        # Files are read and pictures encoded where nobody waits for it.
        conversation = await asyncio.to_thread(self._endpoint.generate, prompt, parameters, request_id, on_step)
        return await self._run(conversation)

    async def _run(self, conversation: Conversation[T]) -> T:
        try:
            call = next(conversation)
            while True:
                await asyncio.sleep(call.delay)
                try:
                    response = await self._request(call)
                except httpx.HTTPError as error:
                    call = conversation.throw(self._endpoint.unreachable(error, call))
                else:
                    self._endpoint.has_answered = True
                    call = conversation.send(response)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _request(self, call: Call) -> httpx.Response:
        """The response, read to its end."""
        if call.on_step is None:
            return await self._http.request(**call.arguments)
        async with self._http.stream(**call.arguments) as response:
            if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
                await response.aread()
                return response
            reader = StreamReader(call.on_step, call.timeout.read or math.inf)
            async for data in response.aiter_bytes():
                reader.feed(data)
            return reader.finish()
