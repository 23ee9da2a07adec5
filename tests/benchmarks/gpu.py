"""How fast this device paints at every level of ``--optimize``, beside what its matrix rate allows: ``make bench-gpu``.

Nothing is downloaded: SDXL, its refiner and FLUX are made from their public configurations with seeded random weights,
on the device. Requests go through `app.engine.batcher.Batcher` with a server's own settings, so that what is measured
is what callers get, but for HTTP. All levels of a model are on the device at once, around the same weights, and take
turns, so that noise hits all alike; figures are medians of the rounds.

Results are kept by model, level, steps and pictures: a run replaces what it measures anew and leaves the rest, so that
the whole can be run in pieces (``--model``, ``--levels``, ``--rows``). ``--small`` runs all of it with the demo's
configurations, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import logging
import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from app.engine import step_cache
from app.engine.family import Family
from app.engine.optimization import choose_optimization
from app.engine.placement import Placement, choose_device, choose_dtype
from app.engine.single_files import CONFIGS
from app.engine.weights import DEMO_WEIGHTS
from app.errors import ModelLoadFailed, OutOfMemory, RuntimeFault
from app.generation import GenerateRequest
from app.settings import Settings
from tests.benchmarks import gpu_report
from tests.benchmarks.devices import Log, matrix_rate, name_of, slug
from tests.benchmarks.engines import GIB, Engine, Trajectory, Wave, distance, free, share_weights
from tests.gpu.full_size import META, assemble, forward, make_components, make_models, modules

RESULTS = Path(__file__).parent / "results"
STEP_CACHE = "step_cache"
"""No level of ``--optimize``, but measured as one: ``safe`` with ``--step_cache 2``."""
GUIDANCE_END = "guidance_end"
"""Likewise: ``max``, with requests whose ``guidance_end`` is `END_OF_GUIDANCE`."""
END_OF_GUIDANCE = 0.5
LEVELS = ("off", "safe", "compile", "max", GUIDANCE_END, STEP_CACHE)
SETTINGS: Mapping[str, dict[str, Any]] = {
    STEP_CACHE: {"optimize": "safe", "step_cache": 2},
    GUIDANCE_END: {"optimize": "max"},
}
DEVICES = re.compile(r"auto|cpu|cuda(:(0|[1-9]\d?))?")
UNFIT = "does not fit"
FIRST_STEPS = 2
"""Steps of what is painted before anything is measured."""

Results = dict[str, Any]
Case = tuple[int, int]
"""Steps, and pictures at a time."""
Waves = dict[tuple[str, Case], list[Wave] | str]
"""By level and case; a sentence where there are none."""


@dataclass(frozen=True)
class Model:
    """What is measured of one model.

    Attributes:
        configs: of the full-size one, a base and a refiner if there is one.
        demo: of the small one.
        alone: steps of one picture by itself.
        together: steps of several at a time.
        rows: that a picture brings to a forward pass: two with guidance by a negative prompt.
        denoising_limit: of every request.
        step_cache: whether that has steps to leave out.
        small: steps of the small one.
    """

    configs: tuple[str, ...]
    demo: tuple[str, ...]
    alone: tuple[int, ...]
    together: int
    rows: int
    denoising_limit: float | None = None
    step_cache: bool = False
    small: int = 2

    def folders(self, small: bool) -> list[Path]:
        return [DEMO_WEIGHTS / name for name in self.demo] if small else [CONFIGS / name for name in self.configs]


MODELS = {
    "sdxl": Model(("sdxl-base",), ("sdxl",), alone=(20, 30), together=20, rows=2),
    "sdxl-refiner": Model(
        ("sdxl-base", "sdxl-refiner"),
        ("sdxl", "refiner"),
        alone=(20, 30),
        together=20,
        rows=2,
        denoising_limit=0.8,
    ),
    "flux-dev": Model(
        ("flux-dev",), ("flux",), alone=(28,), together=28, rows=1, step_cache=True, small=step_cache.SHORTEST
    ),
    "flux-schnell": Model(("flux-schnell",), ("flux",), alone=(4,), together=4, rows=1),
}


@dataclass(frozen=True)
class Setup:
    """How a run is done.

    Attributes:
        side: of every picture, pixels.
        images: pictures at a time.
        rate: TFLOP/s of matrix products in `dtype`.
        backend: of ``torch.compile``.
    """

    device: torch.device
    dtype: torch.dtype
    small: bool
    side: int
    levels: tuple[str, ...]
    images: tuple[int, ...]
    rounds: int
    differences: bool
    rate: float
    backend: str = "inductor"

    def levels_of(self, model: Model) -> list[str]:
        possible = {STEP_CACHE: model.step_cache, GUIDANCE_END: model.rows == 2}
        return [level for level in self.levels if possible.get(level, True)]

    def cases(self, model: Model) -> list[Case]:
        """In the order of what they need."""
        alone = (model.small,) if self.small else model.alone
        together = model.small if self.small else model.together
        return [(steps, 1) for steps in alone if 1 in self.images] + [
            (together, images) for images in sorted(self.images) if images > 1 or together not in alone
        ]

    def request(self, model: Model, steps: int, level: str = "off") -> GenerateRequest:
        return GenerateRequest(
            prompt="a red star",
            seed=0,
            height=self.side,
            width=self.side,
            num_inference_steps=steps,
            denoising_limit=model.denoising_limit,
            guidance_end=END_OF_GUIDANCE if level == GUIDANCE_END else None,
        )

    def settings(self, model: Model, level: str) -> Settings:
        """A server's own, but for how many rows it prepares for: no more than are measured."""
        rows = min(max(self.images) * model.rows, Settings().max_batch_size)
        chosen = SETTINGS.get(level, {"optimize": level})
        return Settings(**chosen, warm_sizes=(f"{self.side}x{self.side}",), max_batch_size=rows)


# --- What the hardware allows ----------------------------------------------------------------------------------


def count_work(model: Model, small: bool, side: int) -> dict[str, float]:
    """TFLOP of a step of each model part, and of the text encoders and the VAE's decoding, for one picture."""
    work: dict[str, float] = {"encode": 0.0}
    for name, folder in zip(("base", "refiner"), model.folders(small), strict=False):
        components = make_components(folder, META, torch.float32)
        for part, module in components.items():
            if not isinstance(module, nn.Module):
                continue
            run = forward(part, components, torch.float32, side, t5_tokens=512)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            tflop = counter.get_total_flops() / 1e12
            if part.startswith("text_encoder"):
                work["encode"] += tflop
            else:
                work[{"unet": name, "vae": "decode"}.get(part, part)] = tflop
    return work


def work_of(wave: Wave, images: int, work: Mapping[str, float]) -> float:
    """TFLOP of a wave: of the passes that it took, and of one encoding and one decoding for each picture."""
    passes = sum(work[part] * count for part, count in wave.passes.items())
    return passes + images * (work["encode"] + work["decode"])


# --- The models at all levels ----------------------------------------------------------------------------------


def measure(name: str, setup: Setup, results: Results, save: Callable[[], None]) -> None:
    """Measure one model at all levels, put what comes out into `results`, and `save` them as soon as it is there."""
    model = MODELS[name]
    levels = setup.levels_of(model)
    if not levels:
        say(name, "nothing to measure: it has no such level")
        return
    steps = setup.cases(model)[0][0]
    truth = find_truth(model, setup, steps) if setup.differences else None
    work = count_work(model, setup.small, setup.side)
    engines: dict[str, Engine] = {}
    with contextlib.ExitStack() as stack:
        made = make_models(model.folders(setup.small), setup.device, setup.dtype)
        for level in levels:
            record: dict[str, Any] = {"model": name, "level": level}
            try:
                # What ends guidance early is the request, so one engine does for both.
                engine = engines.get("max") if level == GUIDANCE_END else None
                if engine is None:
                    engine = start(made, setup, setup.settings(model, level), setup.dtype)
                    stack.callback(engine.close)
                engines[level] = engine
            except Exception as error:
                record["unavailable"] = why_not(error)
                error.__traceback__ = None
                free(setup.device)
                forget(results["rows"], record, ("model", "level"))
            else:
                record["warm_up"] = engine.warm_up
                record |= differences(engine, setup.request(model, steps, level), truth)
            say(name, level, record.get("unavailable") or f"ready after {record['warm_up']:.1f} s")
            keep(results["levels"], record, ("model", "level"))
            save()
        if not engines:
            say(name, "nothing to measure: none of these levels is to be had here")
            return
        for waves in take_turns(engines, setup, model):
            for (level, (steps, images)), found in waves.items():
                if not found:
                    continue  # yet
                row = {"model": name, "level": level, "steps": steps, "images": images}
                row |= summarize(found, images, work, setup.rate)
                keep(results["rows"], row, ("model", "level", "steps", "images"))
            save()


def start(made: Sequence[Mapping[str, Any]], setup: Setup, settings: Settings, dtype: torch.dtype) -> Engine:
    chosen = choose_optimization(settings, Placement(setup.device, dtype, None, "none"))
    optimization = dataclasses.replace(chosen, backend=setup.backend)

    def load() -> tuple[Family[Any], Mapping[str, nn.Module]]:
        own = share_weights(made)
        family = assemble(own, optimization=optimization)
        family.warm(functools.partial(say, settings.optimize))
        return family, modules(own)

    return Engine(load, settings, setup.device, modules(made))


def why_not(error: Exception) -> str:
    """A short reason for people."""
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return UNFIT
    if isinstance(error, ModelLoadFailed):
        return f"not available: {error}"
    if isinstance(error, RuntimeFault):
        return f"failed: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"not available: {type(error).__name__}: {lines[0][:200]}"


def take_turns(engines: Mapping[str, Engine], setup: Setup, model: Model) -> Iterator[Waves]:
    """All waves so far of every level and case, or why there are none, after each case.

    What does not fit once is not tried again.
    """
    waves: Waves = {}
    order = list(engines)
    for round_ in range(-1, setup.rounds):
        for case in setup.cases(model):
            for level in order:
                so_far = waves.setdefault((level, case), [])
                if isinstance(so_far, str):
                    continue
                steps, images = case
                # The first round is a short one, so that nobody pays for first times.
                request = setup.request(model, min(steps, FIRST_STEPS) if round_ < 0 else steps, level)
                try:
                    wave = engines[level].paint(request, images)
                except RuntimeFault as fault:
                    waves[level, case] = why_not(fault)
                    say(level, f"{steps} steps, {images} at a time: {waves[level, case]}")
                    continue
                if round_ >= 0:
                    so_far.append(wave)
                    say(level, f"{steps} steps, {images} at a time: {wave.seconds:.3f} s")
            # Who goes first changes, so that nobody always comes after the same neighbour.
            order = order[1:] + order[:1]
            if round_ >= 0:
                yield waves


def summarize(waves: Sequence[Wave] | str, images: int, work: Mapping[str, float], rate: float) -> dict[str, Any]:
    if isinstance(waves, str):
        return {"unavailable": waves}
    seconds = [wave.seconds for wave in waves]
    tflop = work_of(waves[0], images, work)
    memory = [wave.memory for wave in waves if wave.memory is not None]
    return {
        "rows": waves[0].rows,
        "rounds": len(waves),
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "latency": statistics.median(wave.latency for wave in waves),
        "images_per_second": images / statistics.median(seconds),
        "tflop": tflop,
        "floor": tflop / rate,
        "stages": {
            stage: statistics.median(getattr(wave, stage) for wave in waves)
            for stage in ("encode", "begin", "step", "decode")
        },
        "memory_gib": max(memory) if memory else None,
        "unexpected_shapes": sum(wave.unexpected for wave in waves),
    }


# --- How far the levels are from float32 -----------------------------------------------------------------------


def find_truth(model: Model, setup: Setup, steps: int) -> Trajectory | str:
    """One picture's way in float32, by weights that hold the same numbers; or why there is none."""
    try:
        made = make_models(model.folders(setup.small), setup.device, torch.float32, drawn=setup.dtype)
        with full_precision():
            engine = start(made, setup, setup.settings(model, "off"), torch.float32)
            try:
                return engine.follow(setup.request(model, steps))
            finally:
                engine.close()
    except (RuntimeFault, torch.OutOfMemoryError) as error:
        return why_not(error)
    finally:
        made = []
        free(setup.device)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TensorFloat-32, which has 10 bits where float32 has 23."""
    # Not by torch.set_float32_matmul_precision, which cannot be undone: what is compiled is kept by this, too.
    matrices = torch.backends.cuda.matmul
    before, matrices.fp32_precision = matrices.fp32_precision, "ieee"
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        matrices.fp32_precision = before


def differences(engine: Engine, request: GenerateRequest, truth: Trajectory | str | None) -> dict[str, Any]:
    """‖out − reference‖ / ‖reference‖: of the prediction in each step from the reference's own latents and embeddings,
    and of the latents after the last step of the same request from the same noise."""
    if not isinstance(truth, Trajectory):
        return {} if truth is None else {"differences": f"float32: {truth}"}
    try:
        forced, free = engine.follow(request, forced=truth), engine.follow(request, noise=truth)
    except RuntimeFault as fault:
        return {"differences": why_not(fault)}
    return {
        "predictions": [distance(one, other) for one, other in zip(forced.predictions, truth.predictions, strict=True)],
        "latents": distance(free.latents[-1], truth.latents[-1]),
    }


# --- The results -----------------------------------------------------------------------------------------------


def keep(records: list[dict[str, Any]], record: dict[str, Any], key: Sequence[str]) -> None:
    """Put `record` in, in the place of an older one of the same."""
    forget(records, record, key)
    records.append(record)
    ranks = {value: rank for rank, value in enumerate((*MODELS, *LEVELS))}
    records.sort(key=lambda each: [ranks.get(each[name], each[name]) for name in key])


def forget(records: list[dict[str, Any]], record: Mapping[str, Any], key: Sequence[str]) -> None:
    """Take out what is of the same `key` as `record`."""
    records[:] = [other for other in records if any(other[name] != record[name] for name in key)]


def read(path: Path | None) -> Results:
    if path is None or not path.exists():
        return {"runs": [], "levels": [], "rows": []}
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def write(results: Results, path: Path) -> None:
    """As JSON, and as a table for the README under the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(gpu_report.table(results), encoding="utf-8")


def say(*words: Any) -> None:
    print(*words, flush=True)


def prepare(folder: Path) -> None:
    """Make the folder for results and try to write there: nobody wants to hear only afterwards that it was in vain.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def device_name(text: str) -> str:
    if not DEVICES.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, not {text!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--rows", type=count, nargs="+", help="pictures at a time (default: 1 2 4 8 16; small: 1 2)")
    parser.add_argument("--rounds", type=count, help="(default: 3; small: 1)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--differences", action=argparse.BooleanOptionalAction, default=True, help="from float32")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; 'eager' stops before machine code")
    parser.add_argument("--small", action="store_true", help="the demo's configurations, 64 x 64, few steps")
    parser.add_argument("--out", type=Path, help="folder for the results (default on a GPU: beside this program)")
    given = parser.parse_args(arguments)

    try:
        device = choose_device(given.device)
    except ModelLoadFailed as error:
        parser.error(str(error))
    if device.type == "cpu" and not given.small:
        why = "no GPU is visible here" if given.device == "auto" else "models of full size need a GPU"
        parser.error(f"{why}; --small runs the demo's configurations on the CPU")
    if given.backend not in torch.compiler.list_backends(exclude_tags=()):
        parser.error(f"torch has no --backend {given.backend!r}; take inductor or eager")
    dtype = choose_dtype(given.dtype, device)
    name = name_of(device)
    out = given.out or (RESULTS if device.type == "cuda" and not given.small else None)
    path = None if out is None else out / f"gpu-{slug(name)}{'-small' if given.small else ''}.json"
    if out is not None:
        try:
            prepare(out)
        except OSError as error:
            parser.error(f"nothing can be written to {out} ({error.strerror}); choose another --out")
    # What importing made stays, and is nothing to look through each time that a model's memory is given back.
    gc.freeze()
    setup = Setup(
        device=device,
        dtype=dtype,
        small=given.small,
        side=64 if given.small else 1024,
        levels=tuple(level for level in LEVELS if level in given.levels),
        images=tuple(sorted(set(given.rows or ((1, 2) if given.small else (1, 2, 4, 8, 16))))),
        rounds=given.rounds or (1 if given.small else 3),
        differences=given.differences,
        rate=matrix_rate(device, dtype),
        backend=given.backend,
    )
    say(f"{name}: {setup.rate:.3g} TFLOP/s in {dtype}")

    results = read(path)
    results |= {"device": name, "side": setup.side, "small": setup.small}
    run: dict[str, Any] = {
        "models": [model for model in MODELS if model in given.model],
        "levels": setup.levels,
        "images": setup.images,
        "rounds": setup.rounds,
        "dtype": str(dtype).removeprefix("torch."),
        "rate_tflops": setup.rate,
        "memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "log": {},
    }
    results["runs"].append(run)

    def save() -> None:
        if path is not None:
            write(results, path)

    for model in run["models"]:
        with Log(device) as log:
            measure(model, setup, results, save)
        run["log"][model] = log.summary
        save()
        if path is not None:  # takes half a second, so not after each row
            gpu_report.draw(results, path.with_suffix(".svg"))
        torch.compiler.reset()
        free(device)
    print(gpu_report.table(results))
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    raise SystemExit(main())
