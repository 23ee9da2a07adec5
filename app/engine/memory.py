"""How much one pass may hold, learned from the passes that did not fit. Knows no device."""

from __future__ import annotations

from dataclasses import dataclass

from app.engine.ticket import Image

CAREFUL_PASSES = 100
"""Passes that must fit before more is tried again: memory may have been short for a reason that has gone."""


@dataclass(slots=True)
class Budget:
    """Pixels times rows that one pass may have.

    Attributes:
        most: as configured.
        now: as learned, at most `most`.
    """

    most: float
    now: float = 0.0
    _fitted: int = 0

    def __post_init__(self) -> None:
        self.now = self.most

    def fitted(self) -> None:
        self._fitted += 1
        if self.now < self.most and self._fitted >= CAREFUL_PASSES:
            self.now, self._fitted = min(self.most, self.now * 1.25), 0

    def too_small(self, load: float) -> None:
        """`load` did not fit: from now on half of it, until that has gone well for a while."""
        self.now, self._fitted = min(self.now, load / 2), 0


def advice(image: Image, largest: int) -> str:
    """A sentence for a request whose one image did not fit.

    Args:
        image: it.
        largest: pixels of the largest picture that was ever done here.
    """
    height, width = image.request.height or 0, image.request.width or 0
    known = 0 < largest < image.size
    scale = (largest / image.size if known else 0.5) ** 0.5
    fits = f"{_whole(height * scale)} x {_whole(width * scale)} (height x width)"
    why = ": pictures as large have worked" if known else ""
    return f"The device has too little memory for a picture of {height} x {width}; try {fits}{why}."


def _whole(side: float) -> int:
    """A side that every model takes: not above `side`, or the least there is."""
    whole = int(side + 1e-6)
    return max(16, whole // 64 * 64 or whole // 16 * 16)
