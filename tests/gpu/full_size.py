"""Full-size models of random weights, made from their configurations on the device that they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from torch import nn

from app.engine.weights import DEMO_WEIGHTS
from tests.tiny_flux import make_t5_tokenizer


def make_components(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the pipeline of `folder` is made of.

    Args:
        folder: in diffusers' layout; weights are not looked for.
        device: where the weights are made; ``meta`` for none at all.
        dtype: of the weights.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    components: dict[str, Any] = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if not isinstance(entry, list) or entry[0] is None:
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
            _fill(module, generator, dtype)
        if library == "transformers":
            module.tie_weights()
        components[name] = module.eval()
    return components


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


def _fill(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Norms that do nothing, and noise as strong as keeps numbers about as large as they are."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            options: Any = {"device": generator.device, "dtype": dtype}
            if parameter.ndim < 2:
                value = torch.full(parameter.shape, float(name == "weight"), **options)
            else:
                value = torch.empty(parameter.shape, **options)
                value.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            setattr(part, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer.to(generator.device), persistent=False)
