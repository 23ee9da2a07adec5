"""What ``--optimize`` means for a loaded model: how its weights lie, which attention runs, what is compiled.

`off` runs the model as it is. `safe` costs nothing but other rounding: convolutions in channels_last, and attention by
the fastest kernel that the GPU has. `compile` costs minutes at the first start. `max` adds CUDA graphs, which cost
memory, and matrix products and convolutions in 8 bits where the chip has them, which cost a little of the picture; it
is the only level that lets requests trade their picture for speed. Knows no model family.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.compile_cache import folder_of
from app.engine.fp8 import has_fp8
from app.engine.placement import Placement
from app.errors import ModelLoadFailed
from app.generation import GenerateRequest
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.compiled import Compiler

logger = logging.getLogger(__name__)

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""The first that a GPU has for a shape is taken. cuDNN is the fastest on some, but makes a plan for each shape that it
meets, which takes about half a second: where there are many, no request shall wait for that."""
PLANNED_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In what is compiled, where each number of rows is met before the first request, and where one picture gains as much
as a plan takes."""
CUDNN_SINCE = 91501
"""Version from which cuDNN's attention is right for every length, and torch prefers it."""
CUDNN_GPUS = (9, 10)
"""First numbers of the CUDA compute capabilities for which torch does. Source: ``sdp_utils.cpp`` of torch."""
LOSSY_PARAMETERS = frozenset({"guidance_end"})
"""With which a request trades its picture for speed."""


def guided_steps(request: GenerateRequest, steps: int) -> int:
    """How many of so many steps with guidance ask for the negative prompt, before its `guidance_end`."""
    return round(steps * (1.0 if request.guidance_end is None else request.guidance_end))


@dataclass(frozen=True, slots=True)
class Optimization:
    """How hard the device is made to work.

    Attributes:
        level: ``off``, ``safe``, ``compile`` or ``max``.
        sizes: width and height of the pictures that are prepared for; the model's own size unless given.
        most_rows: of one forward pass.
        most_pixels: times rows, of one forward pass.
        step_cache: one of so many steps of FLUX goes through its blocks; 1 for all.
        fp8: the UNet's or transformer's matrix products and convolutions are done in 8 bits.
        plans: cuDNN's attention is the fastest there is.
        settled: weights lie on the device, in full, and stay; others may not be touched.
        quantization: of the UNet's or transformer's weights, as in the settings.
        backend: of ``torch.compile``.
        cache_dir: for what was found out about this GPU.
    """

    level: str = "off"
    sizes: tuple[tuple[int, int], ...] = ()
    most_rows: int = 16
    most_pixels: int = 16_777_216
    step_cache: int = 1
    fp8: bool = False
    plans: bool = False
    settled: bool = True
    quantization: str = "none"
    backend: str = "inductor"
    cache_dir: Path | None = None

    @property
    def compiles(self) -> bool:
        return self.level in ("compile", "max")

    @property
    def graphs(self) -> bool:
        return self.level == "max"

    @property
    def lossy(self) -> bool:
        """Whether a request may trade its picture for speed."""
        return self.level == "max"

    def attention(
        self, device: torch.device, compiler: Compiler | None = None, few_shapes: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """The order in which attention kernels are tried inside.

        Args:
            device: that computes.
            compiler: of what is inside; what it compiles has the order of that moment for ever.
            few_shapes: a plan for each that comes pays off, also while requests wait.
        """
        if self.level == "off" or device.type != "cuda":
            return contextlib.nullcontext()
        compiling = compiler is not None and compiler.warming
        return _order.of(PLANNED_ATTENTION if self.plans and (compiling or few_shapes) else ATTENTION)

    def arrange(self, *parts: nn.Module | None) -> None:
        """Lay out the weights of convolutions as GPUs want them, pixels before channels."""
        if self.level == "off" or not self.settled:
            return
        for part in parts:
            if part is not None:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def losses(self, request: GenerateRequest, steps: int) -> tuple[str, ...]:
        """What a resolved request's picture pays for speed.

        Args:
            request: resolved.
            steps: that it would take with guidance, 0 where its negative prompt does not count.
        """
        cut = guided_steps(request, steps) < steps
        server = (("fp8", self.fp8), (f"quantization {self.quantization}", self.quantization != "none"))
        return tuple(name for name, holds in (*server, ("guidance_end", cut)) if holds)

    def compiler(self) -> Compiler | None:
        if not self.compiles:
            return None
        from app.engine.compiled import Compiler  # which imports half of torch once more

        return Compiler(self.backend)

    def row_counts(self, pixels: int, graphs: bool) -> tuple[int, ...]:
        """Numbers of rows that are prepared for with pictures of that size, in the order in which that is done.

        The first is compiled for itself, the second for all others. Then the largest comes first: graphs share memory,
        but the pieces that one has taken are too small for a larger one.

        Args:
            pixels: of a picture.
            graphs: each number is recorded by itself; for attention it may have a plan of its own.
        """
        most = max(2, min(self.most_rows, self.most_pixels // pixels))
        if graphs or self.plans:
            return (1, 2, *range(most, 2, -1))
        # What is compiled for two takes more, but for some operators only so many.
        return (1, 2, most) if most > 2 else (1, 2)


class _Order:
    """Which kernel comes first, which is one for all threads of a process: those that want the same share it.

    Several GPUs have a thread each, and none may wait for another one's pass, at which the host is for as long as the
    device takes no more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._kernels: list[SDPBackend] = []
        self._inside = 0
        self._chosen = contextlib.ExitStack()

    @contextlib.contextmanager
    def of(self, kernels: list[SDPBackend]) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or kernels == self._kernels)
            if not self._inside:
                self._chosen.enter_context(sdpa_kernel(kernels, set_priority=True))
                self._kernels = kernels
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._chosen.close()
                    self._changed.notify_all()


_order = _Order()
OFF = Optimization()


def choose_optimization(settings: Settings, placement: Placement) -> Optimization:
    """What the settings mean on that device.

    Raises:
        ModelLoadFailed: they contradict each other.
    """
    level = settings.optimize
    if level == "auto":
        level = "safe" if placement.device.type == "cuda" else "off"
    if settings.compiles:
        if placement.offload is not None:
            raise ModelLoadFailed(
                f"--optimize {level} needs all weights on the device; leave --device {placement.offload} out or take "
                "--optimize safe."
            )
        if placement.quantization != "none":
            raise ModelLoadFailed(
                f"--optimize {level} does not go with --quantization {placement.quantization}; take --optimize safe, "
                "or on a GPU that has them --optimize max for 8-bit matrix products without --quantization."
            )
    if settings.step_cache > 1 and placement.offload is not None:
        raise ModelLoadFailed(
            f"--step_cache needs all weights on the device; leave it or --device {placement.offload} out."
        )
    if settings.compiles and (settings.vae_tiling or settings.vae_slicing):
        logger.warning("--vae_tiling and --vae_slicing: the VAE's decoder is not compiled")
    fp8 = level == "max" and placement.dtype == torch.bfloat16 and has_fp8(placement.device)
    if fp8 and settings.lora:
        logger.warning("--optimize max: adapters need weights in full, so matrix products are not done in 8 bits")
        fp8 = False
    return Optimization(
        level,
        settings.warm_pictures,
        most_rows=settings.max_batch_size,
        most_pixels=settings.max_batch_pixels,
        step_cache=settings.step_cache,
        fp8=fp8,
        plans=_prefers_cudnn(placement.device),
        settled=placement.offload is None and placement.quantization == "none",
        quantization=placement.quantization,
        cache_dir=folder_of(settings),
    )


def _prefers_cudnn(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    major, _ = torch.cuda.get_device_capability(device)
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return major in CUDNN_GPUS and version is not None and version >= CUDNN_SINCE
