"""The noise schedulers by the names that people know, and a fresh one for every image.

A scheduler object counts its own steps, so no two images may share one.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from typing import Any

import diffusers
import torch

from app.engine.scheduler_names import NAMES
from app.errors import InvalidRequest
from app.generation import GenerateRequest, nearest

logger = logging.getLogger(__name__)


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


class Schedulers:
    """Makes schedulers for one model.

    Args:
        default: the model's own scheduler; every other takes its noise schedule from this one's configuration.
    """

    def __init__(self, default: Any) -> None:
        self._default = type(default).__name__
        self._config = default.config
        self._templates: dict[str, Any] = {self._default: type(default).from_config(default.config)}
        self._known = {_key(self._default): self._default, "default": self._default}
        # A class name means the class as the model configures it; common names win over nothing else.
        for name, (class_name, _) in NAMES.items():
            self._known.setdefault(_key(class_name), class_name)
            self._known[_key(name)] = name

    def resolve(self, name: str | None) -> str:
        """The one spelling of a scheduler's name; ``None`` is the model's own.

        Raises:
            InvalidRequest: no such scheduler.
        """
        if name is None:
            return self._default
        found = self._known.get(_key(name))
        if found is None:
            shown = name if len(name) <= 40 else f"{name[:37]}..."
            hint = nearest(name, NAMES) or f"; there are {', '.join(NAMES)}"
            raise InvalidRequest(f"There is no scheduler {shown!r}{hint}.")
        return found

    def begin(self, request: GenerateRequest, device: torch.device) -> tuple[Any, torch.Tensor]:
        """A scheduler of its own for one image, and its timesteps ``[n]`` up to ``denoising_end``.

        Args:
            request: resolved.
            device: where the timesteps are wanted.

        Raises:
            InvalidRequest: the scheduler cannot do that number of steps.
        """
        assert request.scheduler is not None
        scheduler = copy.deepcopy(self._template(request.scheduler))
        try:
            scheduler.set_timesteps(request.num_inference_steps, device=device)
        except (ValueError, IndexError, RuntimeError) as error:
            logger.info("the scheduler %s: %s", request.scheduler, error)
            raise InvalidRequest(
                f"The scheduler {request.scheduler} cannot do {request.num_inference_steps} steps; take another number "
                "of steps or another scheduler."
            ) from None
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        timesteps: torch.Tensor = scheduler.timesteps
        if request.denoising_end is not None and request.denoising_end < 1:
            trained = scheduler.config.num_train_timesteps
            cutoff = round(trained - request.denoising_end * trained)
            timesteps = timesteps[: int((timesteps >= cutoff).sum())]
        return scheduler, timesteps

    def _template(self, name: str) -> Any:
        if name not in self._templates:
            class_name, overrides = NAMES.get(name, (name, {}))
            self._templates[name] = getattr(diffusers, class_name).from_config(self._config, **overrides)
        return self._templates[name]


def step_options(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    """Keyword arguments for ``scheduler.step``: stochastic ones draw from the image's own generator."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "generator" in accepted:
        options["generator"] = generator
    if "eta" in accepted:
        options["eta"] = 0.0
    return options
