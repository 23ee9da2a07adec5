"""What every model needs in memory, wherever its weights are kept and in whichever format: computed, not measured.

``python -m tests.benchmarks.memory`` makes the full-size models of the configurations that ship with us on the meta
device, where tensors have shapes and no memory, adds up their weights, and runs their forward passes for one picture of
1024 x 1024 to see how many bytes are alive at once. It writes ``tests/benchmarks/results/memory.md``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine.placement import store_as_fp8
from app.engine.single_files import CONFIGS
from tests.gpu.full_size import CLIP_TOKENS, META, forward, make_components

RESULTS = Path(__file__).parent / "results" / "memory.md"
GIB = 2**30
SIZE = 1024
T5_TOKENS = 512
MODELS = {
    "SDXL": ("sdxl-base",),
    "SDXL with refiner": ("sdxl-base", "sdxl-refiner"),
    "FLUX.1 dev": ("flux-dev",),
    "FLUX.1 schnell": ("flux-schnell",),
}
FORMATS = ("float32", "bfloat16", "float16", "fp8", "int8", "nf4")
NF4_BITS = 4.5
"""Four for each weight, and a float32 for each 64 of them."""


@dataclass(frozen=True)
class Part:
    """One module in one format.

    Attributes:
        weights: bytes of all of it.
        layer: bytes of its largest layer.
        work: bytes alive at once while it runs, besides its weights.
        stays: on the GPU, although others take turns there.
    """

    weights: float
    layer: float
    work: float
    stays: bool


# --- Bytes of weights ------------------------------------------------------------------------------------------


def weigh(module: nn.Module, name: str, numbers: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes of a module on the meta device, and of its largest layer, as the server would hold it."""
    big = name in ("unet", "transformer")
    if big and numbers == "fp8":
        store_as_fp8(module, dtype)
    sizes = [_bytes_of(layer, numbers if big else "", dtype) for layer in module.modules()]
    return sum(sizes), max(sizes)


def _bytes_of(layer: nn.Module, numbers: str, dtype: torch.dtype) -> float:
    own: float = sum(parameter.nbytes for parameter in layer.parameters(recurse=False))
    if isinstance(layer, nn.Linear) and numbers in ("int8", "nf4"):
        # bitsandbytes takes the matrices of linear layers; int8 adds a float32 for each row.
        matrix = layer.weight.numel()
        packed = matrix + 4 * layer.out_features if numbers == "int8" else matrix * NF4_BITS / 8
        own += packed - layer.weight.nbytes
    return own


# --- Bytes alive in a forward pass -----------------------------------------------------------------------------


class Alive(TorchDispatchMode):
    """Adds up the storages that are made while it is on, as long as each lives.

    Args:
        module: its weights are there already and do not count.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as GPUs do it, block by block: the meta device would write out every pair of tokens."""
    whole = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, *_, **__: torch.empty_like(query)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = whole


def work_of(module: nn.Module, run: Callable[[], Any]) -> int:
    """The most bytes that are alive at once besides the module's weights."""
    with fused_attention(), torch.no_grad(), Alive(module) as alive:
        run()
    return alive.most


def run(name: str, components: Mapping[str, Any], dtype: torch.dtype) -> Callable[[], Any]:
    """One forward pass for a picture; see `forward`."""
    if not name.startswith("text_encoder"):
        return forward(name, components, dtype, SIZE, T5_TOKENS)
    # A few tokens' work only; two prompts, and the widest that a layer makes of them.
    config = components[name].config
    tokens = T5_TOKENS if config.model_type == "t5" else CLIP_TOKENS
    widths = getattr(config, "d_ff", None) or config.intermediate_size
    return lambda: torch.empty(2, tokens, 4 * widths, device=META, dtype=dtype)


# --- The table -------------------------------------------------------------------------------------------------


def make_parts(folders: tuple[str, ...], numbers: str) -> list[Part]:
    """Every module once: a refiner shares the second text encoder and the VAE with its base."""
    dtype = getattr(torch, numbers if numbers in ("float32", "float16") else "bfloat16")
    parts = []
    for i, folder in enumerate(folders):
        components = make_components(CONFIGS / folder, META, dtype)
        for name, module in components.items():
            if not isinstance(module, nn.Module) or (i and name in ("text_encoder_2", "vae")):
                continue
            own = torch.float32 if name == "vae" and dtype == torch.float16 else dtype
            nn.Module.to(module, own)
            work = work_of(module, run(name, components, own))
            whole_layer = max(_bytes_of(layer, "", own) for layer in module.modules())
            weights, layer = weigh(module, name, numbers, own)
            packed = name in ("unet", "transformer") and numbers in ("fp8", "int8", "nf4")
            if packed:
                # One layer at a time is unpacked.
                work += int(whole_layer)
            parts.append(Part(weights, layer, work, stays=packed and numbers == "int8"))
    return parts


def needs(parts: list[Part], numbers: str) -> list[str]:
    """GiB by device mode: all weights and the most work; the largest part and its work; the largest layer and work."""
    weights = sum(part.weights for part in parts)
    most_work = max(part.work for part in parts)
    layers = max(part.layer for part in parts)
    packed = numbers in ("int8", "nf4")
    staying = sum(part.weights for part in parts if part.stays)
    modes = [
        None if packed else weights + most_work,
        weights + most_work,
        staying + max(part.work + (0 if part.stays else part.weights) for part in parts),
        # A layer at a time; in groups the next one is already on its way.
        None if packed else layers + most_work,
        None if packed else 2 * layers + most_work,
    ]
    return [
        f"{weights / GIB:.1f}",
        f"{most_work / GIB:.1f}",
        *("–" if mode is None else f"{mode / GIB:.1f}" for mode in modes),
    ]


def main() -> None:
    header = "model | format | weights | work | cpu | cuda | model offload | sequential offload | group offload"
    lines = [f"| {header} |", "|---|---|" + "--:|" * 7]
    for model, folders in MODELS.items():
        for numbers in FORMATS:
            row = [model, numbers, *needs(make_parts(folders, numbers), numbers)]
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    note = (
        "GiB, for one picture of 1024 x 1024 at a time (SDXL with guidance), without what Python, torch, CUDA and "
        "cuDNN take themselves (1 to 2 GiB). *weights*: of all parts; on the CPU where they are not on the GPU. "
        "*work*: what the most demanding forward pass or the VAE's decoding holds besides; `--vae_tiling` makes the "
        "latter less. The other columns are what `--device` needs where it computes: `cpu`, `cuda`, "
        "`enable_model_cpu_offload` (the largest part at a time), `enable_sequential_cpu_offload` (the largest layer) "
        "and `enable_group_offload` (two of them). float16 keeps the VAE in float32. fp8, int8 and nf4 "
        "(`--quantization`) compute in bfloat16 and change the UNet or transformer alone, int8 and nf4 nothing but its "
        "linear layers."
    )
    RESULTS.write_text("\n".join([note, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
