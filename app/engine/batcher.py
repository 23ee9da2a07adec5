"""Admission, queue and the step loop: one thread that owns the device, and the tickets of those who wait for it.

Works on any `Family` and knows no model and no HTTP. The word scheduler stays with the noise schedulers of diffusion.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.engine.family import Family, Job
from app.errors import Cancelled, DeadlineExceeded, GenerationFailed, Overloaded, RuntimeFault, ShuttingDown
from app.generation import MAX_SEED, GeneratedImage, GenerateRequest, Generation, Pixels, Progress, Timings
from app.images import encode_image
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

Listener = Callable[[Progress], None]
DEVICE_THREAD = "device"


class Ticket:
    """One accepted request. Its `future` resolves exactly once: with a `Generation` or a `GenerationFailed`.

    Args:
        requests: resolved, with seeds.
        deadline: on `time.monotonic`'s clock.
        listener: called on the device thread after each step of one of the ticket's images; must not block.
    """

    def __init__(self, requests: Sequence[GenerateRequest], deadline: float, listener: Listener | None) -> None:
        self.future: concurrent.futures.Future[Generation] = concurrent.futures.Future()
        # From here on nobody can cancel the future behind our back; `cancel` is the way.
        self.future.set_running_or_notify_cancel()
        self.accepted = time.monotonic()
        self.deadline = deadline
        self.images = [
            Image(self, replace(request, seed=((request.seed or 0) + i) % (MAX_SEED + 1), num_images_per_prompt=1))
            for request in requests
            for i in range(request.num_images_per_prompt)
        ]
        self._originals = [request for request in requests for _ in range(request.num_images_per_prompt)]
        self._listener = listener
        self._fault: RuntimeFault | None = None
        self._wake: Callable[[], None] = lambda: None
        self.warnings: dict[str, None] = {}
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def cancel(self) -> None:
        """Take no further step for this request. Does nothing when it is over already."""
        self.fail(Cancelled("The request was cancelled."))

    def fail(self, fault: RuntimeFault) -> None:
        """Have the device thread end this request before its next step."""
        self._fault = self._fault or fault
        self._wake()

    def fault(self, now: float) -> RuntimeFault | None:
        """Why this ticket should not go on, if so."""
        if self._fault is not None:
            return self._fault
        if now >= self.deadline:
            waited = now - self.accepted
            return DeadlineExceeded(f"The request was not done after {waited:.1f} seconds and was given up.")
        return None

    def report(self) -> None:
        if self._listener is not None:
            done = sum(image.job.step_index if image.job else 0 for image in self.images)
            total = sum(image.steps for image in self.images)
            self._listener(Progress(done, total))

    def generation(self) -> Generation:
        seconds = self.seconds
        timings = Timings(seconds["queue"], seconds["denoise"], seconds["decode"], seconds["encode"])
        images = [
            GeneratedImage(original, image.request.seed or 0, image.pixels, image.encoded)
            for original, image in zip(self._originals, self.images, strict=True)
            if image.pixels is not None and image.encoded is not None
        ]
        return Generation(tuple(images), timings, tuple(self.warnings))


@dataclass(slots=True, eq=False)
class Image:
    """One image of a ticket, from the queue to its last byte."""

    ticket: Ticket
    request: GenerateRequest
    job: Job | None = None
    began: float = 0.0
    pixels: Pixels | None = None
    encoded: bytes | None = None

    @property
    def steps(self) -> int:
        return self.job.num_steps if self.job else self.request.num_inference_steps or 0


@dataclass(slots=True)
class StepCost:
    """Seconds that one image takes for one step, as measured here lately."""

    seconds: float = 0.0
    samples: int = field(default=0)

    def observe(self, seconds: float) -> None:
        self.samples += 1
        weight = max(0.05, 1 / self.samples)
        self.seconds += weight * (seconds - self.seconds)


class Batcher:
    """The queue in front of one device, and the thread that owns it.

    Args:
        load: makes the family; called once, on the device thread.
        telemetry: where counts and seconds go.
        max_queue: images accepted at the same time.
        max_batch_size: images in one forward pass.
        encode_threads: threads that encode finished pixels.
        embed_metadata: PNG text chunks.
        warm_up: run one short generation before `ready`.
    """

    def __init__(
        self,
        load: Callable[[], Family[Any]],
        telemetry: Telemetry,
        *,
        max_queue: int,
        max_batch_size: int,
        encode_threads: int,
        embed_metadata: bool,
        warm_up: bool,
    ) -> None:
        self._load = load
        self._telemetry = telemetry
        self._max_queue = max_queue
        self._max_batch_size = max_batch_size
        self._embed_metadata = embed_metadata
        self._warm_up = warm_up
        self.ready: concurrent.futures.Future[Family[Any]] = concurrent.futures.Future()
        """The loaded family, or why there is none."""
        self._cost = StepCost()

        self._condition = threading.Condition()
        self._open_tickets: set[Ticket] = set()  # guarded by the condition, as are the next three
        self._waiting: collections.deque[Image] = collections.deque()
        self._places_taken = 0
        self._closing = False
        self._running: list[Image] = []  # the device thread's own

        self._encoders = concurrent.futures.ThreadPoolExecutor(encode_threads, thread_name_prefix="encode")
        self._thread = threading.Thread(target=self._main, name=DEVICE_THREAD, daemon=True)

    # --- What callers use --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the device thread is there; once it is gone, nothing will ever be answered."""
        return self._thread.is_alive()

    def submit(self, requests: Sequence[GenerateRequest], timeout: float, listener: Listener | None = None) -> Ticket:
        """Take a place for each image of `requests`.

        Args:
            requests: resolved, with seeds.
            timeout: seconds until the request is given up.
            listener: hears of every step; see `Ticket`.

        Raises:
            Overloaded: no place is free.
            ShuttingDown: the batcher is closing, or its thread is gone.
        """
        ticket = Ticket(requests, time.monotonic() + timeout, listener)
        ticket._wake = self._notify
        with self._condition:
            if self._closing or not self.alive:
                raise ShuttingDown("The server is shutting down and takes no more requests.")
            if self._places_taken + len(ticket.images) > self._max_queue:
                wait = self._estimate()
                raise Overloaded(
                    f"The queue is full ({self._places_taken} of {self._max_queue} images); try again in "
                    f"{wait:.0f} seconds.",
                    wait,
                )
            self._places_taken += len(ticket.images)
            self._open_tickets.add(ticket)
            self._waiting.extend(ticket.images)
            self._telemetry.pending.inc(len(ticket.images))
            self._condition.notify()
        return ticket

    def close(self, grace: float) -> None:
        """Take no more requests, wait `grace` seconds for the accepted ones, cancel the rest and end the thread."""
        deadline = time.monotonic() + grace
        with self._condition:
            self._closing = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._open_tickets or not self.alive, grace)
            for ticket in self._open_tickets:
                ticket.cancel()
        if self.ready.done():  # a thread that still loads cannot be told to stop
            self._thread.join(max(5.0, deadline - time.monotonic()))
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def _notify(self) -> None:
        with self._condition:
            self._condition.notify()

    def _estimate(self) -> float:
        """Seconds until what is accepted now will be done."""
        steps = sum(
            image.steps - (image.job.step_index if image.job else 0)
            for ticket in self._open_tickets
            for image in ticket.images
        )
        return min(max(1.0, steps * self._cost.seconds), 600.0)

    # --- The device thread -------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            family = self._load()
            if self._warm_up:
                self._run_once(family)
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(family)
        try:
            while self._wait_for_work():
                self._drop_faulty()
                self._admit(family)
                self._step(family, self._pick(family))
                self._finish_denoised(family)
        except BaseException:
            logger.critical("the device thread ended", exc_info=True)
        finally:
            for ticket in list(self._open_tickets):
                self._end(ticket, GenerationFailed("The device thread ended before the request was done."))

    def _run_once(self, family: Family[Any]) -> None:
        """One step of one image, so that nobody's first request pays for first times."""
        request = family.resolve(GenerateRequest(prompt="", seed=0, num_inference_steps=1))
        job = family.begin(request, family.encode(request))
        while not job.done:
            family.step([job])
        family.decode([job])

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; ``False`` when it is time to end."""
        with self._condition:
            while not (self._waiting or self._running or any(ticket._fault for ticket in self._open_tickets)):
                if self._closing and not self._open_tickets:
                    return False
                self._condition.wait()
            return True

    def _drop_faulty(self) -> None:
        """Forget cancelled and expired tickets before another step is taken for them."""
        now = time.monotonic()
        for ticket in list(self._open_tickets):
            fault = ticket.fault(now)
            if fault is not None:
                self._end(ticket, fault)

    def _admit(self, family: Family[Any]) -> None:
        """Begin waiting images, in order of arrival, while there is room for them in a forward pass."""
        while len(self._running) < self._max_batch_size:
            with self._condition:
                if not self._waiting:
                    return
                image = self._waiting.popleft()
            self._telemetry.pending.dec()
            self._telemetry.running.inc()
            image.began = time.monotonic()
            self._running.append(image)
            self._telemetry.queue_wait.observe(image.began - image.ticket.accepted)
            image.ticket.seconds.setdefault("queue", image.began - image.ticket.accepted)
            try:
                image.job = self._begin(family, image.request)
                image.ticket.warnings.update(dict.fromkeys(family.warnings(image.request)))
            except Exception as error:
                self._end(image.ticket, _as_fault(error))

    def _begin(self, family: Family[Any], request: GenerateRequest) -> Job:
        started = time.monotonic()
        conditioning = family.encode(request)
        self._telemetry.stage("text_encode", time.monotonic() - started)
        job: Job = family.begin(request, conditioning)
        return job

    def _pick(self, family: Family[Any]) -> list[Image]:
        """The images for the next forward pass: all that may share it with the one that came first."""
        unfinished = [image for image in self._running if image.job and not image.job.done]
        if not unfinished:
            return []
        turn = family.signature(unfinished[0].job)
        return [image for image in unfinished if family.signature(image.job) == turn]

    def _step(self, family: Family[Any], images: Sequence[Image]) -> None:
        if not images:
            return
        started = time.monotonic()
        try:
            family.step([image.job for image in images])
        except Exception as error:
            for ticket in {image.ticket for image in images}:
                self._end(ticket, _as_fault(error))
            return
        seconds = time.monotonic() - started
        self._cost.observe(seconds / len(images))
        self._telemetry.stage("denoise_step", seconds)
        self._telemetry.rows.observe(len(images))
        self._telemetry.steps.inc(len(images))
        for ticket in {image.ticket for image in images}:
            ticket.report()

    def _finish_denoised(self, family: Family[Any]) -> None:
        """Decode what has all its steps and hand it to the encoders.

        One image at a time: a VAE fills the device with one, and memory stays bounded.
        """
        for image in [image for image in self._running if image.job and image.job.done]:
            if image not in self._running:
                continue  # a sibling's decode failed, and with it the ticket
            self._running.remove(image)
            ticket = image.ticket
            started = time.monotonic()
            ticket.seconds["denoise"] = max(ticket.seconds["denoise"], started - image.began)
            try:
                pixels = family.decode([image.job])[0]
            except Exception as error:
                self._telemetry.running.dec()
                self._end(ticket, _as_fault(error))
                continue
            seconds = time.monotonic() - started
            ticket.seconds["decode"] += seconds
            self._telemetry.stage("decode", seconds)
            image.pixels = Pixels(pixels.tobytes(), pixels.shape[0], pixels.shape[1])
            self._encoders.submit(self._encode, image)

    # --- The encoder threads -----------------------------------------------------------------------------------

    def _encode(self, image: Image) -> None:
        ticket = image.ticket
        try:
            assert image.pixels is not None and image.request.seed is not None
            started = time.monotonic()
            encoded = encode_image(image.pixels, image.request, image.request.seed, self._embed_metadata)
            seconds = time.monotonic() - started
            self._telemetry.stage("encode", seconds)
            with self._condition:
                ticket.seconds["encode"] += seconds
                image.encoded = encoded
                last = all(other.encoded is not None for other in ticket.images)
            if last:
                self._end(ticket, None)
        except Exception as error:
            ticket.fail(_as_fault(error))
        finally:
            self._telemetry.running.dec()

    # --- The end of a ticket, in one place ---------------------------------------------------------------------

    def _end(self, ticket: Ticket, fault: RuntimeFault | None) -> None:
        """Resolve `ticket` and give its places back; only the first call for a ticket does anything."""
        with self._condition:
            if ticket not in self._open_tickets:
                return
            self._open_tickets.remove(ticket)
            self._places_taken -= len(ticket.images)
            still_waiting = [image for image in self._waiting if image.ticket is ticket]
            for image in still_waiting:
                self._waiting.remove(image)
            self._telemetry.pending.dec(len(still_waiting))
            self._condition.notify_all()
        if fault is not None:
            # Faults end on the device thread, which owns this list; images at the encoders have left it.
            kept = [image for image in self._running if image.ticket is not ticket]
            self._telemetry.running.dec(len(self._running) - len(kept))
            self._running[:] = kept
        if fault is None:
            self._telemetry.images.inc(len(ticket.images))
            ticket.future.set_result(ticket.generation())
            return
        if isinstance(fault, Cancelled):
            self._telemetry.cancelled.inc()
        else:
            self._telemetry.failed(fault.code)
        ticket.future.set_exception(fault)


def _as_fault(error: Exception) -> RuntimeFault:
    """What a family raised, as one of ours; anything unforeseen is logged with its traceback, once, here."""
    if isinstance(error, RuntimeFault):
        return error
    logger.error("a generation failed", exc_info=error)
    return GenerationFailed(
        f"The generation failed inside the model ({type(error).__name__}); the server's log says more."
    )
