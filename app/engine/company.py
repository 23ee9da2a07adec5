"""Layers that a CPU computes for few rows at a time, so that they round in company as they do for a picture alone.

How its libraries sum depends on the number of rows. Where a row is one position (linear layers of timesteps, pooled
prompts and modulations), another sum comes out for any other number; from convolutions of single pixels it does for
many. The difference is in the seventh digit, but schedulers with much noise and strong guidance make it visible. For
all other layers of these models none was found, on x86 with oneDNN and MKL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

CONVOLUTION_ROWS = 8
"""Up to 14 make no difference with one thread, and with two no number does."""


def round_as_alone(model: nn.Module, rows: int) -> None:
    """Have `model`, on a CPU, compute such layers for so many rows at a time; in place.

    Args:
        model: whose inputs have a row as their first dimension.
        rows: that a picture alone brings.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear
            assert isinstance(layer, FewRowsLinear)
            layer.most_rows = rows
        elif type(layer) is nn.Conv2d and layer.kernel_size == (1, 1):
            layer.__class__ = FewRowsConv2d


class FewRowsLinear(nn.Linear):
    """A linear layer that takes ``[n, d]`` a few rows at a time, and what has more dimensions as a whole."""

    most_rows: int

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return _in_pieces(super().forward, rows, self.most_rows if rows.ndim == 2 else len(rows))


class FewRowsConv2d(nn.Conv2d):
    """A convolution that takes ``[n, c, h, w]`` `CONVOLUTION_ROWS` at a time."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return _in_pieces(super().forward, rows, CONVOLUTION_ROWS)


def _in_pieces(compute: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, most: int) -> torch.Tensor:
    count = len(rows)
    if count <= most:
        return compute(rows)
    left = count % most
    pieces = [compute(rows[start : start + most]) for start in range(0, count - left, most)]
    if left:
        # As many as before, some of them for the second time: fewer would round otherwise.
        pieces.append(compute(rows[-most:])[-left:])
    return torch.cat(pieces)
