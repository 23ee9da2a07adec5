"""Models by name and what state they are in. Every transport reaches the engine through here, and only through here."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from app.engine.batcher import Batcher
from app.engine.family import Family
from app.engine.idempotency import Once
from app.engine.queue import RequestStatus
from app.engine.ticket import Listener, Ticket
from app.errors import InvalidRequest, ModelNotFound, ModelNotReady, RequestNotFound, ShuttingDown
from app.generation import DEFAULT_PRIORITY, GenerateRequest, Limits, Pixels, PreviewWish
from app.images import decode_images, resize
from app.parameters import check_combinations, check_limits, for_each, of_prompt
from app.sentences import describe


class State(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "shutting down"


class Model:
    """One served model: its name, its versions, and the batcher that runs it.

    Args:
        name: as in URLs.
        version: the only one there is.
        batcher: not yet started.
        limits: how much one request may ask for.
        request_timeout: seconds, unless a request sets a shorter time.
    """

    def __init__(
        self,
        name: str,
        version: str,
        batcher: Batcher,
        limits: Limits,
        request_timeout: float,
    ) -> None:
        self.name = name
        self.version = version
        self.limits = limits
        self._batcher = batcher
        self._request_timeout = request_timeout
        self._closing = False
        self.phase = ""
        """What loading is at, such as ``reading unet (1.2 of 5.1 GB)``; set by whoever loads."""

    def close(self, grace: float) -> None:
        """Take no more requests and end the device thread; see `Batcher.close`. A second call does nothing."""
        if not self._closing:
            self._closing = True
            self._batcher.close(grace)

    def hurry(self) -> None:
        """Have `close` wait no longer."""
        self._batcher.hurry()

    @property
    def state(self) -> State:
        if self._closing:
            return State.STOPPING
        if not self._batcher.ready.done():
            return State.LOADING
        if self._batcher.ready.exception() is not None or not self._batcher.alive:
            return State.FAILED
        return State.READY

    @property
    def condition(self) -> str:
        """The state, and how far loading has come, as it can stand in a sentence."""
        state = self.state
        return f"{state}: {self.phase}" if state is State.LOADING and self.phase else str(state)

    @property
    def family(self) -> Family[Any] | None:
        """The loaded model, which knows its own defaults; ``None`` until it is ready."""
        return self._batcher.ready.result() if self.state is State.READY else None

    @property
    def live(self) -> bool:
        """False once the device thread has gone: only a restart helps then."""
        return not self._batcher.ready.done() or self._batcher.alive or self._closing

    def require_ready(self) -> None:
        """
        Raises:
            ModelNotReady: loading, or failed.
            ShuttingDown: it takes no more requests.
        """
        if self.state is State.STOPPING:
            raise ShuttingDown
        if self.state is not State.READY:
            raise ModelNotReady(f"The model {self.name} is {self.condition}; try again when it is ready.")

    def resolve(self, requests: Sequence[GenerateRequest]) -> tuple[GenerateRequest, ...]:
        """Fill in defaults, check limits, and draw the seeds that nobody chose.

        Args:
            requests: one for each prompt.

        Raises:
            InvalidRequest: it cannot be served as it is.
            ModelNotReady: still loading.
        """
        self.require_ready()
        family = self._batcher.ready.result()
        # Sizes and counts first: what follows does work for each request.
        check_limits(requests, self.limits)
        for_each(requests, lambda request: check_combinations(request, family.parameters))
        resolved = for_each(self._read_images(requests), family.resolve)
        check_limits(resolved, self.limits)
        return tuple(
            request if request.seed is not None else replace(request, seed=secrets.randbelow(2**32))
            for request in _resize_images(resolved)
        )

    def _read_images(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """Unpack the input images; one that serves several prompts is unpacked once.

        Raises:
            InvalidRequest: one cannot be read; it says whose, unless it serves every prompt.
        """
        named = [(("image", request.image), ("mask_image", request.mask_image)) for request in requests]
        unique = list(dict.fromkeys((name, file) for pair in named for name, file in pair if file is not None))
        read: dict[tuple[str, Pixels | bytes], Pixels] = {}
        try:
            for picture in decode_images(unique, self.limits.max_input_pixels):
                read[unique[len(read)]] = picture
        except InvalidRequest as error:
            has_it = [unique[len(read)] in pair for pair in named]
            if all(has_it):
                raise
            raise of_prompt(has_it.index(True) + 1, len(requests), error) from None
        return [
            replace(
                request,
                image=request.image and read["image", request.image],
                mask_image=request.mask_image and read["mask_image", request.mask_image],
            )
            for request in requests
        ]

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        timeout: float | None = None,
        listener: Listener | None = None,
        *,
        priority: int | None = None,
        preview: PreviewWish | None = None,
        once: Once | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Accept work.

        Args:
            requests: resolved.
            timeout: seconds that the caller is willing to wait; the server's own bound holds besides.
            listener: hears of its progress, on whatever thread made it.
            priority: 1 comes first, 9 last.
            preview: which previews the listener wants.
            once: makes it the same request as an earlier one, whose ticket is joined.
            request_id: by which it can be asked about and cancelled.

        Raises:
            Overloaded: no place in the queue, or a deadline would be missed.
            DeadlineExceeded: the deadline cannot be met, by the estimate.
            KeyReused: the idempotency key came with another request.
            Unavailable: no more work is taken.
        """
        bound = self._request_timeout if timeout is None else min(timeout, self._request_timeout)
        return self._batcher.submit(
            requests,
            bound,
            listener,
            priority=DEFAULT_PRIORITY if priority is None else priority,
            preview=preview,
            once=once,
            request_id=request_id,
        )

    def status(self, request_id: str) -> RequestStatus:
        """How a request is.

        Raises:
            RequestNotFound: none of that id runs here, and none did lately.
        """
        return self._batcher.status(request_id)

    def cancel(self, request_id: str) -> RequestStatus:
        """End a request, whoever waits for it.

        Raises:
            RequestNotFound: none of that id runs here, and none did lately.
        """
        return self._batcher.cancel(request_id)


class Repository:
    """The models of one server, by name."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str, version: str | None = None) -> Model:
        """The model of that name, ready or not.

        Raises:
            ModelNotFound: no such model, or not in that version.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(f"There is no model {describe(name)}; there is {', '.join(self._models)}.")
        if version is not None and version != model.version:
            raise ModelNotFound(f"The model {model.name} has no version {describe(version)}; it has {model.version}.")
        return model

    def close(self, grace: float) -> None:
        """Close every model within `grace` seconds."""
        deadline = time.monotonic() + grace
        for model in self:
            model.close(max(0.0, deadline - time.monotonic()))

    def hurry(self) -> None:
        """Have `close` wait no longer."""
        for model in self:
            model.hurry()

    def status(self, request_id: str) -> RequestStatus:
        """How a request is, whichever model it is for.

        Raises:
            RequestNotFound: none of that id runs, and none did lately.
        """
        return self._ask(request_id, Model.status)

    def cancel(self, request_id: str) -> RequestStatus:
        """End a request, whoever waits for it.

        Raises:
            RequestNotFound: none of that id runs, and none did lately.
        """
        return self._ask(request_id, Model.cancel)

    def _ask(self, request_id: str, ask: Callable[[Model, str], RequestStatus]) -> RequestStatus:
        for model in self:
            try:
                return ask(model, request_id)
            except RequestNotFound as error:
                fault = error
        raise fault

    @property
    def live(self) -> bool:
        return all(model.live for model in self)

    @property
    def ready(self) -> bool:
        return all(model.state is State.READY for model in self)


def _resize_images(requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
    """Resolved requests with input images of their pictures' own size: they may wait long, and the device's thread has
    better to do. One that serves several is resized once."""
    known: dict[tuple[int, int, int], Pixels] = {}

    def resized(image: Pixels | bytes | None, request: GenerateRequest) -> Pixels | None:
        if image is None:
            return None
        assert isinstance(image, Pixels) and request.height and request.width
        key = (id(image), request.height, request.width)
        if key not in known:
            known[key] = resize(image, request.height, request.width)
        return known[key]

    return [
        replace(request, image=resized(request.image, request), mask_image=resized(request.mask_image, request))
        if request.image is not None
        else request
        for request in requests
    ]
