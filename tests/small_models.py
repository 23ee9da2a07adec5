"""Small models that go with the demo: a refiner, one that inpaints, and one that is soon compiled, with random weights
from a seed."""

from __future__ import annotations

import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from app.engine.weights import DEMO_WEIGHTS


def load_demo() -> StableDiffusionXLPipeline:
    """The demo model as anyone loads it."""
    return StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)


def make_refiner(base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """A refiner as SDXL's: one text encoder, aesthetic scores, and the base's second encoder and VAE."""
    torch.manual_seed(11)
    width = base.text_encoder_2.config.hidden_size
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # Five numbers of eight dimensions each: two sizes, and one score.
        projection_class_embeddings_input_dim=base.text_encoder_2.config.projection_dim + 5 * 8,
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler.from_config(base.scheduler.config),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def load_smaller() -> StableDiffusionXLPipeline:
    """The demo with a UNet that paints nothing and has half of the blocks, each of which takes time to compile."""
    base = load_demo()
    base.register_modules(unet=_make_unet(base, seed=2))
    return base


def make_inpainting(base: StableDiffusionXLPipeline) -> StableDiffusionXLInpaintPipeline:
    """A model that only inpaints: its UNet sees the mask and the masked picture in five channels more."""
    return StableDiffusionXLInpaintPipeline(**{**base.components, "unet": _make_unet(base, seed=3, in_channels=9)})


def _make_unet(base: StableDiffusionXLPipeline, seed: int, **config: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    shape = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 1),
    }
    return UNet2DConditionModel.from_config({**base.unet.config, **shape, **config}).eval()
