"""Where weights go once they are read: device, number format, quantization, and which parts wait on the CPU.

Nothing here knows files.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

from app.errors import ModelLoadFailed
from app.settings import Settings

logger = logging.getLogger(__name__)

OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
BFLOAT16_SINCE = (8, 0)
"""CUDA compute capability from which bfloat16 is as fast as float16."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes.

    Attributes:
        device: of all computation.
        dtype: of all computation but the VAE's, see `app.engine.loading.Format`.
        offload: one of `OFFLOADS`: weights wait on the CPU until they are needed; ``None``: all stay on the device.
        quantization: of the UNet or transformer, as in the settings.
    """

    device: torch.device
    dtype: torch.dtype
    offload: str | None
    quantization: str

    @property
    def interleaves(self) -> bool:
        """False where going from one part to another moves whole models."""
        return self.offload not in ("enable_model_cpu_offload", "enable_sequential_cpu_offload")

    @property
    def read_to(self) -> torch.device | None:
        """Where weights go straight from the file; ``None`` where they wait on the CPU."""
        return None if self.offload else self.device

    def quantization_config(self) -> Any:
        """What diffusers quantizes with while it reads; ``None`` where it does not.

        Raises:
            ModelLoadFailed: what is needed for that is not here.
        """
        if self.quantization not in ("int8", "nf4"):
            return None
        if self.device.type == "cpu":
            raise ModelLoadFailed(
                f"--quantization {self.quantization} needs a GPU; on a CPU take --quantization fp8 or none."
            )
        if self.offload in ("enable_sequential_cpu_offload", "enable_group_offload"):
            raise ModelLoadFailed(
                f"--quantization {self.quantization} does not go with --device {self.offload}; take "
                "--device enable_model_cpu_offload or --quantization fp8."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ModelLoadFailed(
                f"--quantization {self.quantization} needs the package bitsandbytes; install the extra 'quantization'."
            )
        from diffusers import BitsAndBytesConfig

        if self.quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self.dtype)


def choose_placement(settings: Settings) -> Placement:
    """Where the settings want the model.

    Raises:
        ModelLoadFailed: there is no such device.
    """
    offload = settings.device if settings.device in OFFLOADS else None
    if offload and not torch.cuda.is_available():
        logger.warning("--device is %s, but no GPU is visible here: the model runs on the CPU, all of it", offload)
        device, offload = torch.device("cpu"), None
    else:
        if settings.device.startswith("cuda"):
            _check_replicas(settings.replicas)
        device = choose_device("cuda" if offload else settings.device)
    return Placement(device, choose_dtype(settings.dtype, device), offload, settings.quantization)


def _check_replicas(replicas: int | str) -> None:
    """Refuse more copies than there are GPUs, in the same words whichever of them is asked first.

    Raises:
        ModelLoadFailed: there are fewer.
    """
    count = torch.cuda.device_count()
    if replicas in (1, "auto") or int(replicas) <= count:
        return
    raise ModelLoadFailed(
        f"--replicas is {replicas}, but {_visible(count)} here, and each copy of the model takes a GPU of its own; "
        "lower it or leave it out."
    )


def _visible(count: int) -> str:
    """Such as ``only 2 GPUs are visible``."""
    if count > 1:
        return f"only {count} GPUs are visible"
    return "only one GPU is visible" if count else "no GPU is visible"


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            hint = ", counted from 0" if count else "; use --device cpu"
            raise ModelLoadFailed(f"--device is {name}, but {_visible(count)} here{hint}.")
        device = torch.device("cuda", device.index or 0)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE else torch.float16


def place(parts: Mapping[str, torch.nn.Module], placement: Placement, report: Callable[[str], None]) -> None:
    """Bring every part to where it belongs.

    Args:
        parts: by name, each once; on the CPU, or there already.
        placement: where.
        report: hears of each.

    Raises:
        ModelLoadFailed: the device has too little memory.
    """
    try:
        if placement.offload == "enable_model_cpu_offload":
            report(f"setting up parts to take turns on {placement.device}")
            take_turns(parts, placement.device)
        elif placement.offload is not None:
            report(f"setting up layers to move to {placement.device} and back")
            _offload_layers(parts, placement)
        else:
            for name, part in parts.items():
                if next(part.parameters()).device != placement.device and not _is_quantized(part):
                    report(f"moving {name} to {placement.device}")
                    part.to(placement.device)
    except torch.OutOfMemoryError:
        raise ModelLoadFailed(
            f"{placement.device} has too little memory for the model; take --device enable_model_cpu_offload, another "
            "--dtype or --quantization fp8."
        ) from None


def store_as_fp8(part: Any, dtype: torch.dtype) -> None:
    """Hold a UNet's or transformer's weights in 8 bits and compute in `dtype`, layer by layer."""
    part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)


def _is_quantized(part: torch.nn.Module) -> bool:
    return getattr(part, "hf_quantizer", None) is not None


def _offload_layers(parts: Mapping[str, torch.nn.Module], placement: Placement) -> None:
    for part in parts.values():
        if placement.offload == "enable_sequential_cpu_offload":
            # Parameters of the part itself, in no layer, would stay behind.
            accelerate.cpu_offload(part, placement.device, offload_buffers=bool(part._parameters))
            continue
        from diffusers.hooks import apply_group_offloading

        stream = placement.device.type == "cuda"
        apply_group_offloading(
            part,
            onload_device=placement.device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=stream,
            record_stream=stream,
        )


# --- Whole parts take turns ------------------------------------------------------------------------------------


class _Turns:
    """Which part has the device."""

    def __init__(self) -> None:
        self.holder: torch.nn.Module | None = None


class _Turn(ModelHook):  # type: ignore[misc]
    """Brings its part to the device before it runs and sends the one that was there back.

    diffusers' own offloading chains the parts in the order of one call of a pipeline. Here requests interleave, and a
    base and a refiner share parts, so each part makes room for itself whoever came before.
    """

    def __init__(self, device: torch.device, turns: _Turns) -> None:
        self.execution_device = device
        self._turns = turns

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self._turns.holder is not module:
            # Nobody's until all of a part is there: neither one that left nor one that came may be there by half.
            before, self._turns.holder = self._turns.holder, None
            if before is not None:
                before.to("cpu")
            try:
                module.to(self.execution_device)
            except BaseException:
                # Whoever comes next wants the room, or all of the part.
                module.to("cpu")
                raise
            self._turns.holder = module
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


def take_turns(parts: Mapping[str, torch.nn.Module], device: torch.device) -> None:
    """Keep every part on the CPU but the one that runs.

    Parts that bitsandbytes holds in 8 bits stay where they are.
    """
    turns = _Turns()
    for part in parts.values():
        if not getattr(part, "is_loaded_in_8bit", False):
            part.to("cpu")
            add_hook_to_module(part, _Turn(device, turns), append=True)
