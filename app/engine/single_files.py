"""Models that are one safetensors file: what such a file holds, and where the configuration for it comes from.

A checkpoint has weights but neither configurations nor vocabularies. Those come from a folder in diffusers' layout, or
from the configurations of SDXL 1.0 and FLUX.1 that ship with us. Everything here is read from headers and JSON; torch
is not imported.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.engine.checkpoints import Checkpoint, check_suffix, read_checkpoint
from app.engine.folders import NAMES, Kind, ModelFolder, is_model_folder, read_index, read_json
from app.engine.scheduler_names import EDM
from app.errors import ModelLoadFailed

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"

VELOCITY = (
    # The name of a tensor without content by which UIs tell such models, and what it means to the noise schedule.
    ("v_pred", "prediction_type", "v_prediction"),
    ("ztsnr", "rescale_betas_zero_snr", True),
)

UNET = "model.diffusion_model."
EDM_MARKS = ("edm_mean", "edm_vpred.sigma_max")
"""Playground 2.5 and CosXL have SDXL's shapes but other noise levels, and say so by a tensor."""
BASE_ENCODER = "conditioner.embedders.0.transformer."
BASE_ENCODER_2 = "conditioner.embedders.1.model."
REFINER_ENCODER = "conditioner.embedders.0.model."
VAES = ("first_stage_model.", "vae.")

RELATIVES = (
    # Part of a tensor's name, and what a file is that has it and otherwise looks like one of ours.
    ("controlnet_", "a ControlNet, which is not served; take an SDXL or FLUX model"),
    ("distilled_guidance_layer.", "a Chroma model, which is not served; take an SDXL or FLUX.1 model"),
    ("double_stream_modulation_img.", "a FLUX.2 model, which is not served; take an SDXL or FLUX.1 model"),
    (
        ".quant_state.bitsandbytes__",
        "a model in 4 bits of bitsandbytes, which is not read; take it in 8 or 16, perhaps with --quantization nf4",
    ),
)
FLUX_TOOLS: Mapping[tuple[int, ...], str] = MappingProxyType(
    {(3072, 128): "FLUX.1 Depth or Canny", (3072, 384): "FLUX.1 Fill"}
)
"""Models that read a second picture in every step, by the shape of their first layer."""

OTHERS = (
    # The beginning of a tensor's name, and what a file with such a tensor is.
    ("lora_", "a LoRA adapter; name it with --lora and the model it belongs to with --model_id"),
    ("cond_stage_model.", "a Stable Diffusion 1 or 2 model, which is not served; take an SDXL or FLUX model"),
    ("control_model.", "a ControlNet, which is not served; take an SDXL or FLUX model"),
    ("joint_blocks.", "a Stable Diffusion 3 model, which is not served; take an SDXL or FLUX model"),
    ("input_blocks.", "a UNet alone; take a file with the whole model, or a folder in diffusers' layout"),
    ("down_blocks.", "a UNet alone; put it into a folder in diffusers' layout and name that with --model_id"),
    ("decoder.", "a VAE alone; take a file with the whole model, or a folder in diffusers' layout"),
    ("text_model.", "a text encoder alone; take a file with the whole model, or a folder in diffusers' layout"),
)


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint and the configuration to read it with.

    Attributes:
        config: a folder in diffusers' layout; its weights are not needed.
        shipped: is that one of ours, which has no vocabulary?
        overrides: what the file itself knows better, for the UNet or transformer.
    """

    checkpoint: Checkpoint
    kind: Kind
    config: Path
    shipped: bool
    overrides: Mapping[str, object]

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def size(self) -> int:
        return self.checkpoint.size

    @property
    def schedule(self) -> dict[str, object]:
        """What the file itself knows better, for the scheduler."""
        return {entry: value for name, entry, value in VELOCITY if name in self.checkpoint.shapes}


Source = ModelFolder | SingleFile
"""What weights are read from."""


def read_single_file(path: Path, config_dir: Path | None, flag: str, near: tuple[Path, ...] = ()) -> SingleFile:
    """Check a single file and find its configuration.

    Args:
        path: of the file.
        config_dir: the folder that was named for it; it must fit.
        flag: the setting that names such a folder, for sentences.
        near: folders that may have the configuration too, and are passed over where they do not fit.

    Raises:
        ModelLoadFailed: naming the file and what to do.
    """
    check_suffix(path)
    checkpoint = read_checkpoint(path)
    kind = detect(checkpoint)
    overrides = _overrides(checkpoint, kind)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ModelLoadFailed(
                f"{config_dir} is not a folder; --{flag} names a folder in diffusers' layout with configurations."
            )
        said, _ = read_index(config_dir)
        if said is not kind:
            raise ModelLoadFailed(f"{path} holds {NAMES[kind]}, but {config_dir} configures {NAMES[said]}.")
        if _is_edm(checkpoint) and not _configures_edm(config_dir):
            raise ModelLoadFailed(
                f"{path} was trained with other noise levels than the scheduler in {config_dir} has, which must be "
                f"{' or '.join(EDM)}; name the model's own folder with --{flag}."
            )
        return SingleFile(checkpoint, kind, config_dir, False, overrides)
    for folder in (*near, path.parent):
        if _configures(folder, checkpoint, kind):
            logger.info("%s: taking the configuration in %s", path, folder)
            return SingleFile(checkpoint, kind, folder, False, overrides)
    config = CONFIGS / _shipped(kind, overrides)
    if not _fits(checkpoint, kind, config):
        raise ModelLoadFailed(
            f"{path} holds {NAMES[kind]} of another architecture than those whose configuration is known here; name a "
            f"folder in diffusers' layout with its configuration with --{flag}."
        )
    logger.info("%s: taking the configuration of %s", path, config.name)
    return SingleFile(checkpoint, kind, config, True, overrides)


def _configures(folder: Path, checkpoint: Checkpoint, kind: Kind) -> bool:
    try:
        return is_model_folder(folder) and read_index(folder)[0] is kind and _fits(checkpoint, kind, folder)
    except ModelLoadFailed:
        return False


def detect(checkpoint: Checkpoint) -> Kind:
    """The kind of a model, by the names of its tensors.

    Raises:
        ModelLoadFailed: something else, which the sentence names.
    """
    names = checkpoint.shapes
    for part, what in RELATIVES:
        if any(part in name for name in names):
            raise ModelLoadFailed(f"{checkpoint.path} is {what}.")
    if any(name.endswith(".weight_scale") and math.prod(shape[1:]) > 1 for name, shape in names.items()):
        # A scale for each block of a row.
        raise ModelLoadFailed(
            f"{checkpoint.path} is a model in NVFP4 or MXFP8, which is not read; take it in FP8 or 16 bits."
        )
    if flux_prefix(checkpoint) is not None or is_diffusers_flux(checkpoint):
        if tool := FLUX_TOOLS.get(_flux_input(checkpoint)):
            raise ModelLoadFailed(f"{checkpoint.path} is {tool}, which is not served; take FLUX.1 dev or schnell.")
        return Kind.FLUX
    for kind, encoders in ((Kind.SDXL, (BASE_ENCODER, BASE_ENCODER_2)), (Kind.REFINER, (REFINER_ENCODER,))):
        parts = {"UNet": (UNET,), "VAE": VAES} | {f"text encoder ({each}*)": (each,) for each in encoders}
        found = {what: any(name.startswith(beginnings) for name in names) for what, beginnings in parts.items()}
        if any(found[what] for what in found if what.startswith("text encoder")):
            missing = [what for what, there in found.items() if not there]
            if missing:
                raise ModelLoadFailed(
                    f"{checkpoint.path} holds {NAMES[kind]} without its {missing[0]}; take a file with the whole model."
                )
            if checkpoint.shapes.get(f"{UNET}input_blocks.0.0.weight", ())[1:2] == (8,):
                raise ModelLoadFailed(
                    f"{checkpoint.path} edits pictures as InstructPix2Pix and CosXL Edit do, which is not served; take "
                    "a base model, or one that inpaints."
                )
            return kind
    if any(".lora_" in name or ".lora." in name for name in names):
        raise ModelLoadFailed(f"{checkpoint.path} is {OTHERS[0][1]}.")
    for beginning, what in OTHERS:
        if any(name.removeprefix(UNET).startswith(beginning) for name in names):
            raise ModelLoadFailed(f"{checkpoint.path} is {what}.")
    example = min(names)
    raise ModelLoadFailed(
        f"{checkpoint.path} is neither an SDXL nor a FLUX checkpoint: it has tensors such as {example[:80]!r}."
    )


def flux_prefix(checkpoint: Checkpoint) -> str | None:
    """What precedes the names of a FLUX transformer in Black Forest Labs' own layout; ``None``: it is not in that."""
    for prefix in ("", UNET):
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in checkpoint.shapes:
            return prefix
    return None


def is_diffusers_flux(checkpoint: Checkpoint) -> bool:
    """Is it a FLUX transformer in diffusers' own layout?"""
    return {"x_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight"} <= checkpoint.shapes.keys()


def _flux_input(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The shape of a FLUX transformer's first layer."""
    shapes = checkpoint.shapes
    return shapes.get(f"{flux_prefix(checkpoint) or ''}img_in.weight") or shapes.get("x_embedder.weight") or ()


def _overrides(checkpoint: Checkpoint, kind: Kind) -> dict[str, object]:
    if kind is Kind.FLUX:
        guidance = any("guidance_in." in name or "guidance_embedder." in name for name in checkpoint.shapes)
        # FLUX.1 lite and its like are FLUX.1 without some of its blocks.
        blocks = {"num_layers": r"(double|transformer)_blocks", "num_single_layers": r"single_(transformer_)?blocks"}
        return {"guidance_embeds": guidance} | {name: _count(checkpoint, each) for name, each in blocks.items()}
    first = checkpoint.shapes.get(f"{UNET}input_blocks.0.0.weight", ())
    # Inpainting models take the mask and the masked picture as further channels.
    return {"in_channels": first[1] if len(first) > 1 else 4}


def _count(checkpoint: Checkpoint, blocks: str) -> int:
    """How many blocks there are whose names match."""
    pattern = re.compile(rf"({re.escape(UNET)})?{blocks}\.(\d+)\.")
    found = [each for each in map(pattern.match, checkpoint.shapes) if each]
    return 1 + max((int(each[each.re.groups]) for each in found), default=-1)


def _shipped(kind: Kind, overrides: Mapping[str, object]) -> str:
    if kind is Kind.FLUX:
        return "flux-dev" if overrides["guidance_embeds"] else "flux-schnell"
    return "sdxl-base" if kind is Kind.SDXL else "sdxl-refiner"


def _fits(checkpoint: Checkpoint, kind: Kind, config: Path) -> bool:
    """Is that the configuration of such a checkpoint, judged by a few telling widths?"""
    shapes = checkpoint.shapes
    try:
        if _is_edm(checkpoint):
            return _configures_edm(config)
        if kind is Kind.FLUX:
            transformer = _config(config, "transformer")
            width = int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"])
            return _flux_input(checkpoint) == (width, transformer["in_channels"])
        unet, encoder = _config(config, "unet"), _config(config, "text_encoder_2")
        channels = unet["block_out_channels"]
        prefix = BASE_ENCODER_2 if kind is Kind.SDXL else REFINER_ENCODER
        return (
            shapes[f"{UNET}input_blocks.0.0.weight"][0] == channels[0]
            and shapes[f"{UNET}label_emb.0.0.weight"]
            == (4 * channels[0], unet["projection_class_embeddings_input_dim"])
            and shapes[f"{prefix}token_embedding.weight"] == (encoder["vocab_size"], encoder["hidden_size"])
        )
    except (ModelLoadFailed, KeyError, IndexError, TypeError, ValueError, OSError):
        return False


def _is_edm(checkpoint: Checkpoint) -> bool:
    return any(name in checkpoint.shapes for name in EDM_MARKS)


def _configures_edm(config: Path) -> bool:
    scheduler = read_index(config)[1].get("scheduler")
    return isinstance(scheduler, list) and scheduler[-1] in EDM


def _config(folder: Path, component: str) -> dict[str, Any]:
    return read_json(folder / component / "config.json")
