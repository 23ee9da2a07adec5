"""The table of what every model needs in memory says what the code computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.benchmarks.memory import MODELS, RESULTS, make_parts, needs, work_of
from tests.gpu.full_size import META


def test_bytes_count_as_long_as_something_holds_them_and_weights_do_not() -> None:
    layer = nn.Linear(256, 256, bias=False, device=META)
    size = 256 * 256 * 4

    def run() -> torch.Tensor:
        first = torch.empty(256, 256, device=META)
        second = layer(first)
        view = second.view(-1)
        del first, second
        third = torch.empty(256, 256, device=META)
        del third
        return view + 1

    assert work_of(layer, run) == 2 * size


@pytest.mark.parametrize("numbers", ["bfloat16", "fp8", "int8"])
def test_the_table_is_what_the_code_computes(numbers: str) -> None:
    row = " | ".join(["SDXL", numbers, *needs(make_parts(MODELS["SDXL"], numbers), numbers)])
    assert f"| {row} |" in RESULTS.read_text(encoding="utf-8").splitlines()
