"""Layers that a CPU computes for few rows at a time: what each row gives does not hang on how many there are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from app.engine.company import CONVOLUTION_ROWS, _in_pieces, round_as_alone

COUNTS = (1, 2, 3, 5, 8, 16, 33)


@pytest.mark.parametrize("alone", [1, 2])
def test_a_linear_layer_gives_each_picture_what_it_gives_it_alone(alone: int) -> None:
    layer = nn.Linear(128, 96)
    inputs = torch.randn(max(COUNTS), 128)
    with torch.inference_mode():
        expected = torch.cat([layer(inputs[i : i + alone]) for i in range(0, max(COUNTS), alone)])
        round_as_alone(layer, alone)
        for count in COUNTS:
            # A picture whose rows are not all there gives what as many would.
            whole = count - count % alone
            assert torch.equal(layer(inputs[:count])[:whole], expected[:whole]), count
            assert layer(inputs[:count]).shape == (count, 96)


def test_a_convolution_of_single_pixels_gives_each_picture_what_it_gives_it_alone() -> None:
    layer = nn.Conv2d(160, 96, 1)
    inputs = torch.randn(max(COUNTS), 160, 4, 4)
    with torch.inference_mode():
        expected = torch.cat([layer(inputs[i : i + 2]) for i in range(0, max(COUNTS) - 1, 2)])
        round_as_alone(layer, 2)
        for count in COUNTS[1:]:
            assert torch.equal(layer(inputs[:count])[:-1], expected[: count - 1]), count


def test_all_pieces_are_of_one_length_and_rows_keep_their_order() -> None:
    lengths = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        lengths.append(len(rows))
        return 2 * rows

    for count, expected in ((2, [2]), (4, [4]), (8, [4, 4]), (10, [4, 4, 4])):
        lengths.clear()
        rows = torch.arange(count)
        assert torch.equal(_in_pieces(double, rows, 4), 2 * rows)
        assert lengths == expected


def test_other_layers_and_what_has_many_positions_are_computed_as_ever() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    before = copy.deepcopy(model)
    round_as_alone(model, 1)
    round_as_alone(model, 1)
    same = [type(layer) is type(other) for layer, other in zip(model, before, strict=True)]
    assert same == [False, True, False, True]
    tokens, pixels = torch.randn(3, 5, 8), torch.randn(CONVOLUTION_ROWS, 4, 6, 6)
    assert torch.equal(model[0](tokens), before[0](tokens))
    assert torch.equal(model[2](pixels), before[2](pixels))
    assert model.state_dict().keys() == before.state_dict().keys()
    again = copy.deepcopy(model)
    assert torch.equal(again[0](tokens[0]), model[0](tokens[0]))
