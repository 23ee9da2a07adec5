"""One accepted request on its way: its images, its callers and how far it is. Knows no queue, no device, no clock."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import enum
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from app.engine.family import Job
from app.errors import Cancelled, RuntimeFault
from app.generation import (
    MAX_SEED,
    GeneratedImage,
    GenerateRequest,
    Generation,
    Pixels,
    Preview,
    PreviewWish,
    Progress,
    Timings,
)

logger = logging.getLogger(__name__)

Listener = Callable[[Progress | Preview], None]
"""Hears of a ticket's progress, on whatever thread made it; must not block."""

_numbers = itertools.count()


class Stage(enum.Enum):
    """Where an image is; only the queue moves it."""

    WAITING = "waiting"
    RUNNING = "running"


class Keeper(Protocol):
    """Who keeps tickets: the one place where they end."""

    def end(self, ticket: Ticket, fault: RuntimeFault | None) -> None:
        """Resolve a ticket; only the first call does anything."""

    def leave(self, ticket: Ticket, listener: Listener | None, request_id: str | None) -> None:
        """One caller waits no longer."""


@dataclass(slots=True, eq=False)
class Image:
    """One image of a ticket, from the queue to its last byte.

    Attributes:
        index: its number within the ticket.
        conditioning: what the text encoders said, until its job has begun.
        job: its state on the device, until it is decoded.
        steps: that it takes from start to end.
        left: when a device first left it to another one that has less to do.
        began: when it left the queue.
        rows: that it brings to its next forward pass, once its job has begun.
    """

    ticket: Ticket
    request: GenerateRequest
    index: int
    steps: int
    stage: Stage = Stage.WAITING
    conditioning: Any = None
    job: Job | None = None
    left: float = 0.0
    began: float = 0.0
    steps_done: int = 0
    rows: int = 0
    pixels: Pixels | None = None
    encoded: bytes | None = None

    @property
    def remaining(self) -> int:
        """Denoising steps that it still needs."""
        return self.steps - self.steps_done

    @property
    def size(self) -> int:
        """Pixels of its picture."""
        return (self.request.height or 0) * (self.request.width or 0)


@dataclass(eq=False, slots=True)
class Ticket:
    """One accepted request. Its `future` resolves exactly once: with a `Generation` or a `RuntimeFault`.

    Attributes:
        steps: that each picture takes, one number for each of the requests.
        request_ids: of the HTTP requests that wait for it.
        accepted: when, on the batcher's clock, as all its times.
        deadline: when it is given up.
        keeper: who ends it.
        preview: which previews its listeners want.
        due: by when it should be done; who is due first goes first.
        foreseen: seconds that it was to take when it was accepted, and what others add who were let in since.
        waiters: callers that wait for it.
        over: it has ended; its images get no further step.
        images: until it has ended.
        place: in the queue, as last told to the listeners.
        pace: seconds for one more of its steps, lately.
    """

    requests: Sequence[GenerateRequest]
    steps: Sequence[int]
    accepted: float
    deadline: float
    keeper: Keeper
    preview: PreviewWish | None = None
    due: float = 0.0
    foreseen: float = 0.0
    number: int = field(default_factory=_numbers.__next__)
    request_ids: list[str] = field(default_factory=list)
    listeners: list[Listener] = field(default_factory=list)
    waiters: int = 1
    over: bool = False
    place: int = 0
    pace: float = 0.0
    last_step: float = 0.0
    warnings: dict[str, None] = field(default_factory=dict)
    lossy: dict[str, None] = field(default_factory=dict)
    seconds: collections.defaultdict[str, float] = field(default_factory=lambda: collections.defaultdict(float))
    future: concurrent.futures.Future[Generation] = field(default_factory=concurrent.futures.Future)
    images: list[Image] = field(init=False)

    def __post_init__(self) -> None:
        # From here on nobody can cancel the future behind our back; `cancel` is the way.
        self.future.set_running_or_notify_cancel()
        pictures = [
            (replace(request, seed=((request.seed or 0) + i) % (MAX_SEED + 1), num_images_per_prompt=1), steps)
            for request, steps in zip(self.requests, self.steps, strict=True)
            for i in range(request.num_images_per_prompt)
        ]
        self.images = [Image(self, request, index, steps) for index, (request, steps) in enumerate(pictures)]

    def cancel(self) -> None:
        """Take no further step for this request, whoever waits for it. Does nothing when it is over already."""
        self.fail(Cancelled("The request was cancelled."))

    def fail(self, fault: RuntimeFault) -> None:
        self.keeper.end(self, fault)

    def leave(self, listener: Listener | None = None, request_id: str | None = None) -> None:
        """One caller waits no longer; with the last one the request is cancelled, unless it is over.

        Args:
            listener: the caller's, which hears no more.
            request_id: the caller's, by which the others' request can be asked about and cancelled no more.
        """
        self.keeper.leave(self, listener, request_id)

    @property
    def known_as(self) -> str:
        """The id of the first HTTP request for it, for the log."""
        return next(iter(self.request_ids), "-")

    @property
    def waiting(self) -> bool:
        """None of its images has begun."""
        return all(image.stage is Stage.WAITING for image in self.images)

    @property
    def steps_done(self) -> int:
        return sum(image.steps_done for image in self.images)

    @property
    def steps_total(self) -> int:
        requests = zip(self.requests, self.steps, strict=True)
        return sum(steps * request.num_images_per_prompt for request, steps in requests)

    def drop_inputs(self) -> None:
        """Let go of the input images, once all pictures are painted: the answer needs none, and may be kept."""
        self.requests = [replace(request, image=None, mask_image=None) for request in self.requests]

    def stepped(self, steps: int, now: float) -> None:
        """Note that its images took so many steps together in one forward pass."""
        if self.last_step:
            seconds = (now - self.last_step) / steps
            self.pace += (seconds - self.pace) * (0.3 if self.pace else 1.0)
        self.last_step = now

    def tell(self, news: Progress | Preview) -> None:
        for listener in tuple(self.listeners):
            self.tell_one(listener, news)

    def tell_one(self, listener: Listener, news: Progress | Preview) -> None:
        try:
            listener(news)
        except Exception:  # a listener's mistake is not the device's
            logger.exception("a listener failed")
            with contextlib.suppress(ValueError):  # the request may have ended meanwhile, and with it all listening
                self.listeners.remove(listener)

    def progress(self, seconds: float | None) -> Progress:
        return Progress(self.steps_done, self.steps_total, self.place, seconds)

    def generation(self) -> Generation:
        originals = [request for request in self.requests for _ in range(request.num_images_per_prompt)]
        timings = Timings(*(self.seconds[stage] for stage in ("queue", "denoise", "decode", "encode")))
        images = [
            GeneratedImage(original, image.request.seed or 0, image.pixels, image.encoded)
            for original, image in zip(originals, self.images, strict=True)
            if image.pixels is not None and image.encoded is not None
        ]
        return Generation(tuple(images), timings, tuple(self.warnings), tuple(self.lossy))
