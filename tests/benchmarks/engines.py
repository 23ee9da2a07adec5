"""One model at one level of optimization behind a batcher, and what is read off it while the batcher runs it.

Requests go in at `Batcher.submit`, files come out. The instruments sit on the family, on the device's own thread, and
wait for nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from torch import nn

from app.engine.batcher import Batcher
from app.engine.family import Family
from app.errors import OutOfMemory
from app.generation import GenerateRequest
from app.settings import Settings
from app.telemetry import Telemetry

DEFAULT_POOL = (0, 0)
"""Of torch's memory on a GPU; others belong to CUDA graphs."""
GIB = 2**30
STAGES = {"encode_all": "encode", "begin": "begin", "step": "step", "decode": "decode"}
"""Methods of a family that a batcher calls, and what they are called here."""
SCHEDULERS = (diffusers.EulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler)
"""Of SDXL and of FLUX, as their configurations have them."""
WAIT = 3600.0
"""Seconds after which a request is given up: longer than anything takes."""

MOST_TO_END = 10.0
"""Seconds that the threads of a batcher may take to end."""

_numbers = itertools.count()


def free(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def share_weights(made: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the modules around the same weights: what one changes in place, the others do not see."""
    known: dict[int, Any] = {}
    for components in made:
        for part in components.values():
            if isinstance(part, nn.Module):
                known |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in part.parameters()}
                known |= {id(b): b for b in part.buffers()}
    copies: list[dict[str, Any]] = copy.deepcopy([dict(components) for components in made], known)
    return copies


# --- What a picture went through -------------------------------------------------------------------------------


@dataclass
class Trajectory:
    """One picture's way, in float32 on the CPU.

    Attributes:
        conditioning: what the text encoders said.
        latents: before each step, and after the last.
        predictions: of the model in each step, guidance included.
    """

    conditioning: Any = None
    latents: list[torch.Tensor] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)


def distance(one: torch.Tensor, reference: torch.Tensor) -> float:
    """‖one − reference‖ / ‖reference‖."""
    return float(torch.linalg.vector_norm(one - reference) / torch.linalg.vector_norm(reference))


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """`value` with all tensors of numbers that it holds elsewhere and in another format."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, dtype if value.is_floating_point() else None, copy=True)
    if isinstance(value, Mapping):
        return {key: _moved(each, device, dtype) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)})
    return value


@contextlib.contextmanager
def _predictions(hear: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Let `hear` have what every scheduler is given as the model's prediction."""

    def listening(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def wrapper(scheduler: Any, prediction: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            hear(prediction)
            return step(scheduler, prediction, *arguments, **options)

        return wrapper

    own = {kind: kind.step for kind in SCHEDULERS}
    for kind, step in own.items():
        kind.step = listening(step)
    try:
        yield
    finally:
        for kind, step in own.items():
            kind.step = step


# --- The instruments -------------------------------------------------------------------------------------------


class Instruments:
    """Sits on a family's stages and notes what goes on, without waiting for the device.

    Args:
        family: any; a batcher does not see a difference.
        device: its.

    Attributes:
        rows: the most of any pass.
        passes: by model part, steps taken, counted once for each image.
        pixels: when the last pictures were there, on the clock of `time.perf_counter`.
        recorded: what the first image goes through, where somebody wants to know.
        forced: whose conditioning and latents every step starts from, instead of its own.
        noise: whose first latents the first step starts from: not every torch draws the same in every dtype.
    """

    def __init__(self, family: Family[Any], device: torch.device) -> None:
        self._family = family
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self.reset()
        for method, stage in STAGES.items():
            setattr(family, method, functools.partial(self._watch, stage, getattr(family, method)))

    def reset(self) -> None:
        self._marks.clear()
        self.rows = 0
        self.passes: Counter[str] = Counter()
        self.pixels = 0.0
        self.recorded: Trajectory | None = None
        self.forced: Trajectory | None = None
        self.noise: Trajectory | None = None

    def seconds(self) -> dict[str, list[float]]:
        """Of every call, by stage; of a GPU's own time."""
        found: dict[str, list[float]] = {stage: [] for stage in STAGES.values()}
        for stage, start, end in self._marks:
            found[stage].append(end - start if isinstance(start, float) else start.elapsed_time(end) / 1000)
        return found

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _watch(self, stage: str, method: Callable[..., Any], what: Sequence[Any], *rest: Any, **options: Any) -> Any:
        if stage == "step":
            self._before_step(what)
        if stage == "decode" and self.recorded is not None:
            self.recorded.latents.append(_moved(what[0].latents, torch.device("cpu"), torch.float32))
        start = self._mark()
        result = method(what, *rest, **options)
        self._marks.append((stage, start, self._mark()))
        if stage == "decode":
            self.pixels = time.perf_counter()
        if stage == "encode":
            result = self._after_encode(result)
        return result

    def _before_step(self, jobs: Sequence[Any]) -> None:
        self.rows = max(self.rows, sum(map(self._family.rows, jobs)))
        self.passes.update(part_of(job) for job in jobs)
        job = jobs[0]
        source = self.forced or (self.noise if job.step_index == 0 else None)
        if source is not None:
            job.latents = _moved(source.latents[job.step_index], job.latents.device, job.latents.dtype)
        if self.recorded is not None:
            self.recorded.latents.append(_moved(job.latents, torch.device("cpu"), torch.float32))

    def _after_encode(self, conditionings: list[Any]) -> list[Any]:
        if self.recorded is not None:
            self.recorded.conditioning = _moved(conditionings[0], torch.device("cpu"), torch.float32)
        if self.forced is None:
            return conditionings
        like = next(_tensors(conditionings[0]))
        return [_moved(self.forced.conditioning, like.device, like.dtype)]


def part_of(job: Any) -> str:
    """The model part whose turn it is: ``base``, ``refiner`` or ``transformer``."""
    return str(job.leg.part.name) if hasattr(job, "leg") else "transformer"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))


def graph_bytes(device: torch.device) -> int:
    """What CUDA graphs work in: it is theirs, but counts as free between replays."""
    if device.type != "cuda":
        return 0
    segments = [each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) != DEFAULT_POOL]
    return sum(each["total_size"] - each["allocated_size"] for each in segments)


def _storages(parts: Iterable[nn.Module]) -> dict[int, int]:
    """Bytes of all memory that the weights of `parts` lie in, by its address."""
    found: dict[int, int] = {}
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            for inner in _inner(tensor):
                storage = inner.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _inner(tensor: Any) -> Iterator[torch.Tensor]:
    """What a tensor of a kind of its own, such as a quantized one, is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _inner(getattr(tensor, name))


# --- The engine ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wave:
    """Requests that came at the same moment and were painted together.

    Attributes:
        seconds: until the pixels of the last picture were there.
        latency: until its file was there, which other threads write.
        rows: of the largest pass.
        passes: by model part, steps taken, counted once for each image.
        encode: seconds of all text encoding; likewise `begin` and `decode`.
        step: seconds of a pass, the median.
        memory: GiB that the model and its work took at most, as far as the device tells.
        unexpected: passes in shapes that were not prepared for.
    """

    seconds: float
    latency: float
    rows: int
    passes: Mapping[str, int]
    encode: float
    begin: float
    step: float
    decode: float
    memory: float | None
    unexpected: int = 0


class Engine:
    """A family behind a batcher, as a server has it.

    Args:
        load: makes the family, and says which modules it is made of; called on the thread that owns it.
        settings: of the server.
        device: of the family.
        known: modules whose weights are on the device already, which the family may share.

    Attributes:
        warm_up: seconds from the weights to the first request.

    Raises:
        Exception: whatever `load` raises.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Family[Any], Mapping[str, nn.Module]]],
        settings: Settings,
        device: torch.device,
        known: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        self._device = device
        self._load = load
        self._telemetry = Telemetry("benchmark")
        self._parts: Mapping[str, nn.Module] = {}
        self._batcher = Batcher(
            self._make,
            self._telemetry,
            max_queue=settings.max_queue,
            max_batch_size=settings.max_batch_size,
            encode_threads=settings.encode_threads,
            embed_metadata=settings.embed_metadata,
            warm_up=False,
            max_batch_pixels=settings.max_batch_pixels,
            max_queue_seconds=WAIT,
            step_timeout=WAIT,
        )
        started, before, graphs = time.perf_counter(), self._allocated(), graph_bytes(device)
        self._batcher.start()
        try:
            self.family = self._batcher.ready.result()
        except BaseException:
            self._batcher.close(0.0)
            raise
        self.warm_up = time.perf_counter() - started
        held, there = _storages(self._parts.values()), _storages(known.values())
        new = sum(size for key, size in held.items() if key not in there)
        self._held = sum(held.values()) + self._allocated() - before - new + graph_bytes(device) - graphs
        """Bytes that it would hold were it alone: its weights, and what it keeps besides."""

    def _make(self) -> Family[Any]:
        family, self._parts = self._load()
        self.instruments = Instruments(family, self._device)
        return family

    def close(self) -> None:
        """End, and let go of the family and its memory."""
        self._batcher.close(0.0)
        family = weakref.ref(self.family)
        del self.family, self.instruments, self._batcher, self._load, self._parts
        # The batcher's threads, which hold it, have been told to end and may take a moment.
        given_up = time.monotonic() + MOST_TO_END
        while family() is not None and time.monotonic() < given_up:
            gc.collect()
            time.sleep(0.01)
        free(self._device)

    def paint(self, request: GenerateRequest, images: int = 1) -> Wave:
        """Paint `images` pictures of prompts that nobody has asked for yet, all at once.

        Args:
            request: what they share.

        Raises:
            OutOfMemory: they do not fit into passes of a server's size.
        """
        requests = [
            self.family.resolve(replace(request, prompt=f"{request.prompt}, number {next(_numbers)}", seed=seed))
            for seed in range(images)
        ]
        self.instruments.reset()
        return self._paint(requests)

    def follow(
        self, request: GenerateRequest, *, forced: Trajectory | None = None, noise: Trajectory | None = None
    ) -> Trajectory:
        """What one picture goes through.

        Args:
            request: the prompt and seed are its own.
            forced: see `Instruments`.
            noise: likewise.
        """
        self.instruments.reset()
        recorded = self.instruments.recorded = Trajectory()
        self.instruments.forced, self.instruments.noise = forced, noise

        def hear(prediction: torch.Tensor) -> None:
            recorded.predictions.append(_moved(prediction, torch.device("cpu"), torch.float32))

        with _predictions(hear):
            self._paint([self.family.resolve(request)])
        self.instruments.reset()
        return recorded

    def _paint(self, requests: Sequence[GenerateRequest]) -> Wave:
        before = self._allocated()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        full, unexpected = self._times_full(), self.family.unexpected_shapes
        started = time.perf_counter()
        self._batcher.submit(requests, WAIT).future.result()
        ended = time.perf_counter()
        if self._times_full() > full:
            # It was painted all the same, in smaller passes.
            raise OutOfMemory("The device has too little memory for passes of this size.")
        memory = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            work = torch.cuda.max_memory_allocated(self._device) - before
            memory = (self._held + work) / GIB
        seconds = self.instruments.seconds()
        return Wave(
            seconds=self.instruments.pixels - started,
            latency=ended - started,
            rows=self.instruments.rows,
            passes=dict(self.instruments.passes),
            encode=sum(seconds["encode"]),
            begin=sum(seconds["begin"]),
            step=statistics.median(seconds["step"]),
            decode=sum(seconds["decode"]),
            memory=memory,
            unexpected=self.family.unexpected_shapes - unexpected,
        )

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def _times_full(self) -> float:
        metrics = self._telemetry.registry.collect()
        full = next(metric for metric in metrics if metric.name == "sdxl_out_of_memory")
        return sum(sample.value for sample in full.samples if sample.name.endswith("_total"))
