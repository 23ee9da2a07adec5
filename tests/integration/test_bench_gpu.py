"""The benchmark for GPUs, as `make bench-gpu` runs it but in small: what somebody would look at in its results."""

from __future__ import annotations

import gc
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu, gpu_report

STEPS = {"sdxl": 2, "sdxl-refiner": 2, "flux-dev": 8, "flux-schnell": 2}
FIGURES = ("seconds", "fastest", "slowest", "latency", "images_per_second", "tflop", "floor")


def command(out: Path, *flags: str) -> list[str]:
    return ["--small", "--device", "cpu", "--out", str(out), *flags]


def run(out: Path, *flags: str) -> dict[str, Any]:
    """What stands in the file afterwards."""
    try:
        assert gpu.main(command(out, *flags)) == 0
    finally:
        gc.unfreeze()  # what other tests left
    return read(out)


def read(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "gpu-cpu-small.json").read_text())
    return results


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two pieces left their results: all models as they are, and what one has besides."""
    folder = tmp_path_factory.mktemp("results")
    run(folder, "--levels", "off", "step_cache")
    # Machine code for a CPU takes minutes, and is nothing that this program measures.
    run(folder, "--levels", "compile", "max", "guidance_end", "--model", "sdxl", "--backend", "eager")
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return read(out)


def test_pieces_make_one_whole(results: dict[str, Any]) -> None:
    levels = [(each["model"], each["level"]) for each in results["levels"]]
    assert levels == [
        ("sdxl", "off"),
        ("sdxl", "compile"),
        ("sdxl", "max"),
        ("sdxl", "guidance_end"),
        ("sdxl-refiner", "off"),
        ("flux-dev", "off"),
        ("flux-dev", "step_cache"),
        ("flux-schnell", "off"),
    ]
    assert [(row["model"], row["level"], row["steps"], row["images"]) for row in results["rows"]] == [
        (model, level, STEPS[model], images) for model, level in levels for images in (1, 2)
    ]
    assert [each["levels"] for each in results["runs"]] == [["off", "step_cache"], ["compile", "max", "guidance_end"]]


def test_every_row_has_figures_that_can_be(results: dict[str, Any]) -> None:
    rates = {level: each["rate_tflops"] for each in results["runs"] for level in each["levels"]}
    for row in results["rows"]:
        assert "unavailable" not in row and row["unexpected_shapes"] == 0, row
        numbers = [*(row[name] for name in FIGURES), *row["stages"].values()]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["fastest"] <= row["seconds"] <= row["slowest"]
        # Not that it took longer than the floor: a busy machine's rate may be measured in a bad moment.
        assert row["floor"] == pytest.approx(row["tflop"] / rates[row["level"]])
        assert row["seconds"] <= row["latency"]
        assert row["rows"] == row["images"] * (2 if row["model"].startswith("sdxl") else 1)
        assert row["stages"]["encode"] + row["stages"]["step"] + row["stages"]["decode"] < row["seconds"]


def test_levels_say_how_far_they_are_from_float32(results: dict[str, Any]) -> None:
    for level in results["levels"]:
        assert len(level["predictions"]) == STEPS[level["model"]]
        assert level["warm_up"] > 0
        if level["level"] == "step_cache":
            # Of eight steps these three go without the blocks.
            assert [i for i, difference in enumerate(level["predictions"]) if difference > 1e-4] == [2, 4, 6]
            assert 0 < level["latents"] < 0.1
            continue
        if level["level"] == "guidance_end":
            # The second of two steps goes without guidance, and the latents show it.
            guided, unguided = level["predictions"]
            assert guided < 1e-3 < unguided and level["latents"] > 1e-3
            continue
        most = 0.0 if level["level"] == "off" else 1e-3
        assert max(*level["predictions"], level["latents"]) <= most, level


def test_half_precision_is_seen_to_differ_a_little(tmp_path: Path) -> None:
    models = ("--model", "sdxl-refiner", "flux-dev", "--dtype", "bfloat16")
    for level in run(tmp_path, "--levels", "off", "--rows", "1", *models)["levels"]:
        for difference in (*level["predictions"], level["latents"]):
            assert 1e-4 < difference < 0.1, level


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Where two runs left their results, and what the second one printed, by a process that finds no compiler."""
    folder = tmp_path_factory.mktemp("no-compiler")
    partly, wholly = folder / "partly", folder / "made" / "for it"
    flags = ("--model", "sdxl", "--rows", "1", "--no-differences", "--levels")
    runs = (command(partly, *flags, "off", "compile"), command(wholly, *flags, "compile"))
    program = f"from tests.benchmarks.gpu import main\nfor run in {runs!r}: print('\\f', main(run))"
    absent = {"CXX": str(folder / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    python = [sys.executable, "-c", program]
    done = subprocess.run(python, capture_output=True, text=True, check=False, env={**os.environ, **absent})
    assert done.returncode == 0, done.stderr
    _, second, code = done.stdout.split("\f")
    assert code.strip() == "0"
    return partly, wholly, second


def test_a_level_that_this_machine_has_no_compiler_for_is_said_to_be_absent(
    without_compiler: tuple[Path, Path, str],
) -> None:
    out, _, _ = without_compiler
    results = read(out)
    off, compiled = results["levels"]
    assert "unavailable" not in off and compiled["unavailable"].startswith("not available: The model cannot be")
    assert [(row["level"], row["images"]) for row in results["rows"]] == [("off", 1)]
    assert "| SDXL | – | `compile` | not available:" in (out / "gpu-cpu-small.md").read_text()


def test_where_no_level_is_to_be_had_it_says_so_and_the_table_is_written(
    without_compiler: tuple[Path, Path, str],
) -> None:
    _, out, printed = without_compiler
    assert "sdxl nothing to measure: none of these levels is to be had" in printed
    check_nothing_was_measured(out, printed, ["compile"])


def test_where_a_model_has_no_such_level_it_says_so_and_the_table_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Few steps, none of which the cache leaves out; and nothing that guides. As `make bench-gpu` starts it.
    flags = ("--model", "flux-schnell", "--levels", "step_cache", "guidance_end", "--no-differences")
    monkeypatch.setattr(sys, "argv", ["", *command(tmp_path, *flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(gpu.__file__, run_name="__main__")
    gc.unfreeze()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "flux-schnell nothing to measure: it has no such level" in printed
    check_nothing_was_measured(tmp_path, printed, [])


def check_nothing_was_measured(out: Path, printed: str, absent: list[str]) -> None:
    results = read(out)
    assert [each["level"] for each in results["levels"]] == absent and results["rows"] == []
    assert len(results["runs"]) == 1
    table = (out / "gpu-cpu-small.md").read_text()
    assert table in printed and table.count("not available:") == len(absent)
    assert (out / "gpu-cpu-small.svg").exists()


def test_a_table_and_a_figure_lie_beside_the_numbers(out: Path, results: dict[str, Any]) -> None:
    assert {path.name for path in out.iterdir()} == {f"gpu-cpu-small.{kind}" for kind in ("json", "md", "svg")}
    table = (out / "gpu-cpu-small.md").read_text()
    for model, title in gpu_report.TITLES.items():
        assert table.count(f"| {title} | {STEPS[model]} | `off` |") == 2
    assert table.count("| SDXL | 2 | `compile` |") == 2
    first = results["rows"][0]
    assert f"| {first['images_per_second']:.3g} (2) |" in table and f"| {first['floor']:.3g} |" in table
    figure = (out / "gpu-cpu-small.svg").read_text()
    assert figure.startswith("<?xml") and "FLUX.1 schnell" in figure and "compile" in figure
