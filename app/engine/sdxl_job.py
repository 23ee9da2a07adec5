"""What one SDXL image is on its way: the parts that it goes through, and what it carries. Nothing here computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from app.engine import schedulers
from app.engine.adapters import Loras
from app.engine.company import round_as_alone
from app.engine.family import Job
from app.engine.fp8 import use_fp8
from app.engine.optimization import OFF, Optimization
from app.engine.prompts import Embedding, PromptEncoder
from app.engine.vae import Vae

if TYPE_CHECKING:
    from app.engine.compiled import Compiler


class Part:
    """A UNet with everything that belongs to it: the base, or the refiner.

    Args:
        name: ``base`` or ``refiner``.
        pipeline: loaded, on its device.
        device: where its UNet runs.
        vae: of the other part, which is shared where it is the same.
        optimization: of the UNet.
        compiler: of all that computes.

    Attributes:
        predict: the UNet, in the fastest form that there is.
    """

    def __init__(
        self,
        name: str,
        pipeline: Any,
        device: torch.device,
        vae: Vae | None = None,
        optimization: Optimization = OFF,
        compiler: Compiler | None = None,
    ) -> None:
        self.name = name
        self.pipeline = pipeline
        self.unet = pipeline.unet
        optimization.arrange(pipeline.unet, pipeline.vae)
        if optimization.fp8:
            use_fp8(self.unet, optimization.cache_dir)
        self.predict: Callable[..., Any] = self.unet
        if compiler is not None:
            # Long prompts bring more tokens.
            lengths = {"encoder_hidden_states": 1}
            self.predict = compiler.compile(self.unet, lengths=lengths, graphs=optimization.graphs)
            for encoder in filter(None, (pipeline.text_encoder, pipeline.text_encoder_2)):
                compiler.compile_encoder(encoder)
        elif device.type == "cpu":
            round_as_alone(self.unet, rows=2)
        self.schedulers = schedulers.Schedulers(pipeline.scheduler)
        self.prompts = PromptEncoder(pipeline, device)
        if vae is None or vae.module is not pipeline.vae:
            in_full = bool(getattr(pipeline.vae.config, "force_upcast", False))
            vae = Vae(pipeline.vae, pipeline.image_processor, compiler, encodes_in_full=in_full)
        self.vae = vae


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Embeddings of the positive and, with guidance, of the negative prompt, by name of the part."""

    positive: dict[str, Embedding]
    negative: dict[str, Embedding]


@dataclass(slots=True, kw_only=True)
class Leg:
    """One image's way through one part.

    Attributes:
        scheduler: its own.
        scheduler_timesteps: ``[steps]`` on the CPU, as the scheduler made them; what it computes from them is small
            and would keep host and device waiting for each other.
        timesteps: float32 ``[steps]`` on the device, so that no step waits for it.
        first_timestep: ``[1]``, where the way begins, also where it ends before its first step.
        embeddings: ``[rows, tokens, d]``; a guided job has two rows, the negative one first.
        pooled: ``[rows, d]``.
        time_ids: ``[rows, 6]``: original size, crop, target size; the refiner's ``[rows, 5]`` end with the score.
        timestep_cond: ``[1, d]``, for models that take the guidance scale as an input.
        start: index of the first of its timesteps among all of the scheduler's.
        kept: how much of the picture and how much noise what inpainting keeps has before each step, both ``[steps]``
            on the device.
    """

    part: Part
    scheduler: Any
    scheduler_timesteps: torch.Tensor
    timesteps: torch.Tensor
    first_timestep: torch.Tensor
    step_options: dict[str, Any]
    embeddings: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    timestep_cond: torch.Tensor | None
    start: int = 0
    kept: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(slots=True)
class Inpainting:
    """What inpainting keeps beside the latents.

    Attributes:
        mask: ``[1, 1, h, w]``, 1 where to paint.
        image_latents: of the picture, ``[1, c, h, w]``.
        noise: that it is mixed with.
        masked_latents: of the picture without what is painted; only for UNets with nine channels.
    """

    mask: torch.Tensor
    image_latents: torch.Tensor
    noise: torch.Tensor
    masked_latents: torch.Tensor | None


@dataclass(slots=True, kw_only=True)
class SdxlJob(Job):
    """One image on its way through one part or two.

    Attributes:
        latents: ``[1, c, h / 8, w / 8]``.
        legs: through the base, the refiner, or both in this order.
        leg_index: where it is.
        leg_step: steps taken of that leg.
        guided_steps: of its first steps, which have a negative row too.
        guidance: ``[1, 1, 1, 1]``, float32 on the device.
        rescale: guidance rescale and 1 minus it, in the same shape.
    """

    latents: torch.Tensor
    generator: torch.Generator
    legs: list[Leg]
    leg_index: int = 0
    leg_step: int = 0
    guided_steps: int
    guidance: torch.Tensor
    rescale: tuple[torch.Tensor, torch.Tensor] | None
    inpainting: Inpainting | None
    loras: Loras

    @property
    def guided(self) -> bool:
        """Whether the next step has a negative row."""
        return self.step_index < self.guided_steps

    @property
    def leg(self) -> Leg:
        return self.legs[self.leg_index]
