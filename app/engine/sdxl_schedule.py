"""Which steps an SDXL image takes, and through which part: known from the request alone, before anything computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from app.engine import schedulers
from app.engine.sdxl_job import Part
from app.generation import GenerateRequest


@dataclass(slots=True)
class Stretch:
    """The steps that one image takes through one part.

    Attributes:
        scheduler: its own.
        timesteps: ``[steps]`` on the CPU; none where all are before or behind this stretch.
        first_timestep: ``[1]``, where it begins, also where it ends before its first step.
        start: index of the first of its timesteps among all of the scheduler's.
    """

    part: Part
    scheduler: Any
    timesteps: torch.Tensor
    first_timestep: torch.Tensor
    start: int = 0

    def start_at(self, index: int) -> None:
        self.start = index
        self.timesteps = self.scheduler.timesteps[index:]
        self.first_timestep = self.scheduler.timesteps[index : index + 1]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)

    def stop_at(self, fraction: float | None) -> None:
        self.timesteps = schedulers.to_fraction(self.scheduler, self.timesteps, fraction)


def parts_of(request: GenerateRequest, base: Part, refiner: Part | None) -> list[Part]:
    """Those that a resolved request is meant to go through."""
    limit, end = request.denoising_limit, request.denoising_end
    if refiner is None or limit is None or limit >= 1 or (end is not None and end <= limit):
        return [base]
    return [base, refiner]


def plan(request: GenerateRequest, base: Part, refiner: Part | None) -> list[Stretch]:
    """The way of one image of a resolved request, with a scheduler of its own for each part; one alone may be empty.

    Raises:
        InvalidRequest: the scheduler cannot do these steps.
    """
    parts = parts_of(request, base, refiner)
    first = _whole(parts[0], request)
    if len(parts) == 1:
        first.stop_at(request.denoising_end)
        return [first]
    assert request.denoising_limit is not None
    second = _whole(parts[1], request)
    first.stop_at(request.denoising_limit)
    # Where an image is changed so little, or in so few steps, that none is left for the base, the refiner has them all.
    alone = not len(first.timesteps)
    if not alone:
        timesteps = second.scheduler.timesteps
        second.start_at(schedulers.from_fraction(second.scheduler, timesteps, request.denoising_limit))
    second.stop_at(request.denoising_end)
    return [second] if alone else [first, second] if len(second.timesteps) else [first]


def _whole(part: Part, request: GenerateRequest) -> Stretch:
    """All steps through one part, from where `strength` begins."""
    scheduler, timesteps = part.schedulers.begin(request)
    stretch = Stretch(part, scheduler, timesteps, timesteps[:1])
    start = 0
    if request.strength is not None:
        assert request.num_inference_steps is not None
        start = schedulers.from_strength(scheduler, request.num_inference_steps, request.strength)
    stretch.start_at(start)
    return stretch
