"""The noise schedulers by the names that people know, and a fresh one for every image.

A scheduler object counts its own steps, so no two images may share one.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch

from app.engine.scheduler_names import EDM, NAMES
from app.errors import InvalidRequest
from app.generation import GenerateRequest
from app.parameters import SIGMA_SPACINGS, TIMESTEP_SPACINGS
from app.sentences import counted, describe, nearest, no_effect

logger = logging.getLogger(__name__)

OPTIONS = (*SIGMA_SPACINGS, "timestep_spacing")
"""Parameters of a request that are entries of a scheduler's configuration."""
CUSTOM = ("timesteps", "sigmas")
"""Parameters of a request that replace the number of steps."""
TRIAL_STEPS = 7
"""By which spacings are compared: every scheduler can do so many, and they tell as well as more."""


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


class Schedulers:
    """Makes schedulers for one model part.

    Args:
        default: the part's own scheduler; every other takes its noise schedule from this one's configuration.

    Attributes:
        names: of those that go with the model.
    """

    def __init__(self, default: Any) -> None:
        self._default = type(default).__name__
        self._config = default.config
        self.names = EDM if self._default in EDM else tuple(NAMES)
        self._templates: dict[Hashable, Any] = {(self._default,): type(default).from_config(default.config)}
        self._known = {_key(self._default): self._default, "default": self._default}
        # A class name means the class as the model configures it.
        for name, (class_name, _) in NAMES.items():
            self._known.setdefault(_key(class_name), class_name)
            self._known[_key(name)] = name
        if self._default in EDM:
            self._known |= {_key(name): name for name in EDM}

    def resolve(self, request: GenerateRequest) -> str:
        """The one spelling of the scheduler's name; the model's own where the request names none.

        Raises:
            InvalidRequest: no such scheduler, or one that cannot do what else is asked of it.
        """
        if request.scheduler is None:
            name = self._default
        else:
            name = self._known.get(_key(request.scheduler), "")
            if not name:
                hint = nearest(request.scheduler, self.names) or f"; there are {', '.join(self.names)}"
                raise InvalidRequest(f"There is no scheduler {describe(request.scheduler)}{hint}.")
        if self._default in EDM and name not in EDM:
            raise InvalidRequest(
                f"The scheduler {name} does not go with this model, which was trained for other noise; leave it out, "
                f"or take {' or '.join(EDM)}."
            )
        scheduler_class = _class(name)
        accepted = inspect.signature(scheduler_class).parameters
        for option in OPTIONS:
            if getattr(request, option) and option not in accepted:
                raise InvalidRequest(f"The scheduler {name} has no {option}; leave it out or take another scheduler.")
        spacings = [option for option in NAMES[name][1] if option in SIGMA_SPACINGS] if name in NAMES else []
        for custom in CUSTOM:
            if getattr(request, custom) and spacings:
                raise InvalidRequest(f"{custom} and the scheduler {name}, which spaces its own, contradict each other.")
            if getattr(request, custom) and not _takes(scheduler_class, custom):
                raise InvalidRequest(
                    f"The scheduler {name} takes no {custom} of one's own; give num_inference_steps or take another "
                    "scheduler."
                )
        return name

    def warnings(self, request: GenerateRequest) -> list[str]:
        """Sentences about parameters of a resolved request that its scheduler takes, and that change nothing."""
        assert request.scheduler is not None
        why = f"with the scheduler {request.scheduler}"
        sentences = []
        if request.eta and "eta" not in inspect.signature(_class(request.scheduler).step).parameters:
            sentences += no_effect(["eta"], why)
        if request.timestep_spacing is not None:
            # Few, as the device waits for this.
            few = replace(request, num_inference_steps=TRIAL_STEPS)
            spaced = [replace(few, timestep_spacing=spacing) for spacing in TIMESTEP_SPACINGS]
            made = [self.begin(each) for each in spaced]
            if len({(str(timesteps), str(getattr(scheduler, "sigmas", None))) for scheduler, timesteps in made}) == 1:
                spacings = [name for name in SIGMA_SPACINGS if getattr(request, name)]
                sentences += no_effect(["timestep_spacing"], " and ".join([why, *spacings]))
        return sentences

    def begin(self, request: GenerateRequest) -> tuple[Any, torch.Tensor]:
        """A scheduler of its own for one image of a resolved request, and all its timesteps, ``[n]`` on the CPU.

        Raises:
            InvalidRequest: the scheduler cannot do these steps.
        """
        assert request.scheduler is not None
        scheduler = copy.deepcopy(self._template(request))
        chosen: dict[str, Any] = {name: list(getattr(request, name)) for name in CUSTOM if getattr(request, name)}
        if "timesteps" in chosen:
            chosen["timesteps"] = [int(timestep) for timestep in chosen["timesteps"]]
        try:
            if chosen:
                scheduler.set_timesteps(device="cpu", **chosen)
            else:
                scheduler.set_timesteps(request.num_inference_steps, device="cpu")
        except (ValueError, IndexError, RuntimeError, AssertionError) as error:
            logger.info("the scheduler %s: %s", request.scheduler, error)
            asked = f"the {next(iter(chosen))} given" if chosen else counted(request.num_inference_steps or 1, "step")
            instead = "leave them out" if chosen else "take another number of steps"
            raise InvalidRequest(
                f"The scheduler {request.scheduler} cannot do {asked}; {instead} or take another scheduler."
            ) from None
        if hasattr(scheduler, "get_lms_coefficient"):
            # Has it import scipy now: in the first step, that would pass for what a step takes.
            scheduler.get_lms_coefficient(1, 0, 0)
        timesteps: torch.Tensor = scheduler.timesteps
        return scheduler, timesteps

    def _template(self, request: GenerateRequest) -> Any:
        name = request.scheduler
        assert name is not None
        options = {option: getattr(request, option) for option in OPTIONS if getattr(request, option) is not None}
        key = (name, *options.items())
        if key not in self._templates:
            overrides: Mapping[str, Any] = NAMES[name][1] if name in NAMES else {}
            try:
                self._templates[key] = _class(name).from_config(self._config, **{**overrides, **options})
            except (ValueError, NotImplementedError, ImportError) as error:
                logger.info("the scheduler %s: %s", name, error)
                given = ", ".join(options) or "this model's configuration"
                raise InvalidRequest(f"The scheduler {name} does not go with {given}; take another one.") from None
        return self._templates[key]


def _class(name: str) -> Any:
    return getattr(diffusers, NAMES[name][0] if name in NAMES else name)


def _takes(scheduler_class: Any, custom: str) -> bool:
    # UniPC's sigmas are those of models that follow straight lines.
    is_other = custom == "sigmas" and scheduler_class is diffusers.UniPCMultistepScheduler
    return custom in inspect.signature(scheduler_class.set_timesteps).parameters and not is_other


# --- Parts of a schedule ---------------------------------------------------------------------------------------


def from_strength(scheduler: Any, steps: int, strength: float) -> int:
    """Index of the first timestep for a picture that is changed with `strength`; as the stock pipelines count.

    Args:
        scheduler: a second-order one has two timesteps for each step but the first.
        steps: asked for.
        strength: 0…1.
    """
    order: int = scheduler.order
    return (steps - min(int(steps * strength), steps)) * order


def from_fraction(scheduler: Any, timesteps: torch.Tensor, start: float) -> int:
    """Index of the first timestep after the fraction `start` of the denoising; as the stock refiner counts."""
    count = int((timesteps < _cutoff(scheduler, start)).sum())
    if scheduler.order == 2 and count % 2 == 0:
        # Never between the two halves of a second-order step.
        count += 1
    return len(timesteps) - count


def to_fraction(scheduler: Any, timesteps: torch.Tensor, end: float | None) -> torch.Tensor:
    """The timesteps up to the fraction `end` of the denoising; as the stock base counts."""
    if end is None or end >= 1:
        return timesteps
    return timesteps[: int((timesteps >= _cutoff(scheduler, end)).sum())]


def _cutoff(scheduler: Any, fraction: float) -> int:
    trained: int = scheduler.config.num_train_timesteps
    return round(trained - fraction * trained)


def snapshot(scheduler: Any) -> Any:
    """A copy that steps on its own; tensors are shared, as no scheduler writes into one that it keeps, but for one."""
    twin = copy.copy(scheduler)
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            setattr(twin, name, list(value))
        elif name == "cur_model_output" and isinstance(value, torch.Tensor):
            twin.cur_model_output = value.clone()  # PNDM's sum over a step of Runge and Kutta
    return twin


def draw_on_host(scheduler: Any, latents: torch.Tensor, seed: int) -> None:
    """Have a scheduler that would draw on the device draw on the host, as all others do: a seed means the same picture
    on every device.

    Args:
        scheduler: with its timesteps.
        latents: such as it will step.
        seed: of the image.
    """
    if not hasattr(scheduler, "noise_sampler_seed"):
        return
    # Imported for whoever asks for it: it takes torchsde along.
    from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

    # As it does by itself in its first step: from a tree of random numbers that has its own seed.
    device, sigmas = latents.device, scheduler.sigmas
    shape = torch.zeros(latents.shape, dtype=latents.dtype)
    tree = BrownianTreeNoiseSampler(shape, sigmas[sigmas > 0].min().item(), sigmas.max().item(), seed)
    scheduler.noise_sampler = lambda start, end: tree(start, end).to(device)


def step_options(scheduler: Any, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """Keyword arguments for ``scheduler.step``: stochastic ones draw from the image's own generator."""
    accepted = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if "generator" in accepted:
        options["generator"] = generator
    if "eta" in accepted:
        options["eta"] = eta
    return options
