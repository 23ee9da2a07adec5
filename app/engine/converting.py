"""Reads the components of a model out of one checkpoint in its authors' own layout.

diffusers converts and reads; what it cannot do is done here: tell two text encoders of one width apart, convert FLUX
transformers of any width, and refuse a configuration that does not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from app.engine.folders import ModelFolder, read_json
from app.engine.loading import BIG, Format, Progress, check_shapes, load_folder, make_clip_tokenizer, settle, told
from app.engine.single_files import (
    BASE_ENCODER,
    BASE_ENCODER_2,
    CONFIGS,
    REFINER_ENCODER,
    UNET,
    VAES,
    SingleFile,
    flux_prefix,
)

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def load_sdxl_file(
    file: SingleFile, numbers: Format, progress: Progress, flag: str, known: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Every component of an SDXL base model or refiner, by name.

    Args:
        file: checked.
        numbers: in which numbers.
        progress: hears of each.
        flag: the setting that names a folder with configurations, for sentences.
        known: components that are taken instead of making them, such as another model's tokenizer.

    Raises:
        ModelLoadFailed: naming the file and what to do.
    """
    with told(str(file.path)):
        tensors = load_file(file.path)
        sizes = {prefix: _size(tensors, prefix) for prefix in _prefixes(file)}  # in the file
        tensors = unscale(tensors, numbers.dtype)
    loaded = dict(known or {})
    for name in ("tokenizer", "tokenizer_2"):
        if name not in loaded and (name == "tokenizer_2" or BASE_ENCODER in sizes):
            loaded[name] = make_clip_tokenizer(file.config, name, flag, file.path)
    loaded["scheduler"] = load_scheduler(file.config, file.schedule)
    encoders = (
        {"text_encoder": BASE_ENCODER, "text_encoder_2": BASE_ENCODER_2}
        if BASE_ENCODER in sizes
        else {"text_encoder_2": REFINER_ENCODER}
    )
    for name, prefix in encoders.items():
        with progress.reading(name, sizes[prefix]):
            loaded[name] = _load_text_encoder(file, name, tensors, prefix, numbers)
    with progress.reading("unet", sizes[UNET]):
        loaded["unet"] = _load_module(
            file,
            "unet",
            diffusers.UNet2DConditionModel,
            lambda config: single_file_utils.convert_ldm_unet_checkpoint(tensors, config),
            numbers,
        )
    with progress.reading("vae", sum(sizes.get(prefix, 0) for prefix in VAES)):
        loaded["vae"] = _load_module(
            file,
            "vae",
            diffusers.AutoencoderKL,
            lambda config: single_file_utils.convert_ldm_vae_checkpoint(tensors, config),
            numbers,
        )
    return loaded


def load_flux_file(file: SingleFile, rest: ModelFolder, numbers: Format, progress: Progress) -> dict[str, Any]:
    """A FLUX model whose transformer is a single file and whose other components are in a folder.

    Args:
        file: checked; in Black Forest Labs' own layout or in diffusers'.
        rest: text encoders, tokenizers, VAE and scheduler.
        numbers: in which numbers.
        progress: hears of each.

    Raises:
        ModelLoadFailed: naming the file and what to do.
    """
    loaded = load_folder(rest, numbers, progress, without=["transformer"])
    prefix = flux_prefix(file.checkpoint)

    def convert(_config: Mapping[str, Any]) -> Tensors:
        tensors = unscale(load_file(file.path), numbers.dtype, prefix or "")
        return tensors if prefix is None else convert_flux(tensors, prefix)

    with progress.reading("transformer", file.checkpoint.size):
        loaded["transformer"] = _load_module(file, "transformer", diffusers.FluxTransformer2DModel, convert, numbers)
    guided = bool(file.overrides["guidance_embeds"])
    config = rest.path if file.shipped else file.config
    if guided is not bool(read_json(config / "transformer" / "config.json").get("guidance_embeds")):
        # The transformer decides: dev's among schnell's other components was still trained for dev's schedule.
        config = CONFIGS / ("flux-dev" if guided else "flux-schnell")
        logger.info("%s: taking the scheduler of %s, which such a transformer was trained for", file.path, config.name)
    loaded["scheduler"] = load_scheduler(config)
    return loaded


def load_scheduler(config: Path, overrides: Mapping[str, object] = MappingProxyType({})) -> Any:
    """The scheduler that the configuration of a model names, with `overrides` in place of entries of its own."""
    folder = config / "scheduler"
    with told(str(folder)):
        class_name = read_json(folder / "scheduler_config.json")["_class_name"]
        return getattr(diffusers, class_name).from_pretrained(folder, local_files_only=True, **overrides)


SCALES = ("scale_weight", "weight_scale")
"""What UIs call the number by which weights in 8 bits are multiplied, as of today and before."""
ASIDE = (*SCALES, "scale_input", "input_scale", "scaled_fp8", "comfy_quant")
"""What they keep beside such weights."""


def unscale(tensors: Tensors, dtype: torch.dtype, prefix: str = "") -> Tensors:
    """`tensors` whose names begin with `prefix`; weights in 8 bits that have a scale beside them, multiplied by it."""
    plain = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not name.startswith(prefix) or kind in ASIDE:
            continue
        scale = next((tensors[each] for each in (f"{layer}.{what}" for what in SCALES) if each in tensors), None)
        if kind == "weight" and scale is not None:
            # One for all, or one for each row.
            rows = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
            plain[name] = (tensor.float() * rows).to(dtype)
        else:
            plain[name] = tensor
    return plain


def _prefixes(file: SingleFile) -> list[str]:
    every = (BASE_ENCODER, BASE_ENCODER_2, REFINER_ENCODER, UNET, *VAES)
    return [prefix for prefix in every if any(name.startswith(prefix) for name in file.checkpoint.shapes)]


def _size(tensors: Tensors, prefix: str) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(prefix))


def _load_module(
    file: SingleFile, name: str, cls: Any, convert: Callable[[Mapping[str, Any]], Tensors], numbers: Format
) -> Any:
    with told(str(file.path)):
        config = read_json(file.config / name / "config.json")
        overrides = {key: value for key, value in file.overrides.items() if name in BIG}
        tensors = convert(config)
        with torch.device("meta"):
            expected = cls.from_config({**config, **overrides}).state_dict()
        check_shapes(str(file.path), tensors, expected)
        options: dict[str, Any] = {"dtype": numbers.of(name, config), "device": numbers.device_of(name), **overrides}
        if name in BIG and numbers.quantization is not None:
            options["quantization_config"] = numbers.quantization
        module = cls.from_single_file(
            tensors, config=str(file.config), subfolder=name, local_files_only=True, **options
        )
        return settle(module, numbers)


def _load_text_encoder(file: SingleFile, name: str, tensors: Tensors, prefix: str, numbers: Format) -> Any:
    cls = transformers.CLIPTextModel if name == "text_encoder" else transformers.CLIPTextModelWithProjection
    with told(str(file.path)):
        # Nothing but its own tensors: diffusers tells the two encoders apart by their width alone.
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        with torch.device("meta"):
            model = cls(cls.config_class.from_pretrained(file.config / name, local_files_only=True))
        if prefix == BASE_ENCODER:
            converted = single_file_utils.convert_ldm_clip_checkpoint(own)
        else:
            converted = single_file_utils.convert_open_clip_checkpoint(model, own, prefix=prefix)
        if not hasattr(model, "text_model"):
            converted = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
        check_shapes(str(file.path), converted, model.state_dict())
        del converted
        options = {"config": str(file.config), "subfolder": name, "local_files_only": True}
        encoder = single_file_utils.create_diffusers_clip_model_from_ldm(
            cls, checkpoint=own, torch_dtype=numbers.dtype, **options
        )
        return settle(encoder.to(numbers.device_of(name)), numbers)


# --- FLUX ------------------------------------------------------------------------------------------------------

DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
"""Layers that Black Forest Labs keep in one matrix, row after row: each but the last as wide as the model."""


def convert_flux(tensors: Tensors, prefix: str) -> Tensors:
    """A FLUX transformer from Black Forest Labs' layout to diffusers', whatever its width.

    diffusers' own conversion knows the width of FLUX.1 alone.

    Args:
        tensors: as in the file.
        prefix: before the names of the transformer's tensors; others are left out.
    """
    width = tensors[f"{prefix}img_in.weight"].shape[0]
    converted: Tensors = {}
    for name, tensor in tensors.items():
        if prefix and not name.startswith(prefix):
            continue
        layer, _, kind = name.removeprefix(prefix).rpartition(".")
        kind = "weight" if kind == "scale" else kind
        block, inner = _split(layer)
        table = {"transformer_blocks": DOUBLE, "single_transformer_blocks": SINGLE}.get(block.split(".")[0], OUTER)
        beginning = f"{block}." if block else ""
        if inner in FUSED:
            parts = FUSED[inner]
            rows = [width] * (len(parts) - 1)
            for part, piece in zip(parts, torch.split(tensor, [*rows, len(tensor) - sum(rows)]), strict=True):
                converted[f"{beginning}{part}.{kind}"] = piece
        elif inner == "final_layer.adaLN_modulation.1":
            # Black Forest Labs: shift, then scale; diffusers: scale, then shift.
            shift, scale = tensor.chunk(2)
            converted[f"{OUTER[inner]}.{kind}"] = torch.cat([scale, shift])
        else:
            converted[f"{beginning}{table.get(inner, inner)}.{kind}"] = tensor
    return converted


def _split(layer: str) -> tuple[str, str]:
    """``double_blocks.3.img_mlp.0`` as diffusers' name of the block and what follows; no block is an empty name."""
    for theirs, ours in (("double_blocks.", "transformer_blocks."), ("single_blocks.", "single_transformer_blocks.")):
        if layer.startswith(theirs):
            number, _, inner = layer.removeprefix(theirs).partition(".")
            return f"{ours}{number}", inner
    return "", layer
