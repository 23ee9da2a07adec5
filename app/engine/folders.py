"""Model folders in diffusers' layout: which family they hold, which files of each component, and what is wrong.

Everything is checked by names, JSON and headers before torch is imported. Nothing here knows where a folder came from
or how its files become modules.
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.engine.checkpoints import AGAIN, PICKLES, SUFFIX, Checkpoint, read_checkpoint
from app.errors import ModelLoadFailed, first_line

logger = logging.getLogger(__name__)

INDEX = "model_index.json"


class Kind(enum.StrEnum):
    """What a model is for."""

    SDXL = "sdxl"
    REFINER = "refiner"
    FLUX = "flux"


NAMES = MappingProxyType({Kind.SDXL: "an SDXL base model", Kind.REFINER: "an SDXL refiner", Kind.FLUX: "a FLUX model"})

PIPELINES = MappingProxyType(
    {
        "StableDiffusionXLPipeline": Kind.SDXL,
        "StableDiffusionXLImg2ImgPipeline": Kind.SDXL,
        "StableDiffusionXLInpaintPipeline": Kind.SDXL,
        "FluxPipeline": Kind.FLUX,
        "FluxImg2ImgPipeline": Kind.FLUX,
        "FluxInpaintPipeline": Kind.FLUX,
    }
)

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES: Mapping[Kind, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        Kind.SDXL: {
            "scheduler": (),
            "tokenizer": CLIP_TOKENIZERS,
            "tokenizer_2": CLIP_TOKENIZERS,
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
        },
        Kind.REFINER: {
            "scheduler": (),
            "tokenizer_2": CLIP_TOKENIZERS,
            "text_encoder_2": ("CLIPTextModelWithProjection",),
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
        },
        Kind.FLUX: {
            "scheduler": (),
            "tokenizer": CLIP_TOKENIZERS,
            "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast"),
            "text_encoder": ("CLIPTextModel",),
            "text_encoder_2": ("T5EncoderModel",),
            "transformer": ("FluxTransformer2DModel",),
            "vae": ("AutoencoderKL",),
        },
    }
)
"""The components of each kind, and the classes that each may be; the engine is written for these."""

OPTIONS = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")
"""Entries of the index that are settings of the pipeline."""
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a model in its own folder.

    Attributes:
        library: ``diffusers`` or ``transformers``.
        weights: its safetensors files; none for tokenizers and schedulers.
        variant: as diffusers and transformers call it, such as ``fp16``.
        size: of all weights in bytes.
    """

    name: str
    folder: Path
    library: str
    class_name: str
    weights: tuple[Path, ...] = ()
    variant: str | None = None
    size: int = 0


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder whose files have been checked as far as that goes without reading weights."""

    path: Path
    kind: Kind
    options: Mapping[str, bool]
    components: Mapping[str, Component]

    @property
    def size(self) -> int:
        return sum(component.size for component in self.components.values())


def read_folder(folder: Path, *, full_precision: bool = False, without_weights: Set[str] = frozenset()) -> ModelFolder:
    """Find and check every file that is needed of a model folder.

    Args:
        folder: which exists.
        full_precision: take no fp16 files where there are others.
        without_weights: components whose weights come from elsewhere; their configurations are still needed.

    Raises:
        ModelLoadFailed: naming the file and what to do.
    """
    kind, index = read_index(folder)
    _refuse_code(folder)
    components = {name: _component(folder, name, kind, index) for name in CLASSES[kind]}
    for component in components.values():
        _check_configuration(component)
    modules = [name for name, each in components.items() if _has_weights(each) and name not in without_weights]
    variant = None if full_precision else _common_variant([components[name] for name in modules])
    for name in modules:
        components[name] = _with_weights(components[name], variant)
    if variant:
        logger.info("%s: taking the %s files, which every component has", folder, variant)
    return ModelFolder(folder, kind, read_options(index), components)


def read_options(index: Mapping[str, Any]) -> dict[str, bool]:
    """What an index says about the pipeline itself."""
    return {name: bool(index[name]) for name in OPTIONS if index.get(name) is not None}


def is_model_folder(folder: Path) -> bool:
    """Does `folder` look like a model in diffusers' layout at all?"""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> tuple[Kind, dict[str, Any]]:
    """What ``model_index.json`` says: the kind of the model, and the whole index.

    Raises:
        ModelLoadFailed: there is none, it cannot be read, or it names a pipeline that is not served.
    """
    path = folder / INDEX
    try:
        index = read_json(path)
    except FileNotFoundError:
        raise ModelLoadFailed(f"{path} does not exist; {_what_to_name(folder)}.") from None
    class_name = index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in PIPELINES:
        raise ModelLoadFailed(f"{path} names the pipeline {class_name}; served are {', '.join(PIPELINES)}.")
    kind = PIPELINES[class_name]
    if kind is Kind.SDXL and not _names_class(index.get("text_encoder")) and _names_class(index.get("text_encoder_2")):
        kind = Kind.REFINER
    return kind, index


def _what_to_name(folder: Path) -> str:
    """What there is in a folder that is no model's, as the end of a sentence."""
    if models := sorted(path.parent for path in folder.glob(f"*/{INDEX}")):
        return f"name one of the models in it, such as {models[0]}"
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        return f"a single file, such as {files[0]}, is named with --single_file_model or --refiner_single_file_model"
    return "the model folder must be in diffusers' layout, with one folder per component"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ModelLoadFailed: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadFailed(f"{path} cannot be read: {first_line(error)}; {AGAIN}.") from None
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path} cannot be read: it is no JSON object; {AGAIN}.")
    return value


def _names_class(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _refuse_code(folder: Path) -> None:
    for path in sorted(folder.rglob("*.py")):
        raise ModelLoadFailed(
            f"{path} is a program, and a model folder that brings its own is not loaded; take a model without, or "
            "remove the file if nothing needs it."
        )


def _component(folder: Path, name: str, kind: Kind, index: Mapping[str, Any]) -> Component:
    entry = index.get(name)
    if not _names_class(entry):
        raise ModelLoadFailed(f"{folder / INDEX} names no {name}, which {NAMES[kind]} needs; {AGAIN}.")
    library, class_name = index[name]
    allowed = CLASSES[kind][name]
    served = " or ".join(allowed) or "diffusers' schedulers"
    fits = class_name in allowed if allowed else class_name.endswith("Scheduler")
    if name == "scheduler" and kind is not Kind.FLUX and class_name.startswith("FlowMatch"):
        fits, served = False, f"{served}, but for SDXL none of flow matching"
    if library not in ("diffusers", "transformers") or not fits:
        raise ModelLoadFailed(f"{folder / INDEX} names {library}.{class_name} as {name}; served are {served}.")
    return Component(name, folder / name, library, class_name)


def _has_weights(component: Component) -> bool:
    return component.name not in ("scheduler", "tokenizer", "tokenizer_2")


def _check_configuration(component: Component) -> None:
    folder = component.folder
    if not folder.is_dir():
        raise ModelLoadFailed(f"{folder} does not exist, but {INDEX} names it; download the whole model.")
    if component.name.startswith("tokenizer"):
        if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
            raise ModelLoadFailed(f"{folder} has no vocabulary (such as tokenizer.json); download the whole model.")
        if component.class_name in CLIP_TOKENIZERS:
            check_clip_tokenizer(folder)
        return
    name = "scheduler_config.json" if component.name == "scheduler" else "config.json"
    try:
        read_json(folder / name)
    except FileNotFoundError:
        raise ModelLoadFailed(f"{folder / name} does not exist; download the whole model.") from None


def check_clip_tokenizer(folder: Path) -> None:
    """Whether a folder with CLIP's tokenizer has all of it.

    Without its configuration it has no longest text. With a part of ``merges.txt`` it spells out the words whose merges
    are gone, which nothing refuses, and the pictures are of something else.

    Raises:
        ModelLoadFailed: a file is missing, or a part of one.
    """
    try:
        read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            return  # the one that is read, and a part of it would be no JSON
        vocabulary = read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError as error:
        raise ModelLoadFailed(f"{error.filename} does not exist; download the whole model.") from None
    rest = vocabulary.keys() - {line.strip().replace(" ", "") for line in lines}
    unmade = [token for token in rest if len(token.removesuffix("</w>")) > 1 and not _is_special(token)]
    if unmade:
        raise ModelLoadFailed(
            f"{folder / 'merges.txt'} is cut off, or another vocabulary's: it lacks the merges of {len(unmade)} "
            f"tokens in vocab.json, such as {min(unmade)!r}; {AGAIN}."
        )


def _is_special(token: str) -> bool:
    """Such as ``<|endoftext|>`` or ``[PAD]``, which no text is merged into."""
    return token.startswith(("<", "[")) and token.endswith((">", "]")) and not token.endswith("</w>")


# --- Files of weights ------------------------------------------------------------------------------------------


def stem(library: str) -> str:
    """How that library calls its files of weights."""
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def weight_names(library: str, variant: str | None) -> tuple[str, str]:
    """The file of weights and, where there are several, their index."""
    name = f"{stem(library)}.{variant}{SUFFIX}" if variant else f"{stem(library)}{SUFFIX}"
    index = f"{stem(library)}{SUFFIX}.index.{variant}.json" if variant else f"{stem(library)}{SUFFIX}.index.json"
    return name, index


def _exists(component: Component, variant: str | None) -> bool:
    return any((component.folder / name).is_file() for name in weight_names(component.library, variant))


def _common_variant(components: list[Component]) -> str | None:
    """``fp16`` where every component has such files: half the bytes to read."""
    return "fp16" if components and all(_exists(component, "fp16") for component in components) else None


def _with_weights(component: Component, variant: str | None) -> Component:
    if not _exists(component, variant):
        # In a mixed folder each component has only one of both.
        variant = "fp16" if _exists(component, "fp16") else None
    name, index_name = weight_names(component.library, variant)
    single, index = component.folder / name, component.folder / index_name
    whole = single.is_symlink() or single.exists()
    # Where there are both, diffusers reads the shards and transformers the whole file.
    if index.is_file() and (component.library == "diffusers" or not whole):
        files = _shards(index)
    elif whole:
        files = (single,)
    else:
        raise ModelLoadFailed(_no_weights(component, name))
    checkpoints = [read_checkpoint(file) for file in files]
    if not read_json(component.folder / "config.json").get("quantization_config"):
        for checkpoint in checkpoints:
            _refuse_integers(checkpoint)
    return replace(component, weights=files, variant=variant, size=sum(each.size for each in checkpoints))


def _refuse_integers(checkpoint: Checkpoint) -> None:
    """The libraries would take quantized weights for the weights themselves, without their scales."""
    names = sorted(name for name in checkpoint.integers if name.endswith((".weight", ".bias")))
    if names:
        raise ModelLoadFailed(
            f"{checkpoint.path} has {names[0]} in whole numbers, but its configuration says nothing of quantization; "
            "take the model in 16 bits, perhaps with --quantization."
        )


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(_plain(name) for name in names.values()):
        raise ModelLoadFailed(f"{index} has no weight_map that names files beside it; {AGAIN}.")
    shards = tuple(index.parent / name for name in sorted(set(names.values())))
    for shard in shards:
        if not shard.exists():
            raise ModelLoadFailed(f"{shard} does not exist, but {index.name} names it; download the whole model.")
    return shards


def _plain(name: object) -> bool:
    return isinstance(name, str) and name.endswith(SUFFIX) and Path(name).name == name


def _no_weights(component: Component, name: str) -> str:
    pickled = sorted(path.name for path in component.folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        return (
            f"{component.folder / pickled[0]} holds pickled weights, which can run programs when they are read; only "
            f"{SUFFIX} files are loaded: {component.folder / name} is missing."
        )
    return f"{component.folder / name} does not exist; download the whole model."
