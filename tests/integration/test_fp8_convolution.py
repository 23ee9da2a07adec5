"""Convolutions in 8 bits: the GPU's kernel, run by Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import copy
import functools
import logging
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

from app.engine import fp8_convolution
from app.engine.compiled import Compiler
from app.engine.fp8 import DTYPE, quantize
from app.engine.fp8_convolution import TILES, Fp8Conv2d, Tile, fastest_tile, fits, use_fp8_convolutions
from app.engine.sdxl import SdxlFamily
from tests.integration.stock import ours, psnr
from tests.small_models import load_demo

KERNEL = fp8_convolution._convolve
TILE = Tile(128, 64, 4, 3)
MATRIX_UNITS = {
    89: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    90: "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3",
    100: "tcgen05.mma",
    120: "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
}
"""Instructions for matrix products of 8 bits, by compute capability."""
SPARE = 8
"""Bytes of a thread's stack that are no sums, which would take hundreds."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_convolution, "_convolve", InterpretedFunction(KERNEL.fn))
    monkeypatch.setattr(fp8_convolution, "_known", {})
    monkeypatch.setattr(fp8_convolution, "TRIAL_PICTURES", 1)
    monkeypatch.setattr(fp8_convolution, "TRIAL_FEATURES", 8 * 128)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def rounded(conv: nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    """What torch makes of the numbers that 8 bits leave of the weights and of the pixels."""
    weight, scale = quantize(conv.weight.flatten(1))
    return F.conv2d(inputs.to(DTYPE).float(), (weight.float() * scale).reshape(conv.weight.shape), conv.bias, padding=1)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("pictures", "channels", "features", "height", "width"),
    [(2, 64, 128, 9, 7), (1, 128, 128, 16, 16), (3, 192, 256, 1, 5), (1, 64, 128, 1, 1)],
)
def test_the_kernel_is_a_convolution_of_what_8_bits_leave(
    pictures: int, channels: int, features: int, height: int, width: int, tile: Tile
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, features, 3, padding=1)
    inputs = F.silu(torch.randn(pictures, channels, height, width) * 2)
    found = Fp8Conv2d(conv, tile)(inputs)
    torch.testing.assert_close(found, rounded(conv, inputs), rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = conv(inputs)
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_a_picture_does_not_depend_on_its_company() -> None:
    layer = Fp8Conv2d(nn.Conv2d(64, 64, 3, padding=1), TILE)
    inputs = torch.randn(3, 64, 6, 5)
    together = layer(inputs)
    for i in range(3):
        assert torch.equal(layer(inputs[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0, 1e4])
def test_numbers_that_come_from_an_activation_are_near_whatever_their_size(size: float) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    inputs = F.silu(torch.randn(1, 64, 6, 5)) * size
    found, expected = Fp8Conv2d(conv, TILE)(inputs), conv(inputs)
    assert found.isfinite().all(), "what is too large is cut off"
    assert size > 100 or (found - expected).norm() < 0.06 * expected.norm()


def test_no_bias_and_half_precision_stay_what_they_are() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False).bfloat16()
    inputs = torch.randn(1, 64, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    found, expected = Fp8Conv2d(conv, TILE)(inputs), conv(inputs)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_it_is_compiled_as_a_part_of_its_model_for_any_number_of_rows() -> None:
    model = nn.Sequential(nn.SiLU(), Fp8Conv2d(nn.Conv2d(64, 64, 3, padding=1), TILE), nn.SiLU())
    compiler = Compiler("aot_eager")
    compiled = compiler.compile(model)
    with compiler.warm():
        for rows in (1, 2):
            compiled(torch.randn(rows, 64, 4, 4))
    for rows in (1, 2, 3):
        inputs = torch.randn(rows, 64, 4, 4)
        assert torch.equal(compiled(inputs), model(inputs))
    assert compiler.unexpected == 0


# --- Which convolutions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(4, 64, 3, padding=1),
        nn.Conv2d(64, 4, 3, padding=1),
        nn.Linear(64, 64),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_compute_is_left(layer: nn.Module) -> None:
    assert not fits(layer)


def clock(tiles: dict[Tile, float], full: float = 1.0) -> Callable[[Callable[[], Any]], float]:
    """Seconds of the convolution in full and of each tile, whatever this machine takes."""

    def seconds(work: Callable[[], Any]) -> float:
        work()
        layer = getattr(work.func, "__self__", None) if isinstance(work, functools.partial) else None
        return tiles.get(Tile(*layer.tile), 10.0) if isinstance(layer, Fp8Conv2d) else full

    return seconds


def test_the_fastest_tile_is_taken() -> None:
    conv = nn.Conv2d(64, 128, 3, padding=1)
    assert fastest_tile(conv, clock({TILES[1]: 0.5, TILES[3]: 0.4})) == TILES[3]
    assert fastest_tile(conv, clock({TILES[1]: 0.5, TILES[3]: 0.6})) == TILES[1]


def test_a_tile_that_is_too_wide_is_not_tried() -> None:
    wide, narrow = TILES[0], TILES[3]
    assert wide.features == 128 and narrow.features == 64
    assert fastest_tile(nn.Conv2d(64, 192, 3, padding=1), clock({wide: 0.1, narrow: 0.5})) == narrow


@pytest.mark.parametrize(("took", "taken"), [(0.9, True), (0.98, False), (2.0, False)])
def test_in_full_where_8_bits_are_not_clearly_faster(took: float, taken: bool) -> None:
    found = fastest_tile(nn.Conv2d(64, 64, 3, padding=1), clock({TILE: took}))
    assert found == (TILE if taken else None)


def block(channels: int, features: int) -> ResnetBlock2D:
    return ResnetBlock2D(in_channels=channels, out_channels=features, temb_channels=None)


def test_each_kind_is_tried_once_and_all_of_it_are_replaced() -> None:
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), block(64, 128), block(128, 128), nn.Conv2d(128, 128, 3, padding=1)
    )
    tried = []

    def seconds(work: Callable[[], Any]) -> float:
        tried.append(work)
        return clock({TILE: 0.5})(work)

    assert use_fp8_convolutions(model, seconds=seconds) == 4
    first = len(tried)
    replaced = [name for name, layer in model.named_modules() if isinstance(layer, Fp8Conv2d)]
    assert replaced == ["1.conv1", "1.conv2", "2.conv1", "2.conv2"], "others read what no norm has bounded"
    assert use_fp8_convolutions(block(128, 128), seconds=seconds) == 2
    assert len(tried) == first, "what was measured on one GPU holds for others of its kind"


def test_the_next_start_makes_the_same_choice(tmp_path: Path) -> None:
    """Or it would paint other pictures, and find nothing of what was compiled."""

    def again(cache_dir: Path, seconds: Callable[[Callable[[], Any]], float]) -> list[Tile]:
        fp8_convolution._known.clear()
        model = nn.Sequential(block(64, 128), block(128, 128))
        use_fp8_convolutions(model, cache_dir, seconds)
        return [Tile(*layer.tile) for layer in model.modules() if isinstance(layer, Fp8Conv2d)]

    first = again(tmp_path, clock({TILES[1]: 0.5, TILES[3]: 0.4}))
    assert first == [TILES[3]] * 4
    assert again(tmp_path, clock({TILES[1]: 0.4, TILES[3]: 0.5})) == first
    (kept,) = tmp_path.iterdir()
    for broken in ("", "[]", '{"a GPU": [1, 2]}', '{"a GPU": "x"}'):
        kept.write_text(broken, encoding="utf-8")
        assert again(tmp_path, clock({TILES[1]: 0.4, TILES[3]: 0.5})) == [TILES[1]] * 4
    assert again(tmp_path / "nowhere", clock({TILES[1]: 0.4})) == [TILES[1]] * 4


def test_a_kernel_that_cannot_be_compiled_leaves_the_convolution_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("PTXAS error: no such instruction\nand more")

    monkeypatch.setattr(fp8_convolution, "_convolve", Broken())
    with caplog.at_level(logging.WARNING):
        assert fastest_tile(nn.Conv2d(64, 64, 3, padding=1), clock({TILE: 0.1})) is None
    assert caplog.messages == [
        "a convolution in 8 bits cannot run here (PTXAS error: no such instruction); it stays in full"
    ]


@pytest.mark.parametrize("wrong", [0.0, 2.0, float("nan")])
def test_a_kernel_that_computes_something_else_is_not_used(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = fp8_convolution.convolve

    def convolve(*arguments: Any) -> torch.Tensor:
        return right(*arguments) * wrong

    monkeypatch.setattr(fp8_convolution, "convolve", convolve)
    with caplog.at_level(logging.WARNING):
        assert fastest_tile(nn.Conv2d(64, 64, 3, padding=1), clock({TILE: 0.1})) is None
    assert "is wrong here" in caplog.text


# --- In a model, and on GPUs -----------------------------------------------------------------------------------


def test_pictures_change_a_little() -> None:
    asked: dict[str, Any] = {"prompt": "a red circle on a white background", "num_inference_steps": 4, "seed": 5}
    base = load_demo()
    expected = ours(SdxlFamily(base), **asked)
    base.unet = copy.deepcopy(base.unet)
    assert use_fp8_convolutions(base.unet, seconds=clock({TILE: 0.1})) == 3
    found = psnr(ours(SdxlFamily(base), **asked), expected)
    assert 28 < found < 60


@pytest.mark.parametrize(
    ("capability", "tile", "depth"),
    [(90, tile, 128) for tile in TILES] + [(90, TILE, 64), (89, TILE, 128), (100, TILE, 128), (120, TILE, 128)],
    ids=str,
)
def test_it_is_machine_code_for_8_bit_matrix_units_and_keeps_its_sums_in_registers(
    capability: int, tile: Tile, depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tensors = {"pixels": "*fp8e4nv", "weights": "*fp8e4nv", "outputs": "*bf16"}
    kinds = {name: tensors.get(name, "*fp32" if name == "scales" else "i32") for name in KERNEL.arg_names}
    rows, columns, warps, stages = astuple(tile)
    constants = {"tile_pixels": rows, "tile_features": columns, "depth": depth}
    any_number = [each.name for each in KERNEL.params if each.do_not_specialize]
    assert any_number == ["count", "height", "width"]
    source = ASTSource(
        fn=KERNEL,
        signature=kinds | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(kinds) if name not in (*constants, *any_number)
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    instruction = MATRIX_UNITS[capability].replace("n64", f"n{columns}")
    assert instruction in compiled.asm["ptx"]
    assert "cp.async" in compiled.asm["ptx"], "it reads ahead"
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    stack = re.search(r" STACK:(\d+) ", told)
    assert stack is not None and int(stack[1]) <= SPARE, told
