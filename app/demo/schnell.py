"""A schnell-like FLUX made from the dev-like one, as FLUX.1-schnell's folders look: no guidance, no shift by size."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

GUIDANCE = 3.5
"""The guidance scale that the schnell-like model always has: FluxPipeline's default."""


@torch.no_grad()
def make_schnell(flux_folder: Path, out: Path) -> None:
    """Write a FLUX without guidance embedding that predicts what `flux_folder` predicts at guidance 3.5.

    The embeddings of time, guidance and pooled caption are summed, so the one of guidance at 3.5 is a constant that
    goes into the last bias of the timestep's. The files are in float32: rounded, that bias would no longer fit.

    Args:
        flux_folder: a FLUX.1-dev in diffusers' layout.
        out: receives the whole pipeline.
    """
    pipeline = FluxPipeline.from_pretrained(flux_folder, dtype=torch.float32)
    dev = pipeline.transformer
    embed = dev.time_text_embed
    constant = embed.guidance_embedder(embed.time_proj(torch.tensor([GUIDANCE * 1000])))[0]

    schnell = FluxTransformer2DModel.from_config(dev.config, guidance_embeds=False)
    weights = {name: weight for name, weight in dev.state_dict().items() if "guidance_embedder" not in name}
    weights["time_text_embed.timestep_embedder.linear_2.bias"] += constant
    schnell.load_state_dict(weights)

    pipeline.register_modules(
        transformer=schnell,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
    )
    pipeline.save_pretrained(out, safe_serialization=True)
