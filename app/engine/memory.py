"""How much one forward pass may hold, learned from the passes that did not fit. Knows no device."""

from __future__ import annotations

from dataclasses import dataclass

from app.engine.costs import rows_of
from app.engine.ticket import Image

CAREFUL_PASSES = 100
"""Passes that must fit before more is tried again: memory may have been short for a reason that has gone."""


@dataclass(slots=True)
class Budget:
    """Pixels times rows that one pass may have.

    Attributes:
        most: as configured.
        now: as learned, at most `most`.
        largest: that has fitted so far.
    """

    most: float
    now: float = 0.0
    largest: float = 0.0
    _fitted: int = 0

    def __post_init__(self) -> None:
        self.now = self.most

    def fitted(self, load: float) -> None:
        self.largest = max(self.largest, load)
        self._fitted += 1
        if self.now < self.most and self._fitted >= CAREFUL_PASSES:
            self.now, self._fitted = min(self.most, self.now * 1.25), 0

    def too_small(self, load: float) -> None:
        """`load` did not fit: from now on half of it, until that has gone well for a while."""
        self.now, self._fitted = min(self.now, load / 2), 0
        self.largest = min(self.largest, load / 2)

    def advice(self, image: Image) -> str:
        """A sentence for a request whose one image did not fit."""
        height, width = image.request.height or 0, image.request.width or 0
        pixels = min(self.largest / rows_of(image.request), image.size - 1)
        known = pixels >= 64 * 64
        scale = (pixels / max(image.size, 1) if known else 0.5) ** 0.5
        fits = f"{_whole(height * scale)} x {_whole(width * scale)}"
        hope = f"{fits} (height x width) fits" if known else f"try {fits} (height x width)"
        return f"The device has too little memory for a picture of {height} x {width}; {hope}."


def _whole(side: float) -> int:
    """A side that every model takes."""
    return max(8, int(side) // 64 * 64 or int(side) // 8 * 8)
