"""Denoising steps of FLUX that do without its blocks: what the blocks added in the steps before is drawn out in a line.

Which steps these are depends on their number alone. So a picture does not depend on its company, nothing asks the
device between two steps, and jobs that leave out the blocks share that step as they share every other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHORTEST = 8
"""Steps of a run that leaves any out; what distilled models do in fewer is needed whole."""
WHOLE_AT_FIRST = 0.25
"""Of a run: there the composition is found, and what the blocks add changes most."""


def plan(timesteps: Sequence[float], every: int) -> tuple[float | None, ...]:
    """Which steps of a run do without the blocks.

    Args:
        timesteps: of the run.
        every: one step of so many goes through the blocks, after the first part of the run. So does the last one.

    Returns:
        For each step ``None``, or, where it does without, how far the line is drawn: 0 for what the blocks added last,
        1 for as much again as that had changed since the time before.
    """
    first = max(2, math.ceil(len(timesteps) * WHOLE_AT_FIRST))
    reach: list[float | None] = []
    taken: list[float] = []
    for index, timestep in enumerate(timesteps):
        if index < first or index == len(timesteps) - 1 or (index - first) % every == every - 1:
            taken.append(timestep)
            reach.append(None)
            continue
        before, last = taken[-2:]
        # Heun's method goes through the same timestep twice.
        reach.append((timestep - last) / (last - before) if last != before else 0.0)
    return tuple(reach)


@dataclass(slots=True)
class Added:
    """What the blocks added to one row of image tokens, ``[1, tokens, d]``, in the last two steps that took them."""

    step: int = -1
    last: torch.Tensor | None = None
    before: torch.Tensor | None = None

    def note(self, step: int, added: torch.Tensor) -> None:
        """May be called again for a step that is tried again."""
        if step != self.step:
            self.before = self.last
        # A copy, so that what one job keeps is not the whole of its company's.
        self.step, self.last = step, added.clone()

    def drawn(self, reach: float) -> torch.Tensor:
        assert self.last is not None
        return self.last if self.before is None or reach == 0 else torch.lerp(self.before, self.last, 1 + reach)


class StepCache:
    """Looks on while a transformer computes, and does with little what it does with its blocks.

    Args:
        transformer: a ``FluxTransformer2DModel``, all of it on its device.
    """

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._into: torch.Tensor | None = None
        self._out_of: torch.Tensor | None = None
        transformer.x_embedder.register_forward_hook(self._before_the_blocks)
        transformer.norm_out.register_forward_pre_hook(self._after_the_blocks)

    def _before_the_blocks(self, _: Any, __: Any, embedded: torch.Tensor) -> None:
        self._into = embedded

    def _after_the_blocks(self, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        self._out_of = given[0]

    def added(self) -> torch.Tensor:
        """What the blocks added in the pass that has just been: ``[rows, tokens, d]``."""
        assert self._into is not None and self._out_of is not None
        added = self._out_of - self._into
        self._into = self._out_of = None
        return added

    def predict(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled_projections: torch.Tensor,
        added: torch.Tensor,
    ) -> torch.Tensor:
        """What the transformer would say with blocks that add `added`; arguments as its own."""
        part = self._transformer
        embedded: torch.Tensor = part.x_embedder(hidden_states)
        self._into = None
        times = [timestep.to(embedded.dtype) * 1000]
        if guidance is not None:
            times.append(guidance.to(embedded.dtype) * 1000)
        predicted: torch.Tensor = part.proj_out(
            part.norm_out(embedded + added, part.time_text_embed(*times, pooled_projections))
        )
        self._out_of = None
        return predicted
