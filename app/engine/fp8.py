"""Matrix products in 8 bits: each row of the weights and of what comes in has a scale of its own.

Rounds to three bits of mantissa, so pictures change a little. Faster only where a GPU has such products and what is
around them is compiled.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import ScalingType

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
SMALLEST_SCALE = 1e-12
MULTIPLE = 16
"""Features of a layer come in multiples of this, or the GPU has no product for it."""
LEFT_OUT = ("norm", "emb")
"""Parts of the names of layers that stay as they are: they are small, and what they say steers all others."""


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
        rows, scale = quantize(inputs.reshape(-1, self.in_features))
        outputs = F.scaled_mm(
            rows,
            self.weight.t(),
            scale,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            output_dtype=inputs.dtype,
        )
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], self.out_features)


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, k]`` in 8 bits, and what each row was divided by, float32 ``[n, 1]``."""
    scale = (matrix.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    return (matrix.float() / scale).to(DTYPE), scale


def use_fp8(model: nn.Module) -> int:
    """Replace the linear layers of `model` that it pays off for.

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
    return len(found)
