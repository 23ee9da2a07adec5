"""The loop that owns one device: between any two of its turns, images join and leave.

One thread calls it and everything of its family. Knows no HTTP, and not how requests come into the queue.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from app.engine import admission, policy
from app.engine.attempts import Attempts, Operation
from app.engine.costs import Costs
from app.engine.family import Family
from app.engine.memory import Budget
from app.engine.queue import Queue
from app.engine.ticket import Image, Ticket
from app.errors import ModelLoadFailed, OutOfMemory
from app.generation import GenerateRequest, Pixels, PreviewKind
from app.start import Timeline
from app.telemetry import Telemetry

LET_IN_SECONDS = 0.1
"""For images to join between two passes, or as long as a pass takes: prompts may be many and long, and whoever is being
denoised, or comes meanwhile and is more urgent, should not wait for all of them."""
WARM_STEPS = 2
"""With a refiner, one for each part."""
SLOW_FIRST_STEP = 5.0
"""Seconds of a first step after which nobody wants to wait for a second one that only measures."""


class Finisher(Protocol):
    """What happens to pixels, on other threads."""

    def finish(self, image: Image) -> None:
        """Encode a whole picture and end its ticket with the last one."""

    def show(self, image: Image, pixels: Pixels) -> bool:
        """Encode a preview and tell the listeners; ``False`` where too many wait for that already."""


class Worker:
    """One device and its family.

    Args:
        load: makes the family; called once, on the thread that calls all the rest.
        queue: where images come from.
        costs: what is measured here.
        telemetry: where counts and seconds go.
        finisher: where pixels go.
        most_rows: of one forward pass.
        most_load: pixels times rows of one forward pass.
        step_timeout: seconds beyond what is usual after which the device counts as hung.
        clock: seconds that only grow.
        timeline: of the start, on which `load` has noted what it did.
    """

    def __init__(
        self,
        load: Callable[[], Family[Any]],
        queue: Queue,
        costs: Costs,
        telemetry: Telemetry,
        finisher: Finisher,
        *,
        most_rows: int,
        most_load: float,
        step_timeout: float,
        clock: Callable[[], float],
        timeline: Timeline | None = None,
    ) -> None:
        self._load = load
        self._queue = queue
        self._costs = costs
        self._telemetry = telemetry
        self._finisher = finisher
        self._most_rows = most_rows
        self._clock = clock
        self._timeline = timeline or Timeline()
        self.family: Family[Any]
        self.peers: Sequence[Worker] = ()
        """Other workers on the same queue."""
        self.running: list[Image] = []
        """Images that have left the queue and have no pixels yet; only this worker's thread changes it."""
        self._attempts = Attempts(costs, telemetry, most_load, step_timeout, clock)
        self._turn: Hashable = None
        self._pass_seconds = 0.0
        self._decode_retries = 0
        self._unexpected_shapes = 0

    # --- Loading -----------------------------------------------------------------------------------------------

    def load(self, warm_up: bool) -> None:
        """Load the family, and with `warm_up` paint once, so that nobody's first request pays for first times.

        Raises:
            ModelLoadFailed: besides what `load` raises, the device has too little memory for that picture.
        """
        self.family = self._load()
        self._attempts.decode_budget = Budget(min(self.family.decode_load, self._attempts.step_budget.most))
        if warm_up:
            with self._timeline.phase("warm_up"):
                request = self.family.rehearsal(GenerateRequest(prompt="", seed=0, num_inference_steps=WARM_STEPS))
                request = self.family.resolve(request)
                try:
                    self._paint_once(request)
                except OutOfMemory:
                    raise ModelLoadFailed(
                        f"The device has too little memory for a picture of {request.height} x {request.width}, which "
                        "the server paints before it is ready; take --device enable_model_cpu_offload, another --dtype "
                        "or --quantization fp8, or for smaller pictures alone --warm_up false."
                    ) from None

    def _paint_once(self, request: GenerateRequest) -> None:
        steps = self.family.steps(request)
        image = Image(Ticket([request], [steps], 0.0, 0.0, self._queue), request, 0, steps)
        for _ in range(2):  # only the second time tells what a step takes
            job = self.family.begin(request, self.family.encode(request))
            image.rows = self.family.rows(job)
            started = self._clock()
            while not job.done:
                self.family.step([job])
            self.family.catch_up()
            seconds = (self._clock() - started) / job.num_steps
            if seconds > SLOW_FIRST_STEP:
                break
        self._pass_seconds = seconds
        self._costs.stepped([image], seconds)
        started = self._clock()
        try:
            self.family.decode([job])
        except OutOfMemory:
            # As for requests.
            self.family.decode([job], tiled=True)
        self._costs.decoded([image], self._clock() - started)

    # --- The loop ----------------------------------------------------------------------------------------------

    def wait_for_work(self) -> bool:
        """Sleep while there is nothing to do; ``False`` when it is time to end."""
        queue = self._queue
        with queue.condition:
            while not queue.broken:
                if self.running or queue.waiting:
                    return True
                if queue.closing and not queue.tickets:
                    return False
                queue.condition.wait()
        return False

    def turn(self) -> None:
        """One forward pass, and what comes before and after it.

        Raises:
            DeviceLost: nothing will work any more.
        """
        self._forget_over()
        self._let_join()
        self._queue.tell_places()
        self._step()
        self._decode()
        self._count()

    def _forget_over(self) -> None:
        """Let go of what was cancelled, failed or late, before another step is taken for it."""
        self._queue.end_late()
        for image in self.running:
            if image.ticket.over:
                image.job = image.conditioning = None
        self.running[:] = [image for image in self.running if not image.ticket.over]

    # --- Joining -----------------------------------------------------------------------------------------------

    def _let_join(self) -> None:
        if not self.family.interleaves:
            if not self.running:
                self._join(list(self._take()))
            return
        started = self._clock()
        for image in self._take():
            self._join([image])
            if self._clock() - started > max(LET_IN_SECONDS, self._pass_seconds):
                return

    def _take(self) -> Iterator[Image]:
        while image := self._queue.take(functools.partial(self._may_begin, self._spare())):
            self.running.append(image)
            yield image

    def _join(self, images: Sequence[Image]) -> None:
        self._attempts.go("text_encode", images, self._encode, lambda image: image.conditioning is not None)
        for image in images:
            self._attempts.go("begin", [image], self._begin, lambda image: image.job is not None)
        self._forget_over()

    def _may_begin(self, spare: float, image: Image) -> bool:
        """Whether there is room for one more, and no peer should have it.

        There is for a whole pass of each size, so that every turn finds company. Beyond that there is for whoever the
        next pass would take along: one that fits rows which are too few for those before it, or a more urgent one; what
        that takes the turn from waits with its latents.
        """
        interleaves = self.family.interleaves
        same = [other for other in self.running if other.remaining and (other.size == image.size or not interleaves)]
        if sum(map(self._costs.rows, same)) >= self._most_rows:
            ordered = sorted([*same, image], key=policy.urgency)
            most_load = self._attempts.step_budget.now
            if image not in policy.fill(ordered, self._costs.rows, self._most_rows, most_load):
                return False
        return self._work(image) <= spare or self._left_for_long(image)

    def _spare(self) -> float:
        """The work that it may take in: any, unless a peer has less, to which it leaves what exceeds its own share."""
        own, others = self.work_left, [peer.work_left for peer in self.peers]
        if own <= min(others, default=own):
            return math.inf
        waiting = sum(map(self._work, list(self._queue.waiting)))
        return (own + sum(others) + waiting) / (1 + len(others)) - own

    def _left_for_long(self, image: Image) -> bool:
        """Whether it was left to the peers for a while and none has come: it may be full, in a long decode, or hang."""
        now = self._clock()
        image.left = image.left or now
        return now - image.left >= max(LET_IN_SECONDS, self._pass_seconds)

    @property
    def work_left(self) -> int:
        """Pixels times rows times steps that it still has to do."""
        return sum(map(self._work, list(self.running)))

    def _work(self, image: Image) -> int:
        return image.remaining * self._costs.rows(image) * image.size

    def _encode(self, images: Sequence[Image]) -> None:
        conditionings = self.family.encode_all([image.request for image in images])
        for image, conditioning in zip(images, conditionings, strict=True):
            image.conditioning = conditioning

    def _begin(self, images: Sequence[Image]) -> None:
        for image in images:
            image.job = self.family.begin(image.request, image.conditioning)
            image.conditioning = None
            image.steps, image.rows = image.job.num_steps, self.family.rows(image.job)
            image.ticket.warnings.update(dict.fromkeys(self.family.warnings(image.request)))
            image.ticket.lossy.update(dict.fromkeys(self.family.lossy(image.request)))

    # --- Denoising ---------------------------------------------------------------------------------------------

    def _denoising(self) -> list[Image]:
        return [image for image in self.running if image.job and not image.job.done]

    def _signature(self, image: Image) -> Hashable:
        return self.family.signature(image.job)

    def _step(self) -> None:
        stay = None if self.family.interleaves else self._turn
        most_load = self._attempts.step_budget.now
        images = policy.choose(self._denoising(), self._signature, self._costs.rows, self._most_rows, most_load, stay)
        if not images:
            return
        turn = self._signature(images[0])
        if self._turn is not None and turn != self._turn:
            self._telemetry.turn_switches.inc()
        self._turn = turn
        before = {image: image.steps_done for image in images}
        started = self._clock()
        self._attempts.go(
            "denoise_step",
            images,
            lambda part: self.family.step([image.job for image in part]),
            lambda image: image.job is not None and image.job.step_index > before[image],
        )
        self._pass_seconds = self._clock() - started
        self._tell(images, before)

    def _tell(self, images: Sequence[Image], before: dict[Image, int]) -> None:
        """Tell of the steps that were taken."""
        steps: dict[Ticket, int] = {}
        for image in images:
            if image.job is not None:
                image.steps_done, image.rows = image.job.step_index, self.family.rows(image.job)
            if image.steps_done > before[image]:
                steps[image.ticket] = steps.get(image.ticket, 0) + image.steps_done - before[image]
        self._telemetry.steps.inc(sum(steps.values()))
        # One device at a time: what two that paint one request tell of it must not go back.
        with self._queue.condition:
            now = self._clock()
            for ticket, count in steps.items():
                ticket.stepped(count, now)
                if ticket.listeners:
                    ticket.tell(ticket.progress(admission.remaining(ticket, self._costs)))
        for image in images:
            wish, new = image.ticket.preview, image.steps_done > before[image]
            if wish and new and image.ticket.listeners and image.remaining and image.steps_done % wish.every == 0:
                self._preview(image, wish.kind)

    def _preview(self, image: Image, kind: PreviewKind) -> None:
        """Show what an image looks like so far. It fails alone: its request goes on without it."""
        shown: list[np.ndarray | None] = []

        def look(_: Sequence[Image]) -> None:
            shown.append(self.family.preview(image.job, whole=kind is PreviewKind.VAE))

        fault = self._attempts.once("preview", [image], look)
        picture = shown[0] if shown else None
        outcome = "failed" if fault else "none"
        if picture is not None:
            pixels = Pixels(picture.tobytes(), picture.shape[0], picture.shape[1])
            outcome = "shown" if not image.ticket.over and self._finisher.show(image, pixels) else "left_out"
        self._telemetry.preview(outcome)

    # --- Decoding ----------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Decode what has all its steps: one group after each pass, and more while it is the most urgent."""
        while True:
            ready = [image for image in self.running if image.job and image.job.done and not image.ticket.over]
            denoising = self._denoising()
            if not ready or (denoising and not self.family.interleaves):
                return
            most_load = self._attempts.decode_budget.now
            images = policy.choose(ready, self._signature, lambda _: 1, self._most_rows, most_load)
            now = self._clock()
            for image in images:
                seconds = image.ticket.seconds
                seconds["denoise"] = max(seconds["denoise"], now - image.began)
            self._attempts.go(
                "decode", images, self._decode_pictures, lambda image: image.pixels is not None, self._decode_in_tiles
            )
            for ticket in {image.ticket for image in images}:
                ticket.seconds["decode"] += self._clock() - now
            for image in images:
                self.running.remove(image)
                image.job = None
                if image.pixels is not None and not image.ticket.over:
                    self._finisher.finish(image)
            rest = [image for image in ready if image not in images]
            if denoising and rest and min(map(policy.urgency, denoising)) < min(map(policy.urgency, rest)):
                return

    def _decode_in_tiles(self, images: Sequence[Image]) -> None:
        self._decode_pictures(images, tiled=True)

    def _decode_pictures(self, images: Sequence[Image], tiled: bool = False) -> None:
        pictures = self.family.decode([image.job for image in images], tiled=tiled)
        for image, picture in zip(images, pictures, strict=True):
            image.pixels = Pixels(picture.tobytes(), picture.shape[0], picture.shape[1])

    def _count(self) -> None:
        self._telemetry.pass_budget.set(self._attempts.step_budget.now)
        retries = self.family.decode_retries
        self._telemetry.decode_retries.inc(retries - self._decode_retries)
        self._decode_retries = retries
        unexpected = self.family.unexpected_shapes
        self._telemetry.unexpected_shapes.inc(unexpected - self._unexpected_shapes)
        self._unexpected_shapes = unexpected

    def hung(self, now: float) -> Operation | None:
        """What the device has been at for too long, if so. Any thread may ask."""
        operation = self._attempts.operation
        return operation if operation is not None and now - operation.since > operation.bound else None
