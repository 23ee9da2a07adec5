"""What one FLUX image is on its way, and what it carries. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from app.engine.adapters import Loras
from app.engine.family import Job
from app.engine.step_cache import Added


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the text encoders read.

    Attributes:
        clip: for the first of them.
        t5: for the second.
        length: tokens that the second reads, padding among them.
        loras: adapters, which may change the first too.
    """

    clip: str
    t5: str
    length: int
    loras: Loras


@dataclass(frozen=True, slots=True)
class Embedding:
    """What both text encoders say about one prompt.

    Attributes:
        hidden: ``[1, tokens, d]``, T5's.
        pooled: ``[1, d]``, CLIP's.
        ids: ``[tokens, 3]``, the positions of the tokens, which are all 0.
    """

    hidden: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Conditioning:
    positive: Embedding
    negative: Embedding | None
    """``None`` where the request has no true classifier-free guidance."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What inpainting keeps of the input image.

    Attributes:
        latents: of the image, packed.
        noise: what `latents` are noised with before they take part in a step.
        mask: 1 where to paint, 0 where to keep; all three ``[1, tokens, c]``.
        noise_levels: ``[n]`` on the device, one for each of the scheduler's steps and the last, 0.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    noise_levels: torch.Tensor


@dataclass(slots=True, kw_only=True)
class FluxJob(Job):
    """One image on its way through the transformer.

    Attributes:
        latents: ``[1, tokens, 4 c]``, packed: one token holds two by two latents.
        scheduler_timesteps: ``[num_steps]`` on the CPU, as the scheduler wants them.
        timesteps: ``[num_steps]`` on the device, between 0 and 1, as the transformer wants them.
        guidance: ``[1]``, float32 on the device, or ``None`` where the transformer has no guidance embedding.
        guided_steps: of its first steps, which have a negative row too.
        true_cfg_scale: counts where `conditioning` has a negative prompt.
        image_ids: ``[tokens, 3]``, the row and column of every token.
        reach: for each step ``None``, or, where it does without the transformer's blocks, how far what they added is
            drawn out. Empty where no step does.
        added: what the blocks added to the positive and to the negative row.
    """

    conditioning: Conditioning
    latents: torch.Tensor
    scheduler: Any
    scheduler_timesteps: torch.Tensor
    step_options: dict[str, Any]
    timesteps: torch.Tensor
    guidance: torch.Tensor | None
    guided_steps: int
    true_cfg_scale: float
    image_ids: torch.Tensor
    kept: Kept | None
    loras: Loras
    reach: tuple[float | None, ...] = ()
    added: tuple[Added, Added] = field(default_factory=lambda: (Added(), Added()))

    @property
    def without_blocks(self) -> bool:
        """Whether the next step leaves the transformer's blocks out."""
        return bool(self.reach) and not self.done and self.reach[self.step_index] is not None

    @property
    def negative(self) -> Embedding | None:
        """What the next step steers away from."""
        return self.conditioning.negative if self.step_index < self.guided_steps else None
