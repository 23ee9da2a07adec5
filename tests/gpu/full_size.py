"""Full-size models of random weights, made from their configurations on the device that they are for.

Their forward passes for one picture can be run on the meta device, to count what they compute and how much they hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers import FluxPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from torch import nn

from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.sdxl import SdxlFamily
from app.engine.weights import DEMO_WEIGHTS
from tests.tiny_flux import make_t5_tokenizer

META = torch.device("meta")
CLIP_TOKENS = 77


def make_components(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    drawn: torch.dtype | None = None,
    known: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Everything that the pipeline of `folder` is made of.

    Args:
        folder: in diffusers' layout; weights are not looked for.
        device: where the weights are made; ``meta`` for none at all.
        dtype: of the weights.
        drawn: as which they are drawn; with the same one, weights of other dtypes hold the same numbers.
        known: components to take as they are.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    components: dict[str, Any] = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in known:
            components[name] = known[name]
            continue
        library, class_name = entry
        if name.startswith("tokenizer"):
            components[name] = _make_tokenizer(class_name)
            continue
        kind = getattr(transformers if library == "transformers" else diffusers, class_name)
        if name == "scheduler":
            components[name] = kind.from_config(kind.load_config(folder / name))
            continue
        with accelerate.init_empty_weights():
            if library == "transformers":
                module = kind(kind.config_class.from_pretrained(folder / name))
            else:
                module = kind.from_config(kind.load_config(folder / name))
        if generator is not None:
            _fill(module, generator, dtype, drawn or dtype)
            _calm(module, drawn or dtype)
        if library == "transformers":
            module.tie_weights()
        components[name] = module.eval()
    return components


def make_models(
    folders: Sequence[Path], device: torch.device, dtype: torch.dtype, drawn: torch.dtype | None = None
) -> list[dict[str, Any]]:
    """The components of a base and of a refiner, if there is one, which shares with its base what the server shares."""
    base = make_components(folders[0], device, dtype, drawn)
    shared = {name: base[name] for name in ("text_encoder_2", "vae")}
    return [base, *(make_components(folder, device, dtype, drawn, shared) for folder in folders[1:])]


def modules(made: Sequence[Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Every module of `made` once."""
    parts: dict[str, nn.Module] = {}
    for i, components in enumerate(made):
        for name, part in components.items():
            if isinstance(part, nn.Module) and not any(part is other for other in parts.values()):
                parts[f"{name} {i}"] = part
    return parts


def assemble(made: Sequence[Mapping[str, Any]], **options: Any) -> Family[Any]:
    """The family of these components, with options of its own."""
    base, *others = made
    if "transformer" in base:
        return FluxFamily(FluxPipeline(**base), **options)
    pipeline = StableDiffusionXLPipeline(**base, add_watermarker=False)
    if not others:
        return SdxlFamily(pipeline, **options)
    absent: dict[str, None] = {"text_encoder": None, "tokenizer": None}
    refiner = StableDiffusionXLImg2ImgPipeline(
        **absent, **others[0], requires_aesthetics_score=True, add_watermarker=False
    )
    return SdxlFamily(pipeline, refiner, **options)


def forward(
    name: str, components: Mapping[str, Any], dtype: torch.dtype, side: int, t5_tokens: int
) -> Callable[[], Any]:
    """One forward pass for one picture: of the UNet two rows, as guidance has it; the VAE's decoding; one prompt.

    Args:
        name: of the component.
        components: on the meta device.
        dtype: of what goes in.
        side: of the picture, pixels.
        t5_tokens: that T5 reads.
    """

    def tensor(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, device=META, dtype=kind)

    module = components[name]
    config = module.config
    if name == "unet":
        pooled = components["text_encoder_2"].config.projection_dim
        ids = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        conditions = {"text_embeds": tensor(2, pooled), "time_ids": tensor(2, ids)}
        hidden = tensor(2, CLIP_TOKENS, config.cross_attention_dim)
        small = _latent_side(components, side)
        return lambda: module(
            tensor(2, config.in_channels, small, small),
            tensor(2),
            encoder_hidden_states=hidden,
            added_cond_kwargs=conditions,
        )
    if name == "transformer":
        packed = (_latent_side(components, side) // 2) ** 2
        return lambda: module(
            hidden_states=tensor(1, packed, config.in_channels),
            encoder_hidden_states=tensor(1, t5_tokens, config.joint_attention_dim),
            pooled_projections=tensor(1, config.pooled_projection_dim),
            timestep=tensor(1),
            guidance=tensor(1) if config.guidance_embeds else None,
            img_ids=tensor(packed, 3),
            txt_ids=tensor(t5_tokens, 3),
        )
    if name == "vae":
        small = _latent_side(components, side)
        return lambda: module.decode(tensor(1, config.latent_channels, small, small))
    tokens = t5_tokens if config.model_type == "t5" else CLIP_TOKENS
    return lambda: module(tensor(1, tokens, kind=torch.long))


def _latent_side(components: Mapping[str, Any], side: int) -> int:
    scale: int = 2 ** (len(components["vae"].config.block_out_channels) - 1)
    return side // scale


def count_parameters(components: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in components.items()
        if isinstance(module, nn.Module)
    }


def _make_tokenizer(class_name: str) -> Any:
    # Random models do not mind whose words they read, as long as there are enough numbers for them.
    if class_name.startswith("T5"):
        return make_t5_tokenizer()
    return transformers.CLIPTokenizer.from_pretrained(DEMO_WEIGHTS / "sdxl" / "tokenizer")


def _fill(module: nn.Module, generator: torch.Generator, dtype: torch.dtype, drawn: torch.dtype) -> None:
    """Norms that do nothing, and noise as strong as keeps numbers about as large as they are."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            options: Any = {"device": generator.device, "dtype": drawn}
            if parameter.ndim < 2:
                value = torch.full(parameter.shape, float(name == "weight"), **options)
            else:
                value = torch.empty(parameter.shape, **options)
                value.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            setattr(part, name, nn.Parameter(value.to(dtype), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer.to(generator.device), persistent=False)


def _calm(module: nn.Module, drawn: torch.dtype) -> None:
    """Read time by its slow waves, as trained models do: the fast ones tell of what half precision rounds away."""
    for name, part in module.named_modules():
        if name.endswith(("time_embedding", "timestep_embedder", "guidance_embedder")):
            weight = part.linear_1.weight
            half = weight.shape[1] // 2
            frequencies = 10_000 ** -(torch.arange(half, device=weight.device) / half)
            weight.copy_((weight.float() / (1 + 1000 * frequencies).repeat(2)).to(drawn))
