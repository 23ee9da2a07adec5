"""Convolutions in 8 bits, for which torch has no kernel: ours, in Triton, and only where this GPU is faster with it.

A convolution is a matrix product in which each row is what a window of 3 x 3 pixels holds. The kernel never writes
those rows down: a pixel's neighbours lie at fixed distances from it, so it reads each of the nine from there, and zeros
beyond the edge. Each feature's weights have a scale of their own. Pixels need none: they come from a norm and an
activation, and 8 bits with exponents of their own hold numbers of that size as well as any.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import statistics
import threading
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from app.engine.fp8 import DTYPE, LARGEST, is_right, quantize

logger = logging.getLogger(__name__)

SIDE = 3
"""Of the windows; a UNet computes little with others."""
MULTIPLE = 64
"""Channels and features come in multiples of this, so that the kernel reads whole tiles only."""
TRIAL_PICTURES = 2
"""That a convolution is tried with: one with guidance."""
TRIAL_FEATURES = 320 * 128
"""Of each row of such a picture: where a UNet has more features, its pictures have fewer pixels."""
ROUNDS = 10
FIRST_ROUNDS = 2
"""They compile, and bring the clocks up."""
GAIN = 1.05
"""How much faster it has to be, so that chance does not decide."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of the kernel computes, and with how much of a processor. Changes no result.

    Attributes:
        pixels: rows of the tile.
        features: its columns.
        warps: of 32 threads.
        stages: reads that are under way at a time.
    """

    pixels: int
    features: int
    warps: int
    stages: int


TILES = (Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(256, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 64, 4, 4))
"""As large as the registers allow: with larger ones the compiler puts sums into memory."""


class Fp8Conv2d(nn.Module):
    """A convolution of 3 x 3 windows in 8 bits, with zeros around the edge.

    Args:
        conv: whose weights it takes; its bias stays in full. See `fits`.
        tile: that computes it.
    """

    def __init__(self, conv: nn.Conv2d, tile: Tile) -> None:
        super().__init__()
        weight, scale = quantize(conv.weight.detach().permute(0, 2, 3, 1).flatten(1))
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.flatten())
        self.bias = conv.bias
        self.tile = list(astuple(tile))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[n, channels, h, w]`` to ``[n, features, h, w]`` in channels_last, in the dtype of `inputs`."""
        # What is larger would be no number at all.
        pixels = inputs.clamp(-LARGEST, LARGEST).to(DTYPE).permute(0, 2, 3, 1).contiguous()
        outputs = self.product(pixels, inputs.dtype)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.permute(0, 3, 1, 2)

    def product(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """8 bits ``[n, h, w, channels]`` to ``[n, h, w, features]`` of `dtype`, without the bias."""
        outputs: torch.Tensor = convolve(pixels, self.weight, self.scale, dtype, self.tile)
        return outputs


def fits(layer: nn.Module) -> bool:
    """Whether the kernel can compute that layer."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (SIDE, SIDE)
        and layer.stride == layer.dilation == layer.padding == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and not layer.in_channels % MULTIPLE
        and not layer.out_channels % MULTIPLE
    )


# --- The kernel ------------------------------------------------------------------------------------------------


# One machine code for every size: no request waits for a compiler.
@triton.jit(do_not_specialize=("count", "height", "width"))  # type: ignore[untyped-decorator]
def _convolve(
    pixels: tl.tensor,
    weights: tl.tensor,
    scales: tl.tensor,
    outputs: tl.tensor,
    count: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    features: tl.tensor,
    tile_pixels: tl.constexpr,
    tile_features: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """`outputs[count, features]` of `pixels[count, channels]` and `weights[features, 3, 3, channels]`."""
    columns = features // tile_features
    tile = tl.program_id(0)
    pixel = tile // columns * tile_pixels + tl.arange(0, tile_pixels)
    feature = tile % columns * tile_features + tl.arange(0, tile_features)
    channel = tl.arange(0, depth)
    y = pixel // width % height
    x = pixel % width
    parts = channels // depth
    here = pixels + pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    filters = weights + feature[None, :] * (9 * channels) + channel[:, None]
    total = tl.full((tile_pixels, tile_features), 0.0, tl.float32)
    for i in range(9 * parts):
        place = i // parts
        down = place // 3 - 1
        right = place % 3 - 1
        inside = (pixel < count) & (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        distance = (down * width + right) * channels + i % parts * depth
        window = tl.load(here + distance, mask=inside[:, None], other=0.0)
        # Hopper's matrix units add up in 14 bits, so what they give is added to a sum in 24 each time.
        total = tl.dot(window, tl.load(filters + i * depth), total, max_num_imprecise_acc=depth)
    total *= tl.load(scales + feature)[None, :]
    to = outputs + pixel.to(tl.int64)[:, None] * features + feature[None, :]
    tl.store(to, total.to(outputs.dtype.element_ty), mask=(pixel < count)[:, None])


@torch.library.custom_op("sdxl_runtime::convolve_fp8", mutates_args=())
def convolve(
    pixels: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    tile: list[int],
) -> torch.Tensor:
    """Sums over windows of 3 x 3, with zeros around the edge.

    Args:
        pixels: 8 bits, contiguous ``[n, h, w, channels]``.
        weights: 8 bits, contiguous ``[features, 9 * channels]``.
        scales: of the weights, float32 ``[features]``.
        dtype: of the result.
        tile: a `Tile`'s attributes in their order.

    Returns:
        ``[n, h, w, features]``.
    """
    pictures, height, width, channels = pixels.shape
    count, features = pictures * height * width, len(weights)
    tile_pixels, tile_features, warps, stages = tile
    outputs = pixels.new_empty((pictures, height, width, features), dtype=dtype)
    # Triton starts kernels on the thread's current GPU.
    with torch.cuda.device_of(pixels):  # type: ignore[no-untyped-call]
        _convolve[(triton.cdiv(count, tile_pixels) * (features // tile_features),)](
            pixels,
            weights,
            scales,
            outputs,
            count,
            height,
            width,
            channels,
            features,
            tile_pixels=tile_pixels,
            tile_features=tile_features,
            depth=MULTIPLE if channels % (2 * MULTIPLE) else 2 * MULTIPLE,
            num_warps=warps,
            num_stages=stages,
        )
    return outputs


@convolve.register_fake
def _(
    pixels: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,  # noqa: ARG001
    dtype: torch.dtype,
    tile: list[int],  # noqa: ARG001
) -> torch.Tensor:
    return pixels.new_empty((*pixels.shape[:3], len(weights)), dtype=dtype)


# --- The choice ------------------------------------------------------------------------------------------------

Clock = Callable[[Callable[[], Any]], float]
"""Seconds that a piece of work takes the device."""
_lock = threading.Lock()
_known: dict[str, Tile | None] = {}
"""By GPU, channels and features, so that all GPUs of a kind in one server paint alike."""
CHOICES = "fp8-convolutions.json"
"""Keeps them in ``--cache_dir``: another choice would be another picture, and all would have to be compiled anew."""


def gpu_seconds(work: Callable[[], Any]) -> float:
    """Of the thread's current GPU's own time, the median."""
    marks = []
    for _ in range(FIRST_ROUNDS + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in marks[FIRST_ROUNDS:]]
    return statistics.median(milliseconds) / 1000


def use_fp8_convolutions(model: nn.Module, cache_dir: Path | None = None, seconds: Clock = gpu_seconds) -> int:
    """Replace those convolutions in ResNet blocks of `model` that its GPU is faster with in 8 bits, by a trial of each.

    Args:
        model: on its device.
        cache_dir: keeps what trials have shown.
        seconds: see `fastest_tile`.

    Returns:
        How many they are.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        if isinstance(parent, ResnetBlock2D)
        for name, child in (("conv1", parent.conv1), ("conv2", parent.conv2))
        if fits(child)
    ]
    count = 0
    # One GPU at a time: what others do meanwhile would be measured too.
    with _lock:
        if cache_dir is not None:
            _known.update(read_choices(cache_dir / CHOICES))
        before = len(_known)
        for parent, name, conv in found:
            gpu = torch.cuda.get_device_name(conv.weight.device)
            versions = f"torch {torch.__version__}, Triton {triton.__version__}"
            kind = f"{gpu}, {versions}, {conv.in_channels} to {conv.out_channels} channels"
            if kind not in _known:
                with torch.cuda.device_of(conv.weight):  # type: ignore[no-untyped-call]
                    _known[kind] = fastest_tile(conv, seconds)
            tile = _known[kind]
            if tile is not None:
                setattr(parent, name, Fp8Conv2d(conv, tile))
                count += 1
        if cache_dir is not None and len(_known) > before:
            write_choices(cache_dir / CHOICES)
    logger.info("%d of %d convolutions are faster in 8 bits on this GPU", count, len(found))
    return count


def read_choices(path: Path) -> dict[str, Tile | None]:
    """What an earlier start has found; nothing where the file is absent or broken."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {str(kind): None if tile is None else Tile(*map(int, tile)) for kind, tile in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_choices(path: Path) -> None:
    """Keep what is known; where that cannot be, the next start tries again."""
    kept = {kind: None if tile is None else astuple(tile) for kind, tile in _known.items()}
    with contextlib.suppress(OSError):
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        new.replace(path)


@torch.inference_mode()
def fastest_tile(conv: nn.Conv2d, seconds: Clock) -> Tile | None:
    """The tile that computes `conv` fastest; ``None`` where torch does in full, or where the kernel fails.

    Args:
        conv: on its device.
        seconds: measures what is done there.
    """
    side = max(1, TRIAL_FEATURES // conv.out_channels)
    shape = (TRIAL_PICTURES, conv.in_channels, side, side)
    inputs = torch.randn(shape, device=conv.weight.device, dtype=conv.weight.dtype)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    full = seconds(lambda: conv(inputs))
    # As compiled, whoever writes them rounds them.
    pixels = inputs.to(DTYPE).permute(0, 2, 3, 1).contiguous()
    reference = conv(inputs)
    took: dict[Tile, float] = {}
    for tile in TILES:
        if conv.out_channels % tile.features:
            continue
        layer = Fp8Conv2d(conv, tile)
        if not is_right("a convolution", functools.partial(layer, inputs), reference):
            return None
        took[tile] = seconds(functools.partial(layer.product, pixels, inputs.dtype))
    best = min(took, key=lambda tile: took[tile])
    logger.info(
        "a convolution of %d to %d channels takes %.3g ms in full and %.3g in 8 bits",
        conv.in_channels,
        conv.out_channels,
        full * 1e3,
        took[best] * 1e3,
    )
    return best if took[best] * GAIN < full else None
