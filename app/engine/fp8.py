"""Matrix products in 8 bits: each row of the weights and of what comes in has a scale of its own.

Rounds to three bits of mantissa, so pictures change a little. Faster only where a GPU has such products and what is
around them is compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from app.errors import first_line

logger = logging.getLogger(__name__)

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SMALLEST_SCALE = 1e-12
MULTIPLE = 16
"""Features of a layer come in multiples of this, or the GPU has no product for it."""
FP8_SINCE = (8, 9)
"""CUDA compute capability from which GPUs have such products."""
TRIAL = 256
"""Rows, and features in and out, of the product that is tried."""
MOST_ERROR = 0.1
"""‖out − reference‖ / ‖reference‖ above which a kernel is broken; 8 bits give 0.04."""
LEFT_OUT = ("norm", "emb", "attn2.to_k", "attn2.to_v")
"""Parts of the names of layers that stay as they are: those are small, and what the first say steers all others. The
last read the prompt, which has few tokens: little to gain, and each of them would round it anew."""


class Fp8Linear(nn.Module):
    """A linear layer in 8 bits.

    Args:
        linear: whose weights it takes; its bias stays in full.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach())
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the dtype of `inputs`."""
        # A GPU multiplies only rows that lie one after the other. Those of a single picture lie crosswise behind its
        # norm, whose results are never channels_last there.
        rows, scale = quantize(inputs.reshape(-1, self.in_features).contiguous())
        # Its public form, scaled_mm, came later, and could not be compiled at first.
        outputs = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=inputs.dtype,
            use_fast_accum=True,  # in the matrix units: their sums of 14 bits lose less than the rounding before
        )
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], self.out_features)


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, k]`` in 8 bits, and what each row was divided by, float32 ``[n, 1]``."""
    scale = (matrix.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (matrix.float() / scale).to(DTYPE), scale


def has_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU with such products, and this torch has a kernel for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_SINCE and works(device)


def works(device: torch.device) -> bool:
    """Try one product."""
    with torch.inference_mode():
        linear = nn.Linear(TRIAL, TRIAL, device=device, dtype=torch.bfloat16)
        inputs = torch.randn(TRIAL, TRIAL, device=device, dtype=torch.bfloat16)
        return is_right("a matrix product", lambda: Fp8Linear(linear)(inputs), linear(inputs))


def is_right(what: str, attempt: Callable[[], torch.Tensor], reference: torch.Tensor) -> bool:
    """Whether an attempt in 8 bits runs, and gives about what it should; if not, the log says why.

    Args:
        what: is attempted.
        attempt: gives what is in the place of `reference`.
        reference: what comes out in full.
    """
    try:
        expected = reference.float()
        error = float((attempt().float() - expected).norm() / expected.norm())
    except Exception as failure:
        logger.warning("%s in 8 bits cannot run here (%s); it stays in full", what, first_line(failure))
        return False
    if not error <= MOST_ERROR:
        logger.warning("%s in 8 bits is wrong here by %.2g; it stays in full", what, error)
        return False
    return True


def use_fp8(model: nn.Module, cache_dir: Path | None = None) -> int:
    """Replace the linear layers of `model` that it pays off for, and on a GPU its convolutions likewise.

    Args:
        model: on its device.
        cache_dir: keeps which convolutions they are for the next start.

    Returns:
        How many they are.
    """
    found = [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
        and not child.in_features % MULTIPLE
        and not child.out_features % MULTIPLE
        and "blocks." in f"{path}."
        and not any(part in f"{path}.{name}" for part in LEFT_OUT)
    ]
    for parent, name, child in found:
        setattr(parent, name, Fp8Linear(child))
    return len(found) + _use_fp8_convolutions(model, cache_dir)


def _use_fp8_convolutions(model: nn.Module, cache_dir: Path | None) -> int:
    if next(model.parameters()).device.type != "cuda":
        return 0
    try:
        from app.engine.fp8_convolution import use_fp8_convolutions  # with Triton, which comes with torch for GPUs
    except ImportError as error:
        logger.warning("convolutions in 8 bits need Triton (%s); they stay in full", error)
        return 0
    return use_fp8_convolutions(model, cache_dir)
