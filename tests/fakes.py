"""Families without a model, each named after its one behaviour."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from app.engine.family import Family, Job
from app.engine.scheduler_names import NAMES
from app.errors import InvalidRequest, OutOfMemory
from app.generation import GenerateRequest


@dataclass(slots=True, kw_only=True)
class FakeJob(Job):
    value: int = 0


class Instant(Family[FakeJob]):
    """Paints a flat picture whose colour follows from prompt and seed, in no time."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        """The seeds of every forward pass."""
        self.began: list[int] = []

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        for name in ("height", "width"):
            size = getattr(request, name)
            if size is not None and size % 8:
                raise InvalidRequest(f"{name} must be a multiple of 8, not {size}.")
        return replace(
            request,
            height=request.height or 16,
            width=request.width or 16,
            num_inference_steps=request.num_inference_steps or 4,
            guidance_scale=5.0 if request.guidance_scale is None else request.guidance_scale,
            scheduler=request.scheduler or "Euler",
        )

    def encode(self, request: GenerateRequest) -> int:
        return sum(request.prompt.encode())

    def begin(self, request: GenerateRequest, conditioning: int) -> FakeJob:
        assert request.num_inference_steps and request.seed is not None
        self.began.append(request.seed)
        return FakeJob(request=request, num_steps=request.num_inference_steps, value=conditioning + request.seed)

    def signature(self, job: FakeJob) -> Hashable:
        return (job.request.height, job.request.width)

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.passes.append([job.request.seed or 0 for job in jobs])
        for job in jobs:
            job.step_index += 1

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        pictures = [
            np.full((job.request.height or 0, job.request.width or 0, 3), job.value % 256, np.uint8) for job in jobs
        ]
        return np.stack(pictures)


class Slow(Instant):
    """Takes a moment for every step."""

    seconds = 0.02

    def step(self, jobs: Sequence[FakeJob]) -> None:
        time.sleep(self.seconds)
        super().step(jobs)


class Gated(Instant):
    """Takes a step only when the test lets it: `permit` as often as there should be steps."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)
        self.waiting = threading.Event()

    def permit(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.waiting.set()
        assert self._permits.acquire(timeout=30)
        super().step(jobs)


class ReadsSlowly(Instant):
    """Reads a prompt only when the test lets it, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = threading.Event()
        self.read_on = threading.Event()
        self.prompts: list[str] = []

    def encode(self, request: GenerateRequest) -> int:
        self.prompts.append(request.prompt)
        self.reading.set()
        assert self.read_on.wait(30)
        return super().encode(request)


class RunsOutOfMemory(Instant):
    """Has no room for pictures wider than 64 pixels."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        if any((job.request.width or 0) > 64 for job in jobs):
            raise OutOfMemory("The device has too little memory for this request.")
        super().step(jobs)


class FailsAt(Instant):
    """Raises in one stage for every request whose prompt is "fail"."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self._stage = stage

    def _fail(self, stage: str, jobs: Sequence[GenerateRequest]) -> None:
        if stage == self._stage and any(request.prompt == "fail" for request in jobs):
            raise RuntimeError(f"{stage} broke")

    def encode(self, request: GenerateRequest) -> int:
        self._fail("encode", [request])
        return super().encode(request)

    def begin(self, request: GenerateRequest, conditioning: int) -> FakeJob:
        self._fail("begin", [request])
        return super().begin(request, conditioning)

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self._fail("step", [job.request for job in jobs])
        super().step(jobs)

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self._fail("decode", [job.request for job in jobs])
        return super().decode(jobs)


class Warns(Instant):
    """Has no refiner and says so, as SDXL does."""

    def warnings(self, request: GenerateRequest) -> tuple[str, ...]:
        return ("denoising_limit has no effect without a refiner.",) if request.denoising_limit else ()


class Dies(Instant):
    """Takes its thread along: raises what no handler catches."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        raise SystemExit("the thread is told to end")


class Strict(Instant):
    """Refuses what a real model refuses, whatever the server's limits allow."""

    maxima: Mapping[str, int] = MappingProxyType({"clip_skip": 2})

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        if request.scheduler is not None and request.scheduler not in NAMES:
            raise InvalidRequest(f"There is no scheduler {request.scheduler[:40]!r}.")
        most = self.maxima.get("clip_skip", 0)
        if request.clip_skip is not None and request.clip_skip > most:
            raise InvalidRequest(f"clip_skip must be at most {most} for this model.")
        return super().resolve(request)


class Narrow(Strict):
    """Takes little: no masks, few parameters, multiples of 16, two schedulers, and an adapter."""

    parameters = frozenset(
        {"prompt", "negative_prompt", "true_cfg_scale", "height", "width", "image", "strength", "num_inference_steps"}
        | {"guidance_scale", "seed", "num_images_per_prompt", "scheduler", "max_sequence_length", "loras"}
        | {"output_format"}
    )
    size_step = 16
    schedulers = ("Euler", "Heun")
    adapters = ("style.2",)
    least_strength = 0.02

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        if request.mask_image is not None:
            raise InvalidRequest("This model takes no masks.")
        if request.strength is not None and request.strength < self.least_strength:
            raise InvalidRequest(f"strength must be at least {self.least_strength}.")
        return super().resolve(request)


class OnlyInpaints(Strict):
    """Has a UNet for inpainting and nothing else."""

    def resolve(self, request: GenerateRequest) -> GenerateRequest:
        if request.mask_image is None:
            raise InvalidRequest("This model only inpaints; give the inputs image and mask_image.")
        return super().resolve(request)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Timed(Instant):
    """Takes time on a fake clock: `fixed` seconds for a pass and `per_row` for each row, and `decoding` for a picture.

    With guidance a picture has two rows.
    """

    fixed, per_row, decoding = 1.0, 0.1, 0.5

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.decodes: list[list[int]] = []

    def rows(self, job: FakeJob) -> int:
        return 2 if (job.request.guidance_scale or 0) > 1 else 1

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.clock.now += self.fixed + self.per_row * sum(map(self.rows, jobs))
        super().step(jobs)

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self.clock.now += self.decoding * len(jobs)
        self.decodes.append([job.request.seed or 0 for job in jobs])
        return super().decode(jobs, tiled)


class StopsGuiding(Timed):
    """Has guidance in the first half of its steps alone."""

    def rows(self, job: FakeJob) -> int:
        return super().rows(job) if 2 * job.step_index < job.num_steps else 1


class RunsAhead(Timed):
    """Its device is a step behind, as a GPU is, and whoever wants something of it waits."""

    behind = 0.0

    def step(self, jobs: Sequence[FakeJob]) -> None:
        started = self.clock.now
        super().step(jobs)
        self.behind, self.clock.now = self.clock.now - started, started + self.behind

    def catch_up(self) -> None:
        self.clock.now += self.behind
        self.behind = 0.0

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self.catch_up()
        return super().decode(jobs, tiled)


class WholeJobs(Timed):
    """Moves weights between its stages, and notes the stages in their order."""

    interleaves = False

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.stages: list[str] = []

    def encode(self, request: GenerateRequest) -> int:
        self.stages.append("encode")
        return super().encode(request)

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.stages.append(f"step {self.signature(jobs[0])}")
        super().step(jobs)

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self.stages.append("decode")
        return super().decode(jobs, tiled)


class Cramped(Instant):
    """Has room for so many pixels in each stage; tiles need a quarter."""

    def __init__(self, **room: float) -> None:
        super().__init__()
        self.room = room
        self.tried: list[tuple[str, int]] = []
        self.tiled: list[int] = []

    def _fit(self, stage: str, pixels: float) -> None:
        self.tried.append((stage, int(pixels)))
        if pixels > self.room.get(stage, float("inf")):
            raise OutOfMemory("The device has too little memory for this request.")

    @staticmethod
    def _pixels(requests: Sequence[GenerateRequest]) -> int:
        return sum((request.height or 0) * (request.width or 0) for request in requests)

    def encode_all(self, requests: Sequence[GenerateRequest]) -> list[int]:
        self._fit("encode", self._pixels(requests))
        return super().encode_all(requests)

    def begin(self, request: GenerateRequest, conditioning: int) -> FakeJob:
        self._fit("begin", self._pixels([request]))
        return super().begin(request, conditioning)

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self._fit("step", self._pixels([job.request for job in jobs]))
        super().step(jobs)

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self._fit("decode", self._pixels([job.request for job in jobs]) / (4 if tiled else 1))
        if tiled:
            self.tiled += [job.request.seed or 0 for job in jobs]
        return super().decode(jobs, tiled)


class StopsHalfway(Instant):
    """Runs out of memory in every pass of several, after the first of its jobs has taken the step."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        super().step(jobs[:1])
        if len(jobs) > 1:
            raise OutOfMemory("The device has too little memory for this request.")


class LosesTheDevice(Instant):
    """Fails as CUDA does once a context is beyond repair."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`")


class Hangs(Instant):
    """Never comes back from a step, until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.hanging = threading.Event()
        self.go = threading.Event()

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.hanging.set()
        self.go.wait(60)
        super().step(jobs)


class Previews(Instant):
    """Shows what it has so far: grey from the latents."""

    def preview(self, job: FakeJob, whole: bool = False) -> np.ndarray | None:
        return super().preview(job, whole) if whole else np.full((2, 2, 3), 128, np.uint8)


class CannotPreview(Instant):
    """Breaks when it is asked for a preview."""

    def preview(self, job: FakeJob, whole: bool = False) -> np.ndarray | None:
        raise RuntimeError("preview broke")


class Unprepared(Instant):
    """Has compiled nothing for what is asked of it."""

    def step(self, jobs: Sequence[FakeJob]) -> None:
        self.unexpected_shapes += 1
        super().step(jobs)


class DecodesTwice(Instant):
    """Needs a second try for every picture."""

    def decode(self, jobs: Sequence[FakeJob], tiled: bool = False) -> np.ndarray:
        self.decode_retries += len(jobs)
        return super().decode(jobs, tiled)
