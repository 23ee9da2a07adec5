"""The step loop: who shares a forward pass, who gets a place, and that every accepted request ends exactly once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from app import heap
from app.engine import finishing
from app.engine.batcher import Batcher
from app.engine.family import Family
from app.engine.ticket import Ticket
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    GenerationFailed,
    ModelLoadFailed,
    ModelNotReady,
    OutOfMemory,
    Overloaded,
    ShuttingDown,
)
from app.generation import MAX_SEED, GenerateRequest, Preview, PreviewKind, PreviewWish
from app.telemetry import Telemetry
from tests.fakes import Dies, FailsAt, FakeJob, Gated, Instant, Previews, ReadsSlowly, RunsOutOfMemory, Slow
from tests.simulation import places_taken
from tests.waiting import until

WAIT = 30.0


class Harness:
    """A started batcher over one family."""

    def __init__(self, family: Family[Any], **options: Any) -> None:
        self.family: Any = family
        self.telemetry = Telemetry("fake")
        settings: dict[str, Any] = {
            "max_queue": 64,
            "max_batch_size": 8,
            "encode_threads": 2,
            "embed_metadata": True,
            "warm_up": False,
        }
        self.batcher = Batcher(lambda: family, self.telemetry, **(settings | options))
        self.batcher.start()
        self.batcher.ready.result(WAIT)

    def submit(self, prompt: str = "p", timeout: float = WAIT, **parameters: Any) -> Ticket:
        seed = parameters.pop("seed", 1)
        request = self.family.resolve(GenerateRequest(prompt=prompt, seed=seed, **parameters))
        return self.batcher.submit([request], timeout)

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, {"model_name": "fake", **labels}) or 0.0

    def assert_empty(self) -> None:
        """No place taken, nothing pending, nothing running."""
        eventually(lambda: self.metric("sdxl_running_images") == 0)
        assert self.metric("sdxl_pending_images") == 0
        assert places_taken(self.batcher.queue) == 0


eventually = functools.partial(until, seconds=WAIT)


@pytest.fixture
def harness() -> Iterator[Callable[..., Harness]]:
    started: list[Harness] = []

    def start(family: Family[Any], **options: Any) -> Harness:
        started.append(Harness(family, **options))
        return started[-1]

    yield start
    for each in started:
        if isinstance(each.family, Gated):
            each.family.permit(10_000)
        each.batcher.close(1.0)


def test_a_request_gets_its_pictures_with_seeds_counted_up(harness: Callable[..., Harness]) -> None:
    result = harness(Instant()).submit(seed=7, num_images_per_prompt=3).future.result(WAIT)
    assert [image.seed for image in result.images] == [7, 8, 9]
    assert all(image.encoded.startswith(b"\x89PNG") for image in result.images)
    assert {image.pixels.data[0] for image in result.images} == {(ord("p") + seed) % 256 for seed in (7, 8, 9)}


def test_after_the_largest_seed_comes_zero(harness: Callable[..., Harness]) -> None:
    result = harness(Instant()).submit(seed=MAX_SEED, num_images_per_prompt=2).future.result(WAIT)
    assert [image.seed for image in result.images] == [MAX_SEED, 0]


def test_pictures_of_several_prompts_come_in_the_order_of_the_prompts(harness: Callable[..., Harness]) -> None:
    each = harness(Instant(), max_batch_size=2)
    requests = [
        each.family.resolve(
            GenerateRequest(prompt=prompt, seed=seed, num_images_per_prompt=2, num_inference_steps=steps)
        )
        for prompt, seed, steps in (("a", 10, 9), ("b", 20, 1), ("c", 30, 5))
    ]
    result = each.batcher.submit(requests, WAIT).future.result(WAIT)
    assert [(image.request.prompt, image.seed) for image in result.images] == [
        ("a", 10), ("a", 11), ("b", 20), ("b", 21), ("c", 30), ("c", 31)
    ]  # fmt: skip


def test_requests_of_one_signature_share_forward_passes_whatever_their_steps(harness: Callable[..., Harness]) -> None:
    family = Gated()
    each = harness(family)
    first = each.submit(seed=1, num_inference_steps=5)
    assert family.waiting.wait(WAIT)
    others = [each.submit(seed=seed, num_inference_steps=seed) for seed in (2, 3)]
    family.permit(100)
    for ticket in (first, *others):
        ticket.future.result(WAIT)
    assert [sorted(seeds) for seeds in family.passes] == [[1], [1, 2, 3], [1, 2, 3], [1, 3], [1]]
    assert each.metric("sdxl_steps_total") == 10
    assert each.metric("sdxl_images_per_forward_pass_count") == 5


def test_requests_of_different_signatures_never_share_a_forward_pass(harness: Callable[..., Harness]) -> None:
    family = Gated()
    each = harness(family)
    tickets = [each.submit(seed=seed, width=size) for seed, size in ((1, 16), (2, 32), (3, 16), (4, 32))]
    family.permit(100)
    for ticket in tickets:
        ticket.future.result(WAIT)
    assert {frozenset(seeds) for seeds in family.passes} <= {frozenset(s) for s in ({1}, {1, 3}, {3}, {2, 4}, {2}, {4})}


def test_a_forward_pass_never_has_more_images_than_allowed(harness: Callable[..., Harness]) -> None:
    each = harness(Slow(), max_batch_size=3)
    tickets = [each.submit(seed=seed, num_images_per_prompt=2) for seed in range(5)]
    for ticket in tickets:
        ticket.future.result(WAIT)
    assert max(map(len, each.family.passes)) == 3


def test_a_full_queue_says_so_at_once_and_takes_more_once_there_is_room(harness: Callable[..., Harness]) -> None:
    family = Gated()
    each = harness(family, max_queue=3)
    tickets = [each.submit(seed=1), each.submit(seed=2, num_images_per_prompt=2)]
    with pytest.raises(Overloaded) as refused:
        each.submit(seed=3)
    assert refused.value.retry_after >= 1
    family.permit(100)
    for ticket in tickets:
        ticket.future.result(WAIT)
    each.submit(seed=3).future.result(WAIT)
    each.assert_empty()


def test_a_cancelled_request_gets_no_further_step_and_its_neighbour_does_not_notice(
    harness: Callable[..., Harness],
) -> None:
    family = Gated()
    each = harness(family)
    leaving, staying = each.submit(seed=1, num_inference_steps=50), each.submit(seed=2, num_inference_steps=3)
    assert family.waiting.wait(WAIT)
    leaving.cancel()
    family.permit(100)
    with pytest.raises(Cancelled):
        leaving.future.result(WAIT)
    assert staying.future.result(WAIT).images[0].seed == 2
    # The pass that was under way when it was cancelled is the last one with it.
    assert sum(1 in seeds for seeds in family.passes) <= 1
    assert each.metric("sdxl_cancelled_total") == 1
    each.assert_empty()


def test_a_request_cancelled_in_the_queue_never_starts(harness: Callable[..., Harness]) -> None:
    family = Gated()
    each = harness(family, max_batch_size=1)
    running = each.submit(seed=1, num_inference_steps=2)
    assert family.waiting.wait(WAIT)
    queued = each.submit(seed=2)
    queued.cancel()
    family.permit(100)
    running.future.result(WAIT)
    with pytest.raises(Cancelled):
        queued.future.result(WAIT)
    assert family.began == [1]
    each.assert_empty()


def test_of_a_request_cancelled_while_its_prompts_are_read_no_other_prompt_is(
    harness: Callable[..., Harness],
) -> None:
    family = ReadsSlowly()
    each = harness(family)
    requests = [family.resolve(GenerateRequest(prompt=prompt, seed=1)) for prompt in ("a", "b", "c")]
    ticket = each.batcher.submit(requests, WAIT)
    assert family.reading.wait(WAIT)
    ticket.cancel()
    family.read_on.set()
    assert each.submit("d").future.result(WAIT).images
    with pytest.raises(Cancelled):
        ticket.future.result(WAIT)
    assert family.prompts == ["a", "d"]
    each.assert_empty()


def test_cancelling_twice_or_after_the_end_changes_nothing(harness: Callable[..., Harness]) -> None:
    each = harness(Instant())
    ticket = each.submit()
    result = ticket.future.result(WAIT)
    ticket.cancel()
    ticket.cancel()
    assert ticket.future.result(WAIT) is result
    assert each.metric("sdxl_cancelled_total") == 0
    each.submit().future.result(WAIT)


def test_a_deadline_ends_a_running_request(harness: Callable[..., Harness]) -> None:
    each = harness(Slow())
    ticket = each.submit(timeout=0.1, num_inference_steps=150)
    with pytest.raises(DeadlineExceeded):
        ticket.future.result(WAIT)
    assert len(each.family.passes) < 100
    assert each.metric("sdxl_failed_total", reason="deadline_exceeded") == 1
    each.assert_empty()


def test_a_deadline_that_passes_in_the_queue_costs_no_step(harness: Callable[..., Harness]) -> None:
    family = Gated()
    each = harness(family, max_batch_size=1)
    running = each.submit(seed=1, num_inference_steps=2)
    queued = each.submit(seed=2, timeout=0.01)
    assert family.waiting.wait(WAIT)
    time.sleep(0.05)
    family.permit(100)
    with pytest.raises(DeadlineExceeded):
        queued.future.result(WAIT)
    running.future.result(WAIT)
    assert family.began == [1]


@pytest.mark.parametrize("stage", ["encode", "begin", "step", "decode"])
def test_a_failure_in_any_stage_ends_that_request_and_the_next_one_works(
    harness: Callable[..., Harness], stage: str
) -> None:
    each = harness(FailsAt(stage))
    with pytest.raises(GenerationFailed, match="RuntimeError"):
        each.submit("fail", num_images_per_prompt=3).future.result(WAIT)
    assert len(each.submit("good").future.result(WAIT).images) == 1
    assert each.metric("sdxl_failed_total", reason="generation_failed") == 1
    each.assert_empty()


def test_out_of_memory_ends_the_request_that_is_too_large_and_the_next_one_works(
    harness: Callable[..., Harness],
) -> None:
    each = harness(RunsOutOfMemory())
    with pytest.raises(OutOfMemory):
        each.submit(width=128).future.result(WAIT)
    each.submit(width=16).future.result(WAIT)
    each.assert_empty()


def test_a_failure_to_encode_the_picture_ends_the_request(
    harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> bytes:
        raise OSError("No space left on device")

    each = harness(Instant())
    with monkeypatch.context() as patch:
        patch.setattr("app.engine.finishing.encode_image", full_disk)
        with pytest.raises(GenerationFailed, match="OSError"):
            each.submit(num_images_per_prompt=2).future.result(WAIT)
    each.submit().future.result(WAIT)
    each.assert_empty()


def test_a_dead_device_thread_fails_what_was_accepted_and_refuses_the_rest(harness: Callable[..., Harness]) -> None:
    each = harness(Dies())
    ticket = each.submit()
    with pytest.raises(GenerationFailed, match="ended"):
        ticket.future.result(WAIT)
    eventually(lambda: not each.batcher.alive)
    with pytest.raises(ModelNotReady):
        each.submit()


def test_every_step_is_reported_until_all_are_done(harness: Callable[..., Harness]) -> None:
    each = harness(Instant())
    heard: list[Any] = []
    request = each.family.resolve(GenerateRequest(prompt="p", seed=1, num_images_per_prompt=2, num_inference_steps=3))
    each.batcher.submit([request], WAIT, heard.append).future.result(WAIT)
    assert [(each.steps_done, each.steps_total, each.place) for each in heard] == [
        (0, 6, 1), (2, 6, 0), (4, 6, 0), (6, 6, 0)
    ]  # fmt: skip


def test_closing_finishes_what_was_accepted_and_takes_no_more(harness: Callable[..., Harness]) -> None:
    each = harness(Slow())
    ticket = each.submit(num_inference_steps=20)
    closer = threading.Thread(target=each.batcher.close, args=(WAIT,))
    closer.start()
    eventually(lambda: each.batcher.queue.closing)
    with pytest.raises(ShuttingDown):
        each.submit()
    assert len(ticket.future.result(WAIT).images) == 1
    closer.join(WAIT)
    assert not each.batcher.alive


def test_closing_waits_for_every_picture_that_is_painted_and_not_encoded_yet(
    harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = {1: threading.Event(), 2: threading.Event()}

    def encode(_: object, __: object, seed: int, ___: object) -> bytes:
        assert may_end[seed].wait(WAIT)
        return b"file"

    monkeypatch.setattr("app.engine.finishing.encode_image", encode)
    each = harness(Instant())
    first, second = each.submit(seed=1), each.submit(seed=2)
    eventually(lambda: first.waiting is second.waiting is False and not each.batcher.workers[0].running)
    closer = threading.Thread(target=each.batcher.close, args=(WAIT,))
    closer.start()
    eventually(lambda: each.batcher.queue.closing)
    may_end[1].set()
    assert first.future.result(WAIT).images
    assert not concurrent.futures.wait([second.future], 0.1).done
    may_end[2].set()
    assert second.future.result(WAIT).images
    closer.join(WAIT)


@pytest.mark.parametrize("grace", [0.05, 3600.0], ids=["in time", "before somebody is in a hurry"])
def test_closing_ends_what_does_not_finish(grace: float, harness: Callable[..., Harness]) -> None:
    each = harness(Slow())
    ticket = each.submit(num_inference_steps=100_000)
    closer = threading.Thread(target=each.batcher.close, args=(grace,))
    closer.start()
    if grace > 1:
        each.batcher.hurry()
    with pytest.raises(ShuttingDown, match="shut down before the request was done"):
        ticket.future.result(WAIT)
    closer.join(WAIT)
    eventually(lambda: not each.batcher.alive)


def test_previews_that_come_faster_than_they_are_encoded_are_left_out_and_counted_so(
    harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing, "PREVIEWS_AT_ONCE", 0)
    family = Previews()
    each = harness(family)
    request = family.resolve(GenerateRequest(prompt="p", seed=1, num_inference_steps=4))
    wish = PreviewWish(PreviewKind.LATENTS, 1)
    heard: list[object] = []
    each.batcher.submit([request], WAIT, heard.append, preview=wish).future.result(WAIT)
    assert not any(isinstance(news, Preview) for news in heard)
    counts = [each.metric("sdxl_previews_total", outcome=outcome) for outcome in ("shown", "left_out")]
    assert counts == [0, 3]


def test_previews_are_shown_however_many_there_were_before(harness: Callable[..., Harness]) -> None:
    each = harness(Previews())
    for seed in range(2 * finishing.PREVIEWS_AT_ONCE):
        request = each.family.resolve(GenerateRequest(prompt="p", seed=seed, num_inference_steps=2))
        wish = PreviewWish(PreviewKind.LATENTS, 1)
        each.batcher.submit([request], WAIT, lambda _: None, preview=wish).future.result(WAIT)
    assert each.metric("sdxl_previews_total", outcome="shown") == 2 * finishing.PREVIEWS_AT_ONCE


def test_a_preview_that_is_made_while_the_server_ends_is_nobodys_and_does_no_harm(
    harness: Callable[..., Harness], caplog: pytest.LogCaptureFixture
) -> None:
    class LooksLong(Previews):
        looking, look_away = threading.Event(), threading.Event()
        closed = False

        def preview(self, job: FakeJob, whole: bool = False) -> np.ndarray | None:
            self.looking.set()
            assert self.look_away.wait(WAIT)
            return super().preview(job, whole)

        def close(self) -> None:
            self.closed = True

    family = LooksLong()
    each = harness(family)
    request = family.resolve(GenerateRequest(prompt="p", seed=1))
    each.batcher.submit([request], WAIT, lambda _: None, preview=PreviewWish(PreviewKind.LATENTS, 1))
    assert family.looking.wait(WAIT)
    each.batcher.close(0)
    family.look_away.set()
    eventually(lambda: not each.batcher.alive)
    assert family.closed and "the device thread ended" not in caplog.text


def test_memory_that_nobody_uses_is_given_back_once_in_a_while(
    harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(heap, "trim", trimmed.set)
    harness(Instant(), clock=itertools.count(0.0, heap.TRIM_EVERY).__next__)
    assert trimmed.wait(WAIT)


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    def load() -> Family[Any]:
        raise ModelLoadFailed("no such folder")

    batcher = Batcher(
        load, Telemetry("m"), max_queue=1, max_batch_size=1, encode_threads=1, embed_metadata=False, warm_up=True
    )
    batcher.start()
    with pytest.raises(ModelLoadFailed, match="no such folder"):
        batcher.ready.result(WAIT)


def test_four_hundred_requests_with_cancels_all_end_exactly_once(harness: Callable[..., Harness]) -> None:
    each = harness(Instant(), max_queue=1000, max_batch_size=5)
    tickets = [
        each.submit(seed=seed, num_inference_steps=1 + seed % 7, width=(16, 32)[seed % 2]) for seed in range(400)
    ]
    for ticket in tickets[::3]:
        ticket.cancel()
    _, pending = concurrent.futures.wait([ticket.future for ticket in tickets], WAIT)
    assert not pending
    for seed, ticket in enumerate(tickets):
        error = ticket.future.exception()
        assert error is None or (isinstance(error, Cancelled) and seed % 3 == 0)
        if error is None:
            assert ticket.future.result().images[0].pixels.data[0] == (ord("p") + seed) % 256
    finished = each.metric("sdxl_images_total")
    assert finished + each.metric("sdxl_cancelled_total") == 400
    each.assert_empty()


@pytest.mark.parametrize("end", ["done", "cancelled", "refused"])
def test_pictures_are_let_go_of_with_the_last_who_holds_them(harness: Callable[..., Harness], end: str) -> None:
    """And not once Python looks for cycles, which it does by the number of objects, however large they are."""
    each = harness(Slow(), max_queue=3)

    def tickets() -> int:
        return sum(type(thing) is Ticket for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        of_other_tests = tickets()
        ticket = each.submit(num_images_per_prompt=3)
        if end == "refused":
            with contextlib.suppress(Overloaded):
                each.submit()
        if end != "done":
            ticket.cancel()
        concurrent.futures.wait([ticket.future], WAIT)
        del ticket
        until(lambda: tickets() <= of_other_tests, "the ticket stayed", WAIT)
    finally:
        gc.enable()
