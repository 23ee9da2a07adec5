"""What fails on the device: memory that is short costs time and no picture, and what only a restart mends is said."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import pytest

from app.engine import memory
from app.engine.batcher import Batcher
from app.engine.family import Family
from app.engine.faults import as_fault
from app.engine.memory import CAREFUL_PASSES, Budget
from app.engine.ticket import Ticket
from app.errors import DeviceLost, GenerationFailed, ModelLoadFailed, ModelNotReady, OutOfMemory, RuntimeFault
from app.generation import GenerateRequest, Pixels
from app.telemetry import Telemetry
from tests.fakes import (
    Clock,
    Cramped,
    DecodesTwice,
    FailsAt,
    FakeJob,
    Hangs,
    Instant,
    LosesTheDevice,
    StopsHalfway,
    Timed,
    Unprepared,
)
from tests.simulation import Simulation, places_taken

WAIT = 30.0
SMALL = 16 * 16
"""Pixels of a fake's picture."""


def colour(ticket: Ticket) -> int:
    return ticket.future.result(0).images[0].pixels.data[0]


def failure(ticket: Ticket) -> RuntimeFault:
    error = ticket.future.exception(0)
    assert isinstance(error, RuntimeFault)
    return error


# --- Memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["encode", "step", "decode"])
def test_a_full_device_splits_the_batch_and_everybody_gets_the_right_picture(stage: str) -> None:
    family = Cramped(**{stage: 3 * SMALL})
    family.interleaves = stage != "encode"  # only where weights move are several prompts read at once
    simulation = Simulation(family)
    tickets = [simulation.submit(seed=seed) for seed in range(8)]
    simulation.run()
    assert [colour(ticket) for ticket in tickets] == [(ord("p") + seed) % 256 for seed in range(8)]
    assert max(pixels for tried, pixels in family.tried if tried == stage) == 8 * SMALL
    name = {"encode": "text_encode", "step": "denoise_step"}.get(stage, stage)
    assert simulation.metric("sdxl_out_of_memory_total", stage=name, action="split") >= 1
    simulation.assert_empty()


def test_what_did_not_fit_is_not_tried_again_and_again() -> None:
    family = Cramped(step=3 * SMALL)
    simulation = Simulation(family)
    for seed in range(8):
        simulation.submit(seed=seed, num_inference_steps=20)
    simulation.run()
    failed = [pixels for tried, pixels in family.tried if tried == "step" and pixels > 3 * SMALL]
    assert failed == [8 * SMALL, 4 * SMALL]
    assert simulation.metric("sdxl_pass_budget_pixels") == 2 * SMALL


def test_after_a_while_a_little_more_is_tried_because_memory_may_be_free_again() -> None:
    budget = Budget(1000)
    budget.too_small(800)
    assert budget.now == 400
    for _ in range(CAREFUL_PASSES):
        assert budget.now == 400
        budget.fitted()
    assert budget.now == 500
    for _ in range(20 * CAREFUL_PASSES):
        budget.fitted()
    assert budget.now == 1000


def test_pictures_that_did_not_fit_together_are_not_decoded_so_again() -> None:
    family = Cramped(decode=3 * SMALL)
    simulation = Simulation(family)
    for _ in range(2):
        for seed in range(8):
            simulation.submit(seed=seed)
        simulation.run()
    failed = [pixels for tried, pixels in family.tried if tried == "decode" and pixels > 3 * SMALL]
    assert failed == [8 * SMALL, 4 * SMALL]


@pytest.mark.parametrize("stage", ["step", "decode"])
def test_memory_that_is_free_again_is_used_again(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CAREFUL_PASSES", 2)
    family = Cramped(**{stage: 3 * SMALL})
    simulation = Simulation(family)
    for _ in range(20):
        for seed in range(8):
            simulation.submit(seed=seed)
        simulation.run()
        family.room.clear()
    assert [pixels for tried, pixels in family.tried if tried == stage][-1] == 8 * SMALL


def test_a_picture_that_cannot_be_decoded_whole_is_decoded_in_tiles() -> None:
    family = Cramped(decode=SMALL)
    simulation = Simulation(family)
    large, small = simulation.submit(seed=1, width=32, height=32), simulation.submit(seed=2)
    simulation.run()
    assert colour(large) == ord("p") + 1 and colour(small) == ord("p") + 2
    assert family.tiled == [1]
    assert simulation.metric("sdxl_out_of_memory_total", stage="decode", action="tile") == 1


def test_a_server_starts_where_its_first_picture_fits_in_tiles_alone() -> None:
    family = Cramped(decode=SMALL / 2)
    simulation = Simulation(family)
    simulation.workers[0].load(warm_up=True)
    assert family.tiled == [0]
    ticket = simulation.submit()
    simulation.run()
    assert colour(ticket) == ord("p") + 1


@pytest.mark.parametrize("stage", ["begin", "step", "decode"])
def test_a_server_that_has_no_room_for_its_first_picture_says_so_and_what_to_do(stage: str) -> None:
    simulation = Simulation(Cramped(**{stage: SMALL / 8}))
    with pytest.raises(ModelLoadFailed, match=r"^The device has too little memory for a picture of 16 x 16, .*warm_up"):
        simulation.workers[0].load(warm_up=True)


@pytest.mark.parametrize("stage", ["encode", "begin", "step", "decode"])
def test_what_has_no_room_alone_is_refused_with_a_size_that_would_fit_and_its_neighbours_finish(stage: str) -> None:
    family = Cramped(**{stage: 64 * 64})
    simulation = Simulation(family, max_batch_size=2)
    simulation.submit(height=64, width=64)
    simulation.run()
    neighbours = [simulation.submit(seed=seed) for seed in range(3)]
    large = simulation.submit(height=512, width=512)
    simulation.run()
    assert isinstance(failure(large), OutOfMemory)
    assert "512 x 512" in str(failure(large)) and "64 x 64" in str(failure(large))
    assert [colour(ticket) for ticket in neighbours] == [ord("p") + seed for seed in range(3)]
    assert simulation.metric("sdxl_failed_total", reason="out_of_memory") == 1
    simulation.assert_empty()


def test_a_server_that_has_not_painted_yet_suggests_half_the_pixels() -> None:
    simulation = Simulation(Cramped(step=0))
    ticket = simulation.submit(height=512, width=1024)
    simulation.run()
    assert "try 320 x 704" in str(failure(ticket))


def test_a_size_that_is_suggested_fits_every_model() -> None:
    simulation = Simulation(Cramped(step=0))
    ticket = simulation.submit(height=64, width=1024)
    simulation.run()
    assert "try 32 x 704" in str(failure(ticket))  # FLUX takes no 40


def test_a_size_that_is_suggested_is_not_said_to_have_been_painted() -> None:
    simulation = Simulation(Cramped(step=64 * 64))
    simulation.submit(height=64, width=64)
    simulation.run()
    wide = simulation.submit(height=256, width=1024)
    simulation.run()
    assert str(failure(wide)).endswith("; try 32 x 128 (height x width): pictures as large have worked.")


def test_memory_that_is_short_once_costs_nothing_but_a_second_try() -> None:
    class ShortOnce(Instant):
        def step(self, jobs: Any) -> None:
            if not self.passes:
                self.passes.append([])
                raise OutOfMemory("The device has too little memory.")
            super().step(jobs)

    simulation = Simulation(ShortOnce())
    ticket = simulation.submit()
    simulation.run()
    assert colour(ticket) == ord("p") + 1
    assert simulation.metric("sdxl_out_of_memory_total", stage="denoise_step", action="again") == 1


def test_those_who_took_the_step_before_it_failed_do_not_take_it_twice() -> None:
    family = StopsHalfway()
    simulation = Simulation(family)
    tickets = [simulation.submit(seed=seed, num_inference_steps=1 + seed) for seed in range(4)]
    simulation.run()
    assert [colour(ticket) for ticket in tickets] == [ord("p") + seed for seed in range(4)]
    steps = [seed for seeds in family.passes for seed in seeds]
    assert [steps.count(seed) for seed in range(4)] == [1, 2, 3, 4]
    assert simulation.metric("sdxl_steps_total") == 10


def test_a_request_that_fails_is_one_line_in_the_log_with_its_id_and_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    simulation = Simulation(FailsAt("step"))
    failing = simulation.submit("fail", request_id="first", num_images_per_prompt=2)
    left = simulation.submit("leaves", request_id="second")
    left.leave()
    simulation.run()
    (line,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(failure(failing)) in line.getMessage()
    assert (line.request_id, line.fields) == ("first", {"reason": "generation_failed"})  # type: ignore[attr-defined]
    traces = [record for record in caplog.records if record.exc_info]
    assert traces and all(record.request_id == "first" for record in traces)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stage", ["encode", "begin", "step", "decode"])
def test_a_request_that_breaks_a_stage_fails_alone_and_its_neighbours_get_their_pictures(stage: str) -> None:
    simulation = Simulation(FailsAt(stage))
    tickets = [simulation.submit("fail" if seed == 2 else "p", seed=seed) for seed in range(5)]
    simulation.run()
    for seed, ticket in enumerate(tickets):
        if seed == 2:
            assert isinstance(failure(ticket), GenerationFailed) and "RuntimeError" in str(failure(ticket))
        else:
            assert colour(ticket) == ord("p") + seed
    simulation.assert_empty()


@pytest.mark.parametrize("stage", ["encode", "begin", "step", "decode"])
def test_nothing_of_a_failed_request_stays_in_memory(stage: str) -> None:
    jobs: list[weakref.ref[Any]] = []

    class Traced(FakeJob):
        __slots__ = ("__weakref__",)

    class Watched(Cramped):
        def begin(self, request: GenerateRequest, conditioning: int) -> FakeJob:
            job = super().begin(request, conditioning)
            traced = Traced(request=request, num_steps=job.num_steps, value=job.value)
            jobs.append(weakref.ref(traced))
            return traced

    simulation = Simulation(Watched(**{stage: 0}))
    gc.collect()
    gc.disable()
    try:
        ticket = simulation.submit()
        simulation.run()
        simulation.turn()
        assert isinstance(failure(ticket), OutOfMemory)
        # Without the collector: nothing hangs on a traceback or goes round in a circle.
        assert all(reference() is None for reference in jobs)
        assert failure(ticket).__traceback__ is None
    finally:
        gc.enable()


def test_pictures_decoded_twice_are_counted() -> None:
    simulation = Simulation(DecodesTwice())
    for seed in range(3):
        simulation.submit(seed=seed, num_inference_steps=2 + seed)
    simulation.run()
    assert simulation.metric("sdxl_decode_retries_total") == 3


def test_passes_that_nothing_was_compiled_for_are_counted() -> None:
    simulation = Simulation(Unprepared())
    simulation.submit(num_inference_steps=3)
    simulation.run()
    assert simulation.metric("sdxl_unexpected_shapes_total") == 3


# --- What exceptions mean --------------------------------------------------------------------------------------


class AcceleratorError(RuntimeError):
    """As torch names it; a module without torch knows it by its name."""


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), OutOfMemory),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLost),
        (AcceleratorError("an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), GenerationFailed),
        (AcceleratorError("CUDA error: invalid configuration argument"), GenerationFailed),
        (RuntimeError("shapes do not match"), GenerationFailed),
        (KeyError("x"), GenerationFailed),
    ],
)
def test_every_exception_is_one_of_ours(error: Exception, kind: type[RuntimeFault]) -> None:
    assert type(as_fault(error)) is kind


# --- A device that is gone -------------------------------------------------------------------------------------


class Running:
    """A started batcher."""

    def __init__(self, family: Family[Any], **options: Any) -> None:
        self.telemetry = Telemetry("fake")
        self.family = family
        self.lost: list[BaseException] = []
        settings: dict[str, Any] = {"max_queue": 64, "max_batch_size": 8, "encode_threads": 1, "embed_metadata": False}
        self.batcher = Batcher(
            lambda: family, self.telemetry, warm_up=False, on_lost=self.lost.append, **(settings | options)
        )
        self.batcher.start()
        self.batcher.ready.result(WAIT)

    def submit(self, **parameters: Any) -> Ticket:
        request = self.family.resolve(GenerateRequest(prompt="p", seed=1, **parameters))
        return self.batcher.submit([request], WAIT)


def test_a_lost_device_ends_everybody_and_says_that_only_a_restart_helps(caplog: pytest.LogCaptureFixture) -> None:
    running = Running(LosesTheDevice(), max_batch_size=1)
    tickets = []
    with caplog.at_level(logging.CRITICAL):
        for _ in range(3):
            try:
                tickets.append(running.submit())
            except ModelNotReady:
                break
        for ticket in tickets:
            assert isinstance(ticket.future.exception(WAIT), DeviceLost)
    for thread in running.batcher._threads:
        thread.join(WAIT)
    assert not running.batcher.alive
    assert [type(error) for error in running.lost] == [DeviceLost]
    with pytest.raises(ModelNotReady, match="restarted"):
        running.submit()
    assert "device-side assert" in caplog.text
    assert places_taken(running.batcher.queue) == 0
    running.batcher.close(0)


def test_a_step_that_hangs_is_seen_and_those_who_wait_are_told(caplog: pytest.LogCaptureFixture) -> None:
    family = Hangs()
    running = Running(family, step_timeout=0.01, max_batch_size=1)
    with caplog.at_level(logging.CRITICAL):
        first, second = running.submit(), running.submit()
        assert family.hanging.wait(WAIT)
        for ticket in (first, second):
            assert isinstance(ticket.future.exception(WAIT), DeviceLost)
    assert not running.batcher.alive
    assert "denoise_step has taken more than" in caplog.text and "self.go.wait" in caplog.text
    assert running.telemetry.registry.get_sample_value("sdxl_hung_steps_total", {"model_name": "fake"}) == 1
    assert running.telemetry.registry.get_sample_value("sdxl_model_ready", {"model_name": "fake"}) == 0
    assert running.lost == [], "whoever restarts a hanging server decides when"
    family.go.set()
    for thread in running.batcher._threads:
        thread.join(WAIT)
        assert not thread.is_alive(), "a step that comes back after all ends the thread"
    running.batcher.close(0)


def test_what_was_never_measured_may_take_ten_times_as_long_and_what_was_only_a_little_more() -> None:
    clock = Clock()

    class Watched(Timed):
        bounds: list[float] = []  # noqa: RUF012 (one test, one list)

        def step(self, jobs: Any) -> None:
            operation = simulation.workers[0]._attempts.operation
            assert operation is not None and operation.stage == "denoise_step"
            self.bounds.append(operation.bound)
            assert simulation.workers[0].hung(clock.now) is None
            assert simulation.workers[0].hung(clock.now + operation.bound + 1) is operation
            super().step(jobs)

    simulation = Simulation(Watched(clock), clock=clock, step_timeout=60.0)
    simulation.submit(num_inference_steps=2)
    simulation.run()
    assert Watched.bounds == [600.0, pytest.approx(60.0 + 10 * 1.1)]
    assert simulation.workers[0].hung(clock.now + 1e9) is None, "nothing is under way"


def test_an_input_image_may_be_encoded_for_longer_than_pictures_without_one_took_to_begin() -> None:
    clock = Clock()

    class Encodes(Timed):
        def begin(self, request: GenerateRequest, conditioning: Any) -> Any:
            clock.now += 0.01 if request.image is None else 70.0
            assert simulation.workers[0].hung(clock.now) is None
            return super().begin(request, conditioning)

    simulation = Simulation(Encodes(clock), clock=clock, step_timeout=60.0)
    simulation.submit()
    simulation.run()
    ticket = simulation.submit(image=Pixels(bytes(3 * 64 * 64), 64, 64), strength=0.5)
    simulation.run()
    assert ticket.future.result(0).images


def test_a_deadline_is_kept_while_a_step_takes_its_time() -> None:
    family = Hangs()
    running = Running(family)
    request = family.resolve(GenerateRequest(prompt="p", seed=1))
    tickets = [running.batcher.submit([request], 0.05) for _ in range(2)]
    assert family.hanging.wait(WAIT)
    for ticket in tickets:
        error = ticket.future.exception(WAIT)
        assert isinstance(error, RuntimeFault) and error.code == "deadline_exceeded"
    assert running.batcher.alive
    family.go.set()
    assert running.submit().future.result(WAIT).images
    running.batcher.close(1)


def test_a_family_that_ends_its_thread_ends_everybody() -> None:
    done = threading.Event()

    class Ends(Instant):
        def step(self, jobs: Any) -> None:
            done.wait(WAIT)
            raise SystemExit

    running = Running(Ends(), max_batch_size=1)
    tickets = [running.submit() for _ in range(4)]
    done.set()
    for ticket in tickets:
        assert isinstance(ticket.future.exception(WAIT), GenerationFailed)
    for thread in running.batcher._threads:
        thread.join(WAIT)
    assert not running.batcher.alive and places_taken(running.batcher.queue) == 0
    running.batcher.close(0)
