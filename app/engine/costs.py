"""What a step, a decode and a prompt cost in seconds, as measured on this host.

Knows no clock. Several devices' threads may measure while others ask. The model behind it is one line for each picture
size: a forward pass takes a fixed time and a time for each row, both fitted to the passes of late.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.engine.ticket import Image
from app.generation import GenerateRequest

MAX_SIZES = 64
"""Picture sizes whose costs are kept apart; what was measured least lately is forgotten."""
GUESS = 1e-7
"""Seconds for one pixel of one row, until anything was measured."""
FORGET = 0.05
"""Weight of the newest measurement, once there are many."""


def rows_of(request: GenerateRequest) -> int:
    """Rows that a request is likely to bring to a pass; the family knows once it has begun."""
    if request.true_cfg_scale is not None:  # FLUX, whose guidance_scale costs nothing
        return 2 if request.true_cfg_scale > 1 and request.negative_prompt is not None else 1
    return 2 if (request.guidance_scale or 0) > 1 else 1


@dataclass(slots=True)
class Line:
    """``seconds = fixed + slope * load``, least squares with exponential forgetting."""

    samples: int = 0
    load: float = 0.0
    seconds: float = 0.0
    load_load: float = 0.0
    load_seconds: float = 0.0

    def observe(self, load: float, seconds: float) -> None:
        self.samples += 1
        weight = max(FORGET, 1 / self.samples)
        self.load += weight * (load - self.load)
        self.seconds += weight * (seconds - self.seconds)
        self.load_load += weight * (load * load - self.load_load)
        self.load_seconds += weight * (load * seconds - self.load_seconds)

    @property
    def slope(self) -> float:
        variance = self.load_load - self.load * self.load
        proportional = self.seconds / self.load if self.load else 0.0
        if variance <= 1e-3 * self.load * self.load:
            return proportional  # nothing but passes of one load: sharing may come cheaper, but nobody has seen it
        slope = (self.load_seconds - self.load * self.seconds) / variance
        return min(max(slope, 0.0), proportional)

    @property
    def fixed(self) -> float:
        return max(0.0, self.seconds - self.slope * self.load)

    def __call__(self, load: float) -> float:
        return self.fixed + self.slope * load


@dataclass(slots=True)
class Costs:
    """Seconds of the stages, by picture size.

    Args:
        most_rows: rows of one forward pass.
        most_load: pixels times rows of one forward pass.
    """

    most_rows: int
    most_load: float
    _steps: collections.OrderedDict[int, Line] = field(default_factory=collections.OrderedDict)
    _any_step: Line = field(default_factory=Line)
    _decode: Line = field(default_factory=Line)
    _encode: Line = field(default_factory=Line)
    _begin: Line = field(default_factory=Line)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    # --- Measuring ---------------------------------------------------------------------------------------------

    def stepped(self, images: Sequence[Image], seconds: float) -> None:
        """One forward pass of `images`, which have one size, took so long."""
        size = images[0].size
        load = sum(map(self.rows, images)) * size
        with self._lock:
            self._steps.setdefault(size, Line()).observe(load, seconds)
            self._steps.move_to_end(size)
            if len(self._steps) > MAX_SIZES:
                self._steps.popitem(last=False)
            self._any_step.observe(load, seconds)

    def decoded(self, images: Sequence[Image], seconds: float) -> None:
        with self._lock:
            self._decode.observe(sum(image.size for image in images), seconds)

    def encoded(self, images: Sequence[Image], seconds: float) -> None:
        with self._lock:
            self._encode.observe(len(images), seconds)

    def begun(self, images: Sequence[Image], seconds: float) -> None:
        with self._lock:
            self._begin.observe(len(images), seconds)

    @property
    def measured(self) -> bool:
        return self._any_step.samples > 0

    def knows(self, stage: str, size: int) -> bool:
        """Whether anything of that stage, and for steps of that size, was measured."""
        if stage == "denoise_step":
            return size in self._steps
        # Nothing of how pictures begin: with an input image that takes a thousand times as long as without one.
        other = {"decode": self._decode, "text_encode": self._encode}
        return stage in other and other[stage].samples > 0

    # --- Foretelling -------------------------------------------------------------------------------------------

    def rows(self, image: Image) -> int:
        """Rows that an image brings to a pass, or is likely to bring once it has begun."""
        return image.rows or rows_of(image.request)

    def of(self, stage: str, images: Sequence[Image]) -> float:
        """Seconds of one go of `stage` with `images`, which have one size."""
        if stage == "denoise_step":
            return self.step(images[0].size, sum(map(self.rows, images)))
        if stage == "decode":
            return self.decode(sum(image.size for image in images))
        return self._encode(len(images))

    def step(self, size: int, rows: int) -> float:
        """Seconds of one forward pass of pictures of so many pixels."""
        line = self._steps.get(size)
        if line is not None:
            return line(rows * size)
        return self._any_step(rows * size) if self.measured else GUESS * rows * size

    def decode(self, pixels: int) -> float:
        """Seconds of one decode."""
        return self._decode(pixels) if self._decode.samples else 0.0

    def join(self) -> float:
        """Seconds that one more image takes until its first step: of encoding its prompt and beginning its job."""
        return self._encode.slope + self._begin.slope
