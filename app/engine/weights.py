"""Where weights come from and where they go: the folder, its family, the number format and the device.

torch and diffusers are imported inside functions: finding out that a folder is missing takes no seconds, and the
server answers HTTP before they are loaded.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.engine.family import Family
from app.errors import ModelLoadFailed
from app.settings import Settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
FAMILIES = {"StableDiffusionXLPipeline": "sdxl"}


def load_family(settings: Settings) -> Family[Any]:
    """Load the model that `settings` name, on its device.

    Raises:
        ModelLoadFailed: with one sentence that names the folder or file and what to do.
    """
    folder = find_folder(settings.model_id)
    model_type = read_model_type(folder)
    if settings.model_type not in ("auto", model_type):
        raise ModelLoadFailed(f"{folder} holds a model of type {model_type}, not {settings.model_type}.")

    import diffusers
    import torch
    import transformers

    # Both libraries log prompts that are too long, word for word.
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    logger.info("loading %s as %s on %s", folder, dtype, device)
    try:
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
            variant=_variant(folder),
        )
        if dtype == torch.float16 and pipeline.vae.config.force_upcast:
            # Decided once, here: this VAE overflows in float16.
            pipeline.vae.to(torch.float32)
        pipeline.to(device)
    except torch.OutOfMemoryError:
        raise ModelLoadFailed(f"{device} has too little memory for the model in {folder}.") from None
    except Exception as error:
        raise ModelLoadFailed(f"The model in {folder} cannot be loaded: {_first_line(error)}") from error

    from app.engine.sdxl import SdxlFamily

    return SdxlFamily(pipeline)


def find_folder(model_id: str) -> Path:
    """The folder of the model.

    Raises:
        ModelLoadFailed: there is none.
    """
    if model_id == DEMO:
        return DEMO_WEIGHTS / "sdxl"
    folder = Path(model_id)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ModelLoadFailed(
            f"The model folder {model_id} {what}; mount a model there, name another one with --model_id, or try the "
            "small demo model with --model_id demo."
        )
    return folder


def read_model_type(folder: Path) -> str:
    """The family of the model in `folder`, by its ``model_index.json``."""
    index = folder / "model_index.json"
    try:
        class_name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        raise ModelLoadFailed(
            f"{index} does not exist; the model folder must be in diffusers' layout, with one folder per component."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadFailed(f"{index} cannot be read: {error!r}.") from None
    if not isinstance(class_name, str) or class_name not in FAMILIES:
        raise ModelLoadFailed(f"{index} names the pipeline {class_name}; served are {', '.join(FAMILIES)}.")
    return FAMILIES[class_name]


def choose_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ModelLoadFailed(f"--device is {name}, but no GPU is visible here; use --device cpu.")
        if (device.index or 0) >= count:
            raise ModelLoadFailed(f"--device is {name}, but only {count} GPUs are visible here, counted from 0.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _variant(folder: Path) -> str | None:
    """Prefer half-precision files where the folder has both."""
    return "fp16" if list(folder.glob("unet/*.fp16.safetensors")) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
