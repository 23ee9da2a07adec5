"""The parts of the demo FLUX before training. Nothing here knows a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from app.demo.training.base import make_text_encoder
from app.demo.training.vocabulary import END_PADS, make_clip_tokenizer, make_t5_tokenizer

WIDTH = 64
"""Numbers per token that either text encoder hands to the transformer."""
REACH = 3
"""Tokens this far apart, or farther, look alike to T5's position bias."""
PRESENT, PADDING = 0, 1
"""Two of T5's `WIDTH` channels, which mark every token and every padding token. See `hide_padding`."""


def make_clip(folder: Path) -> tuple[object, CLIPTextModel]:
    """FLUX's first text encoder, whose tokenizer's files are written to `folder`."""
    tokenizer = make_clip_tokenizer(folder, END_PADS)
    return tokenizer, make_text_encoder(tokenizer, layers=2, projection=False)


def make_t5() -> tuple[T5TokenizerFast, T5EncoderModel]:
    """FLUX's second text encoder: T5 v1.1 in small, blind to padding."""
    tokenizer = make_t5_tokenizer()
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=REACH,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    hide_padding(encoder, tokenizer.pad_token_id)
    return tokenizer, encoder


@torch.no_grad()
def hide_padding(encoder: T5EncoderModel, pad: int) -> None:
    """Write an attention mask into T5's weights: whatever is learned, no token looks at padding.

    FluxPipeline pads captions to 512 tokens and hands T5 no mask. So one channel is 1 in every embedding, another
    only in padding's; in each head, queries read the first and keys the second, with weights that make their product
    hugely negative; and no layer writes to either channel. The gradients of all those weights are held at zero.
    """
    loud = 100.0

    def hold(weight: torch.Tensor, *held: slice) -> None:
        free = torch.ones_like(weight)
        free[held] = 0.0
        weight.register_hook(free.mul)  # type: ignore[no-untyped-call]

    def hold_at_zero(weight: torch.Tensor, *held: slice) -> None:
        weight[held] = 0.0
        hold(weight, *held)

    everything, marks = slice(None), slice(PRESENT, PADDING + 1)
    hold_at_zero(encoder.shared.weight, everything, marks)
    encoder.shared.weight[:, PRESENT] = 1.0
    encoder.shared.weight[pad, PADDING] = 1.0
    for block in encoder.encoder.block:
        attention, feed_forward = block.layer[0], block.layer[1]
        size = attention.SelfAttention.key_value_proj_dim
        for projection, channel, value in (
            (attention.SelfAttention.q, PRESENT, loud),
            (attention.SelfAttention.k, PADDING, -loud),
        ):
            firsts = slice(None, None, size)
            hold_at_zero(projection.weight, firsts)
            projection.weight[firsts, channel] = value
        hold_at_zero(attention.SelfAttention.o.weight, marks)
        hold_at_zero(feed_forward.DenseReluDense.wo.weight, marks)
        hold(attention.layer_norm.weight, marks)


def make_transformer(channels: int) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer in small, with a guidance embedding.

    Args:
        channels: four times the autoencoder's, as latents are packed two by two.
    """
    transformer = FluxTransformer2DModel(
        in_channels=channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # Every block begins as doing nothing, and the whole as saying nothing: learning starts faster from there.
    silent = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        silent += [block.norm1.linear, block.norm1_context.linear]
    silent += [block.norm.linear for block in transformer.single_transformer_blocks]
    for layer in silent:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return transformer


def make_flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Shifts by size as FLUX.1-dev's does, between the sizes that this model knows: 64 to 256 packed tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=64,
        max_image_seq_len=256,
    )
