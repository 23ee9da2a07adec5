"""Doing things on a device that may fail: in halves where memory is short, alone where one image is at fault.

What succeeds is measured, and every attempt watched by whoever asks for the `Operation`. Knows no family and no queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.engine.costs import Costs
from app.engine.faults import as_fault
from app.engine.memory import Budget, advice
from app.engine.ticket import Image
from app.errors import DeviceLost, OutOfMemory, RuntimeFault
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

UNKNOWN = 10.0
"""How many times longer something may take that was never measured: first times compile and tune."""

Action = Callable[[Sequence[Image]], None]


@dataclass(frozen=True, slots=True)
class Operation:
    """What a device is at: since when, and for how many seconds it may be before it counts as hung."""

    stage: str
    since: float
    bound: float


class Attempts:
    """The ladder from a pass that failed to the images that it failed for.

    Args:
        costs: what is measured here.
        telemetry: where counts and seconds go.
        most_load: pixels times rows of one forward pass.
        step_timeout: seconds beyond what is usual after which the device counts as hung.
        clock: seconds that only grow.

    Attributes:
        step_budget: pixels times rows of one forward pass, as learned.
        decode_budget: pixels of one decode, as the family wants it and as learned.
        operation: what goes on right now; any thread may look.
    """

    def __init__(
        self,
        costs: Costs,
        telemetry: Telemetry,
        most_load: float,
        step_timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self._costs = costs
        self._telemetry = telemetry
        self._step_timeout = step_timeout
        self._clock = clock
        self.step_budget = Budget(most_load)
        self.decode_budget = Budget(most_load)
        self._largest = 0
        self.operation: Operation | None = None

    def go(
        self,
        stage: str,
        images: Sequence[Image],
        action: Action,
        done: Callable[[Image], bool],
        last: Action | None = None,
    ) -> None:
        """Do `action` for `images`; where it fails, for halves of them, down to single ones.

        So a full device costs time and nobody's picture, and an image that nothing can be done for fails alone.

        Args:
            stage: as the metrics call it.
            images: of one signature.
            action: may be done for any part of them.
            done: whether it has been done for an image.
            last: what to try for one image that there is no memory for; `action` once more unless given.

        Raises:
            DeviceLost: nothing will work any more.
        """
        images = [image for image in images if not image.ticket.over and not done(image)]
        if not images:
            return
        budget, load = self._budget(stage), self._load(stage, images)
        fault: RuntimeFault | None = None
        # What was learned from the first half holds for the second one too.
        fits = len(images) == 1 or budget is None or load <= budget.now
        if fits:
            fault = self.once(stage, images, action)
            if fault is None:
                return
        full = isinstance(fault, OutOfMemory)
        if full and budget is not None:
            budget.too_small(load)
        if len(images) > 1:
            if full:
                logger.warning("out of memory in %s with %d images; going on with halves", stage, len(images))
                self._telemetry.out_of_memory(stage, "split")
            middle = (len(images) + 1) // 2
            for part in (images[:middle], images[middle:]):
                self.go(stage, part, action, done, last)
            return
        image = images[0]
        if full and not done(image):
            logger.warning("out of memory in %s with one image; trying %s", stage, "tiles" if last else "again")
            self._telemetry.out_of_memory(stage, "tile" if last else "again")
            fault = self.once(stage, images, last or action)
        if isinstance(fault, OutOfMemory):
            self._telemetry.out_of_memory(stage, "refused")
            fault = OutOfMemory(advice(image, self._largest))
        if fault is not None:
            image.ticket.fail(fault)

    def once(self, stage: str, images: Sequence[Image], action: Action) -> RuntimeFault | None:
        """Do it, watched and measured.

        Returns:
            What went wrong, without its traceback, which would hold tensors.

        Raises:
            DeviceLost: nothing will work any more.
        """
        started = self._clock()
        self.operation = Operation(stage, started, self._bound(stage, images))
        try:
            action(images)
        except Exception as error:
            if len(images) == 1 and not isinstance(error, RuntimeFault):
                whose = {"request_id": images[0].ticket.known_as}
                logger.error("a generation failed in %s", stage, exc_info=error, extra=whose)
            fault = as_fault(error)
        else:
            self._measured(stage, images, self._clock() - started)
            return None
        finally:
            self.operation = None
        if isinstance(fault, DeviceLost):
            raise fault
        return fault

    def _bound(self, stage: str, images: Sequence[Image]) -> float:
        if self._costs.knows(stage, images[0].size):
            return self._step_timeout + UNKNOWN * self._costs.of(stage, images)
        return self._step_timeout * UNKNOWN

    def _measured(self, stage: str, images: Sequence[Image], seconds: float) -> None:
        self._telemetry.stage(stage, seconds)
        if stage == "denoise_step":
            self._costs.stepped(images, seconds)
            self._telemetry.passed(len(images), sum(map(self._costs.rows, images)))
            self.step_budget.fitted()
            self._costs.most_load = self.step_budget.now
        elif stage == "decode":
            self._costs.decoded(images, seconds)
            self.decode_budget.fitted()
            self._largest = max(self._largest, images[0].size)
        elif stage == "text_encode":
            self._costs.encoded(images, seconds)
        elif stage == "begin":
            self._costs.begun(images, seconds)

    def _budget(self, stage: str) -> Budget | None:
        return {"denoise_step": self.step_budget, "decode": self.decode_budget}.get(stage)

    def _load(self, stage: str, images: Sequence[Image]) -> int:
        return sum((self._costs.rows(image) if stage == "denoise_step" else 1) * image.size for image in images)
