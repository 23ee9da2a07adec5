"""FLUX pipelines with every part of the real ones, tiny and random, from seeds: quick to make, quick to run."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from app.engine.weights import DEMO_WEIGHTS

WIDTH = 32
CHANNELS = 4


def make_flux(*, guidance_embeds: bool = True, use_dynamic_shifting: bool = True, **vae_options: Any) -> FluxPipeline:
    """A tiny FLUX of random weights, always the same ones.

    Args:
        guidance_embeds: as FLUX.1-dev's transformer has them, schnell's not.
        use_dynamic_shifting: as FLUX.1-dev's scheduler does, schnell's not.
        vae_options: what differs in the VAE's configuration.
    """
    torch.manual_seed(7)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_WEIGHTS / "sdxl" / "tokenizer")
    tokenizer_2 = make_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **{"sample_size": 64, "scaling_factor": 0.4, "shift_factor": 0.1, **vae_options},
    )
    with torch.no_grad():
        # Random models paint almost grey and hardly read: a wrong latent or another prompt should be seen.
        vae.decoder.conv_out.weight *= 3
        transformer.proj_out.weight *= 2
        transformer.context_embedder.weight *= 8
        transformer.time_text_embed.text_embedder.linear_1.weight *= 4
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=use_dynamic_shifting),
        vae=vae.eval(),
        text_encoder=_make_clip(tokenizer).eval(),
        tokenizer=tokenizer,
        text_encoder_2=_make_t5(tokenizer_2).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )


def make_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer that reads letter by letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(letter, -2.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return T5TokenizerFast(vocab=special + letters, extra_ids=0, model_max_length=512)


def _make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
