"""The autoencoder between pixels and latents, with the care that half precision and full devices need.

Knows no model family: which scale and shift its latents have stands in its own configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

from app.engine.device import sending
from app.errors import GenerationFailed
from app.generation import Pixels
from app.images import to_pil

if TYPE_CHECKING:
    from app.engine.compiled import Compiler

HALF = (torch.float16, torch.bfloat16)
CPU_DECODE_LOAD = 65_536
"""As `Family.decode_load`: of more pixels the activations fit no cache, which costs a CPU time as well as memory."""
PREVIEW = 256
"""Pixels of the shorter side of a preview, about."""


class Vae:
    """An autoencoder on its device.

    Args:
        module: diffusers' ``AutoencoderKL`` or one that is called like it.
        processor: of the pipeline that it came with.
        compiler: compiles the decoding of whole pictures.
        encodes_in_full: pictures are encoded in float32, whatever the module's dtype.

    Attributes:
        retries: pictures that had to be decoded once more in float32.
    """

    def __init__(
        self,
        module: Any,
        processor: VaeImageProcessor,
        compiler: Compiler | None = None,
        encodes_in_full: bool = False,
    ) -> None:
        self.module = module
        self._encodes_in_full = encodes_in_full
        self._compiled = compiler.compile(module.decode) if compiler else None
        self.processor = processor
        self.retries = 0

    # --- Pixels to latents -------------------------------------------------------------------------------------

    def preprocess(self, image: Pixels, height: int, width: int) -> torch.Tensor:
        """float32 ``[1, 3, height, width]`` in -1…1, resized as the stock pipelines do where the size differs."""
        tensor: torch.Tensor = self.processor.preprocess(to_pil(image), height=height, width=width)
        return tensor

    def encode(
        self, image: torch.Tensor, generator: torch.Generator, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Scaled latents ``[1, c, h / f, w / f]``, drawn from the posterior with `generator`.

        Args:
            image: ``[1, 3, h, w]`` in -1…1.
            generator: of the request.
            device: where the latents are wanted.
            dtype: theirs.
        """
        with sending(device):
            # Rounded first, as the stock pipelines do, whatever computes then.
            image = image.to(device=device, dtype=dtype)
        # What offloading moves has its dtype where it waits.
        in_full = self._encodes_in_full and self.module.dtype in HALF and not _is_offloaded(self.module)
        with self._float32() if in_full else contextlib.nullcontext():
            posterior = self.module.encode(image.to(self.module.dtype)).latent_dist
        with sending(device):
            latents: torch.Tensor = posterior.sample(generator).to(dtype)
        mean, deviation = self._normal(latents)
        factor = self.module.config.scaling_factor
        shift = self.module.config.shift_factor
        if mean is not None:
            latents = (latents - mean) * factor / deviation
        else:
            latents = (latents if shift is None else latents - shift) * factor
        return latents

    def _normal(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Mean and deviation of each channel, where the configuration has them."""
        config = self.module.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            return None, None
        with sending(like.device):
            both = torch.tensor([mean, deviation], dtype=like.dtype, device=like.device)
        mean, deviation = both[:, None, :, None, None]
        return mean, deviation

    # --- Latents to pixels -------------------------------------------------------------------------------------

    def decode(self, latents: torch.Tensor, tiled: bool = False) -> np.ndarray:
        """Pictures: uint8 ``[n, h, w, 3]``.

        Args:
            latents: scaled, ``[n, c, h / f, w / f]``.
            tiled: in tiles, whatever the module is set to.

        Raises:
            GenerationFailed: the latents are not finite, or the picture is not, in float32 either.
        """
        with self._tiles(tiled):
            compiled = None if self.module.use_tiling or self.module.use_slicing else self._compiled
            pixels = self._pixels(latents, compiled or self.module.decode)
            if pixels is None and self.module.dtype in HALF:
                self.retries += len(latents)
                with self._float32():
                    pixels = self._pixels(latents, self.module.decode, black_is_bad=True)
        if pixels is None:
            raise GenerationFailed(
                "The picture came out black or as numbers that are not finite, in float32 too; take another scheduler, "
                "more steps or less guidance, or serve the model with another dtype."
            )
        return pixels

    def _pixels(
        self, latents: torch.Tensor, decode: Callable[..., Any], black_is_bad: bool = False
    ) -> np.ndarray | None:
        """The picture, or ``None`` where half precision has spoilt it."""
        image = decode(self._unscale(latents.to(self.module.dtype)), return_dict=False)[0]
        are_finite = torch.stack([torch.isfinite(each).all() for each in (latents, image)])
        # As VaeImageProcessor rounds, without the detour over floats in numpy and PIL.
        image = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        pixels: np.ndarray = (image * 255).round().to(torch.uint8).cpu().numpy()
        # Not before the pixels are here: whoever asks has to wait for the device.
        latents_are_finite, image_is_finite = are_finite.tolist()
        if not latents_are_finite:
            raise GenerationFailed(
                "The denoising went out of bounds (numbers that are not finite); take another scheduler, more steps or "
                "less guidance, or serve the model with another dtype."
            )
        if not image_is_finite:
            return None
        if (black_is_bad or self.module.dtype in HALF) and not pixels.any(axis=(1, 2, 3)).all():
            return None
        return pixels

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.module.config
        mean, deviation = self._normal(latents)
        if mean is not None and deviation is not None:
            latents = latents * deviation / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
            if config.shift_factor is not None:
                latents = latents + config.shift_factor
        return latents

    @contextlib.contextmanager
    def _tiles(self, tiled: bool) -> Iterator[None]:
        before = self.module.use_tiling
        self.module.use_tiling = before or tiled
        try:
            yield
        finally:
            self.module.use_tiling = before

    @contextlib.contextmanager
    def _float32(self) -> Iterator[None]:
        """Only the device thread comes here, so nobody meets the module between the two casts."""
        before = self.module.dtype
        try:
            self._cast(torch.float32)
            yield
        finally:
            self._cast(before)

    def _cast(self, dtype: torch.dtype) -> None:
        # Weights that are made while nothing is recorded are of another kind: what was compiled takes them for others.
        with torch.inference_mode(False):
            self.module.to(dtype)

    # --- Previews ----------------------------------------------------------------------------------------------

    def preview(self, latents: torch.Tensor) -> np.ndarray:
        """What the latents show so far, the shorter side about `PREVIEW` pixels: uint8 ``[h, w, 3]``.

        Decoding a few averaged latents costs a small part of decoding them all, and works for every autoencoder.

        Args:
            latents: scaled, ``[1, c, h / f, w / f]``.
        """
        factor = max(1, round(min(latents.shape[2:]) * 8 / PREVIEW))
        small = F.avg_pool2d(latents.float().nan_to_num(0), factor) if factor > 1 else latents.nan_to_num(0)
        image = self.module.decode(self._unscale(small.to(self.module.dtype)), return_dict=False)[0]
        image = (image * 0.5 + 0.5).nan_to_num(0).clamp(0, 1)[0].permute(1, 2, 0).float()
        pixels: np.ndarray = (image * 255).round().to(torch.uint8).cpu().numpy()
        return pixels


def _is_offloaded(module: Any) -> bool:
    """Whether accelerate or diffusers moves the weights by themselves."""
    return any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in module.modules())
