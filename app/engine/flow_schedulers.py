"""The noise schedules of models that follow straight lines from noise to picture, and a fresh one for every image.

The stock FLUX pipelines know one scheduler, Euler's; Heun's is here beside it. Schedules live on the CPU, where reading
one number of them makes nobody wait for the device.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from app.errors import InvalidRequest
from app.generation import GenerateRequest
from app.parameters import SIGMA_SPACINGS
from app.sentences import describe

NAMES: Mapping[str, type[Any]] = MappingProxyType(
    {"Euler": FlowMatchEulerDiscreteScheduler, "Heun": FlowMatchHeunDiscreteScheduler}
)
"""Common name to diffusers class."""


def _key(name: str) -> str:
    """``FlowMatchEulerDiscreteScheduler``, ``flow_match_euler`` and ``Euler`` are one name."""
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    return key.removeprefix("flowmatch").removesuffix("scheduler").removesuffix("discrete")


class FlowSchedulers:
    """Makes schedulers for one model.

    Args:
        default: the model's own scheduler, from whose configuration the others take their shift.
    """

    def __init__(self, default: Any) -> None:
        self._default = type(default)
        self._config = default.config
        self._known = {_key(name): name for name in NAMES} | {"default": self._default.__name__}
        self._known.setdefault(_key(self._default.__name__), self._default.__name__)

    def resolve(self, request: GenerateRequest) -> str:
        """The one spelling of the scheduler's name; the model's own where the request names none.

        Raises:
            InvalidRequest: no such scheduler, or the schedule asked for is none.
        """
        name = self._default.__name__
        if request.scheduler not in (None, name):
            found = self._known.get(_key(request.scheduler))
            if found is None:
                raise InvalidRequest(
                    f"There is no scheduler {describe(request.scheduler)} for FLUX; there are {', '.join(NAMES)}."
                )
            name = found
        if self._class(name) is not FlowMatchEulerDiscreteScheduler:
            for parameter in ("sigmas", *SIGMA_SPACINGS):
                if getattr(request, parameter):
                    raise InvalidRequest(f"{parameter} needs the scheduler Euler; {name} has a schedule of its own.")
        if request.sigmas is not None and not (request.sigmas[0] <= 1 and request.sigmas[-1] > 0):
            raise InvalidRequest(
                "sigmas must fall from at most 1 to more than 0; the last step, to 0, comes by itself."
            )
        return name

    def begin(self, request: GenerateRequest, tokens: int) -> tuple[Any, torch.Tensor]:
        """A scheduler of its own for one image, and its timesteps ``[n]`` on the CPU, from `strength` on.

        Args:
            request: resolved.
            tokens: packed latents of the image, by which many models shift their schedule.
        """
        assert request.scheduler is not None and request.num_inference_steps is not None
        config = self._config
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        steps = request.num_inference_steps
        scheduler = self._make(request, mu)
        if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
            scheduler.set_timesteps(steps, device="cpu")
        else:
            sigmas: Any = np.linspace(1.0, 1 / steps, steps) if request.sigmas is None else list(request.sigmas)
            retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        first = first_step(request) * scheduler.order
        scheduler.set_begin_index(first)
        return scheduler, scheduler.timesteps[first:]

    def passes(self, request: GenerateRequest) -> int:
        """How many timesteps `begin` will give; a step of Heun's has two, but the last one."""
        assert request.scheduler is not None and request.num_inference_steps is not None
        steps = request.num_inference_steps - first_step(request)
        return 2 * steps - 1 if self._class(request.scheduler) is FlowMatchHeunDiscreteScheduler else steps

    def _class(self, name: str) -> type[Any]:
        return NAMES.get(name, self._default)

    def _make(self, request: GenerateRequest, mu: float) -> Any:
        assert request.scheduler is not None
        scheduler_class = self._class(request.scheduler)
        if scheduler_class is FlowMatchHeunDiscreteScheduler:
            # Heun's knows a fixed shift alone. Euler's shift by size is the same formula with a shift of e^mu.
            shift = self._config.get("shift", 1.0)
            if self._config.get("use_dynamic_shifting", False):
                shift = mu if self._config.get("time_shift_type") == "linear" else math.exp(mu)
            return scheduler_class(num_train_timesteps=self._config.num_train_timesteps, shift=shift)
        asked = {name: getattr(request, name) for name in SIGMA_SPACINGS if getattr(request, name) is not None}
        if any(asked.values()):
            asked = dict.fromkeys(SIGMA_SPACINGS, False) | asked
        return scheduler_class.from_config(copy.deepcopy(self._config), **asked)


def first_step(request: GenerateRequest) -> int:
    """How many steps `strength` leaves out, as the stock pipelines count; none without an input image."""
    assert request.num_inference_steps is not None
    if request.strength is None:
        return 0
    steps = request.num_inference_steps
    return int(max(steps - min(steps * request.strength, steps), 0))
