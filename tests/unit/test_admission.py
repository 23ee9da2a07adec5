"""Who is let in: places, seconds and deadlines, all estimated from what was measured."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from app.engine import admission
from app.engine.admission import FIRST_CAUTION, MOST_CAUTION, Caution
from app.engine.costs import MAX_SIZES, Costs, Line
from app.engine.idempotency import MAX_KEYS, Answers, Once
from app.engine.queue import KEPT_OUTCOMES, RequestState
from app.engine.ticket import Image, Ticket
from app.errors import Cancelled, DeadlineExceeded, KeyReused, OutOfMemory, Overloaded, RequestNotFound
from app.generation import GenerateRequest, Pixels, Preview, PreviewKind, PreviewWish, Progress
from tests.fakes import Clock, FakeJob, Instant, Previews, RunsAhead, Timed, WholeJobs
from tests.simulation import Simulation, places_taken


def measured(**options: Any) -> tuple[Simulation, Timed]:
    clock = Clock()
    family = Timed(clock)
    simulation = Simulation(family, clock=clock, **options)
    for count in (2, 1):
        for _ in range(count):
            simulation.submit()
        simulation.run()
    return simulation, family


# --- Costs -----------------------------------------------------------------------------------------------------


def test_a_line_is_found_in_passes_of_several_loads() -> None:
    line = Line()
    for load in (1, 2, 4, 8, 4, 2, 1, 8):
        line.observe(load, 3.0 + 0.5 * load)
    assert line.slope == pytest.approx(0.5) and line.fixed == pytest.approx(3.0)
    assert line(16) == pytest.approx(11.0)


def test_passes_of_one_load_promise_no_gain_from_sharing() -> None:
    line = Line()
    for _ in range(5):
        line.observe(2, 1.0)
    assert line(4) == pytest.approx(2.0) and line.fixed == 0


@pytest.mark.parametrize(("devices", "seconds"), [(1, [6.0, 12.0]), (2, [4.0, 10.0])])
def test_the_forecast_is_the_one_of_its_docstring(devices: int, seconds: list[float]) -> None:
    queue = Simulation(Instant()).queue
    request = GenerateRequest(prompt="", height=8, width=8, guidance_scale=1.0)
    costs = Costs(most_rows=32, most_load=1e9)
    for rows, took in ((1, 1.0), (2, 1.5)):
        images = [Image(Ticket([request], [1], 0.0, 0.0, queue), request, 0, 1) for _ in range(rows)]
        costs.stepped(images, took)
    tickets = [Ticket([request], [steps], 0.0, 0.0, queue) for steps in (4, 10)]
    forecast = admission.schedule(tickets, costs, devices)
    assert [forecast[ticket] for ticket in tickets] == pytest.approx(seconds)


@pytest.mark.parametrize("kind", [Timed, RunsAhead])
def test_the_first_picture_tells_what_the_next_ones_will_take(kind: type[Timed]) -> None:
    clock = Clock()
    simulation = Simulation(kind(clock), clock=clock)
    simulation.workers[0].load(warm_up=True)
    started = clock.now
    simulation.submit(num_inference_steps=10, guidance_scale=5.0)
    expected = simulation.queue.seconds()
    simulation.run()
    assert clock.now - started == pytest.approx(expected) == pytest.approx(10 * 1.2 + 0.5)


def test_the_first_picture_counts_the_rows_that_it_has_and_not_those_that_guidance_suggests() -> None:
    class Distilled(Timed):
        """Takes the guidance scale as an input."""

        def rows(self, job: FakeJob) -> int:
            del job
            return 1

    clock = Clock()
    simulation = Simulation(Distilled(clock), clock=clock)
    simulation.workers[0].load(warm_up=True)
    assert simulation.costs.step(16 * 16, 1) == pytest.approx(1.1)


def test_passes_that_do_not_fit_are_not_promised_again() -> None:
    class Cramped(Timed):
        """Has memory for two at a time."""

        def step(self, jobs: Sequence[FakeJob]) -> None:
            if len(jobs) > 2:
                raise OutOfMemory("The device has too little memory for this request.")
            super().step(jobs)

    clock = Clock()
    simulation = Simulation(Cramped(clock), clock=clock)
    for count in (1, 2, 4, 4):
        started = clock.now
        for _ in range(count):
            simulation.submit()
        expected = simulation.queue.seconds()
        simulation.run()
    assert clock.now - started == pytest.approx(expected)


@pytest.mark.parametrize(("longer", "pictures"), [(6.0, 2), (10.0, 1)])
def test_first_times_are_not_taken_for_what_pictures_take_unless_nobody_would_wait_for_another(
    longer: float, pictures: int
) -> None:
    class Compiles(Timed):
        """Its first step takes longer."""

        def step(self, jobs: Sequence[FakeJob]) -> None:
            self.clock.now += 0 if self.passes else longer
            super().step(jobs)

    clock = Clock()
    family = Compiles(clock)
    simulation = Simulation(family, clock=clock)
    simulation.workers[0].load(warm_up=True)
    assert len(family.began) == pictures
    if pictures == 2:
        assert simulation.costs.step(16 * 16, 2) == pytest.approx(1.2)


def test_a_line_forgets_what_was_long_ago() -> None:
    line = Line()
    for _ in range(100):
        line.observe(1, 10.0)
    for _ in range(200):
        line.observe(1, 1.0)
    assert line(1) == pytest.approx(1.0, abs=0.01)


def test_costs_of_sizes_nobody_asks_for_any_more_are_forgotten() -> None:
    costs = Costs(8, 1e9)
    simulation, _ = measured()
    for side in range(8, 8 * (MAX_SIZES + 20), 8):
        for width in (8, side):
            request = GenerateRequest(prompt="", height=8, width=width, num_inference_steps=1, seed=0)
            costs.stepped([Image(Ticket([request], [1], 0, 1, simulation.queue), request, 0, 1)], 1.0)
    assert len(costs._steps) == MAX_SIZES
    assert costs._steps[8 * 8].samples == MAX_SIZES + 20 and 8 * 16 not in costs._steps


def test_several_devices_may_measure_at_once_while_others_ask() -> None:
    """None of what they saw is lost, and nobody who asks stumbles over a size that is being forgotten."""
    costs = Costs(8, 1e9)
    simulation, _ = measured()
    requests = [GenerateRequest(prompt="", height=8, width=8 * each, num_inference_steps=1, seed=0) for each in (1, 2)]
    images = [Image(Ticket([each], [1], 0, 1, simulation.queue), each, 0, 1) for each in requests]
    rounds, errors = 3000, []

    def measure() -> None:
        for _ in range(rounds):
            for image in images:
                costs.stepped([image], 1.0)

    def ask() -> None:
        try:
            for _ in range(rounds):
                for image in images:
                    costs.step(image.size, 1)
        except Exception as error:  # whatever it is, it is one too many
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=target) for target in (measure, measure, ask, ask)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert [costs._steps[image.size].samples for image in images] == [2 * rounds, 2 * rounds]


def test_what_images_take_together_is_known_after_a_few_passes() -> None:
    simulation, _ = measured(max_batch_size=4)
    for steps, count in ((10, 1), (10, 4), (10, 8), (3, 2)):
        tickets = [simulation.submit(num_inference_steps=steps, seed=seed) for seed in range(count)]
        started, estimate = simulation.clock.now, simulation.queue.seconds()
        simulation.run()
        assert simulation.clock.now - started == pytest.approx(estimate, rel=0.1)
        assert all(ticket.over for ticket in tickets)


def test_what_comes_before_the_first_step_is_known_too() -> None:
    """As an image to start from, which is encoded there."""

    class BeginsSlowly(Timed):
        def encode(self, request: GenerateRequest) -> int:
            self.clock.now += 3.0
            return super().encode(request)

        def begin(self, *given: Any) -> FakeJob:
            self.clock.now += 2.0
            return super().begin(*given)

    clock = Clock()
    simulation = Simulation(BeginsSlowly(clock), clock=clock)
    for _ in range(2):
        simulation.submit(num_inference_steps=10)
        started, estimate = clock.now, simulation.queue.seconds()
        simulation.run()
    assert clock.now - started == pytest.approx(estimate) == pytest.approx(3.0 + 2.0 + 10 * 1.1 + 0.5)


# --- Places and seconds ----------------------------------------------------------------------------------------


def test_the_wait_that_a_full_queue_names_is_the_time_until_there_is_a_place() -> None:
    simulation, _ = measured(max_queue=3)
    for seed in range(3):
        simulation.submit(seed=seed, num_inference_steps=10 * (seed + 1))
    with pytest.raises(Overloaded, match="3 of 3 images") as refused:
        simulation.submit()
    started = simulation.clock.now
    while places_taken(simulation.queue) == 3:
        simulation.turn()
    assert simulation.clock.now - started == pytest.approx(refused.value.retry_after, rel=0.3)
    simulation.submit()


def test_a_full_queue_foresees_once_for_all_whom_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, _ = measured(max_queue=3)
    for seed in range(3):
        simulation.submit(seed=seed)
    schedule, foreseen = admission.schedule, []

    def counting(tickets: Iterable[Ticket], *given: Any) -> dict[Ticket, float]:
        listed = list(tickets)
        foreseen.append(len(listed))
        return schedule(listed, *given)

    monkeypatch.setattr(admission, "schedule", counting)
    for _ in range(50):
        with pytest.raises(Overloaded, match="3 of 3 images"):
            simulation.submit()
    assert foreseen.count(3) == 1


def test_a_queue_may_be_full_of_seconds_before_it_is_full_of_images() -> None:
    simulation, _ = measured(max_queue_seconds=30.0)
    simulation.submit(num_inference_steps=20)
    with pytest.raises(Overloaded, match="seconds of work") as refused:
        simulation.submit(num_inference_steps=40)
    assert 10 < refused.value.retry_after < 30
    simulation.submit(num_inference_steps=2)
    simulation.run()


def test_an_empty_queue_takes_anything_for_an_odd_measurement_must_not_last() -> None:
    simulation, _ = measured(max_queue_seconds=1.0)
    late = simulation.submit(num_inference_steps=100, timeout=5.0)
    simulation.run()
    assert isinstance(late.future.exception(0), DeadlineExceeded)


def test_what_cannot_meet_its_deadline_alone_is_refused_at_once_and_costs_no_step() -> None:
    simulation, _ = measured()
    simulation.submit(num_inference_steps=5)
    with pytest.raises(DeadlineExceeded, match="fewer steps"):
        simulation.submit(num_inference_steps=50, timeout=10.0)
    assert places_taken(simulation.queue) == 1
    simulation.run()


def test_a_deadline_that_is_over_at_once_is_said_in_words_that_are_true() -> None:
    simulation, _ = measured()
    ticket = simulation.submit(timeout=1e-6)
    simulation.clock.now += 0.001
    simulation.run()
    error = ticket.future.exception(0)
    assert str(error) == "The request was not done after less than 0.1 seconds and was given up."


def test_nobody_is_told_to_come_back_later_than_in_ten_minutes() -> None:
    simulation, _ = measured(max_queue=2)
    simulation.submit(num_inference_steps=10_000, num_images_per_prompt=2)
    with pytest.raises(Overloaded, match="in 600 seconds") as refused:
        simulation.submit()
    assert refused.value.retry_after == 600


def test_what_cannot_meet_its_deadline_in_the_queue_is_asked_to_come_back() -> None:
    simulation, _ = measured(max_batch_size=1)
    for seed in range(5):
        simulation.submit(seed=seed, num_inference_steps=10, priority=1)
    with pytest.raises(Overloaded, match="its deadline") as refused:
        simulation.submit(num_inference_steps=10, timeout=20.0, priority=9)
    assert 30 < refused.value.retry_after < 80


def test_nobody_is_let_in_who_would_make_another_one_late() -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.submit(num_inference_steps=10)
    promised = simulation.submit(num_inference_steps=10, timeout=36.0)
    with pytest.raises(Overloaded, match="another one"):
        simulation.submit(num_inference_steps=20, timeout=60.0, priority=1)
    simulation.run()
    assert promised.future.exception(0) is None


@pytest.mark.parametrize(
    ("steps", "stalled", "priority"),
    [(10, 17.0, 9), (100, 0.0, 1)],
    ids=["who comes after it", "where it will be late in any case"],
)
def test_nobody_is_refused_for_one_whom_it_does_not_make_late(steps: int, stalled: float, priority: int) -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.submit(num_inference_steps=steps, timeout=36.0)
    simulation.clock.now += stalled
    assert simulation.submit(num_inference_steps=5, priority=priority) in simulation.queue.tickets


@pytest.mark.parametrize("most", [14.0, 16.0])
def test_half_of_the_doubt_counts_where_another_one_has_a_deadline(most: float) -> None:
    queue, request = Simulation(Instant()).queue, GenerateRequest(prompt="")
    other, new = (Ticket([request], [1], 0.0, deadline, queue) for deadline in (most, 1000.0))
    refused = pytest.raises(Overloaded, match="another one") if most < 15.0 else contextlib.nullcontext()
    with refused:
        admission.check_seconds(new, {other: 5.0}, {other: 10.0, new: 12.0}, 1e9, now=0.0, alone=2.0, caution=2.0)


def test_what_shares_no_pass_for_its_pixels_is_foreseen_one_after_the_other() -> None:
    simulation, _ = measured(max_batch_pixels=16 * 16)
    first, second = (simulation.submit(seed=seed, num_inference_steps=10) for seed in range(2))
    assert second.foreseen == pytest.approx(2 * first.foreseen, rel=0.05)


def overload(simulation: Simulation, family: Timed, seed: int, slowdown: float) -> tuple[int, int]:
    """Three times too many requests with deadlines, on a device that is slower for 40 of every 240 seconds.

    Returns:
        How many were accepted, and how many of these were late.
    """
    rng = random.Random(seed)
    accepted: list[Ticket] = []
    refused = 0
    started = arrival = simulation.clock.now
    fixed, per_row, decoding = family.fixed, family.per_row, family.decoding
    for number in range(400):
        # With four to a pass an image takes 3.5 seconds of the device: nearly one a second is three times that.
        arrival += rng.expovariate(0.86)
        while simulation.clock.now < arrival and simulation.queue.tickets:
            pace = slowdown if (simulation.clock.now - started) % 240 > 200 else 1.0
            family.fixed, family.per_row, family.decoding = fixed * pace, per_row * pace, decoding * pace
            simulation.turn()
        simulation.clock.now = max(simulation.clock.now, arrival)
        steps, width, timeout = rng.randint(4, 16), rng.choice((16, 32)), rng.choice((60.0, 120.0))
        try:
            accepted.append(simulation.submit(num_inference_steps=steps, width=width, timeout=timeout, seed=number))
        except Overloaded as error:
            refused += 1
            assert 1 <= error.retry_after <= 600
    simulation.run()
    late = [ticket for ticket in accepted if ticket.future.exception(0) is not None]
    assert refused > 200 and len(accepted) > 100
    simulation.assert_empty()
    return len(accepted), len(late)


@pytest.mark.parametrize("slowdown", [1.0, 1.3, 1.6])
@pytest.mark.parametrize("seed", range(5))
def test_at_three_times_the_capacity_whoever_is_accepted_meets_its_deadline(seed: int, slowdown: float) -> None:
    simulation, family = measured(max_batch_size=4, max_queue=64)
    accepted, late = overload(simulation, family, seed, slowdown)
    # The rest is an estimate: who comes later, and how passes fill up, is not known when a promise is given.
    assert late <= accepted / 100


def promises(simulation: Simulation, seconds: float) -> bool:
    """Whether a request that takes 46 seconds behind others is let in, where it may take so many."""
    others = [simulation.submit(seed=seed, num_inference_steps=10, priority=1) for seed in range(3)]
    try:
        simulation.submit(num_inference_steps=10, timeout=seconds)
    except Overloaded:
        return False
    else:
        return True
    finally:
        assert not any(ticket.over for ticket in others)
        simulation.run()


def test_promises_are_kept_more_carefully_where_they_were_broken_until_that_is_long_ago() -> None:
    simulation, family = measured(max_batch_size=1)
    assert promises(simulation, 125.0) and not promises(simulation, 100.0)
    simulation.clock.now += 4 * 3600
    assert promises(simulation, 75.0)
    family.fixed, family.decoding = 4 * family.fixed, 4 * family.decoding
    promises(simulation, 1e6)
    family.fixed, family.decoding = family.fixed / 4, family.decoding / 4
    for _ in range(3):
        promises(simulation, 1e6)
    assert not promises(simulation, 125.0) and promises(simulation, 190.0)
    simulation.clock.now += 4 * 3600
    assert promises(simulation, 75.0)


def test_one_long_stall_or_one_odd_moment_is_no_reason_to_refuse_nearly_all() -> None:
    caution = Caution(0.0)
    caution.learn(0.1, 10.0, 0.0)
    assert caution.now(0.0) == FIRST_CAUTION
    caution.learn(10.0, 1000.0, 0.0)
    assert caution.now(0.0) == MOST_CAUTION


def test_a_deadline_that_was_missed_is_a_reason_for_care() -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.clock.now += 4 * 3600
    assert promises(simulation, 75.0)
    late = simulation.submit(num_inference_steps=10, timeout=20.0)
    simulation.clock.now += 25.0
    simulation.run()
    assert isinstance(late.future.exception(0), DeadlineExceeded)
    assert not promises(simulation, 75.0)


def test_what_comes_between_is_foreseen_and_no_reason_for_care() -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.clock.now += 4 * 3600
    patient = simulation.submit(num_inference_steps=10, priority=9)
    for seed in range(20):
        simulation.submit(seed=seed, num_inference_steps=10, priority=1)
        simulation.turn(11)
    simulation.run()
    assert simulation.clock.now - patient.accepted > 200
    assert promises(simulation, 75.0)


# --- What is told ----------------------------------------------------------------------------------------------


def test_listeners_hear_of_their_place_as_it_changes_and_of_every_step() -> None:
    simulation, _ = measured(max_batch_size=1)
    for seed in range(2):
        simulation.submit(seed=seed, num_inference_steps=3)
    heard: list[Progress | Preview] = []
    simulation.submit(num_inference_steps=3, seed=9, listener=heard.append)
    simulation.turn()
    simulation.submit(num_inference_steps=3, seed=10)
    simulation.run()
    news = [each for each in heard if isinstance(each, Progress)]
    places = [each.place for each in news]
    assert [place for place in places if place] == [3, 2, 1]
    assert [each.steps_done for each in news if not each.place] == [1, 2, 3]
    seconds = [each.seconds for each in news]
    assert all(each is not None for each in seconds)
    assert seconds[0] == pytest.approx(3 * 3 * 1.1 + 3 * 0.5, rel=0.2)
    assert seconds == sorted(seconds, reverse=True)  # type: ignore[type-var]


def test_the_wait_in_the_queue_is_until_the_first_of_several_images_begins() -> None:
    simulation, _ = measured(max_batch_size=1)
    ticket = simulation.submit(num_images_per_prompt=2)
    simulation.run()
    assert ticket.future.result(0).timings.queue == 0


def test_a_request_can_be_asked_about_from_its_place_to_its_end() -> None:
    simulation, _ = measured(max_batch_size=1, max_queue=3)
    simulation.submit(num_inference_steps=2, request_id="first")
    simulation.submit(num_inference_steps=2, request_id="second", num_images_per_prompt=2)
    simulation.turn()
    first, second = simulation.queue.status("first"), simulation.queue.status("second")
    assert (first.state, first.steps_done, first.steps_total) == (RequestState.RUNNING, 1, 2)
    assert (second.state, second.place, second.steps_total) == (RequestState.QUEUED, 1, 4)
    assert second.seconds is not None and first.seconds is not None and second.seconds > first.seconds > 0
    simulation.run()
    assert simulation.queue.status("second").state is RequestState.DONE
    assert simulation.queue.status("second").steps_done == 4
    with pytest.raises(RequestNotFound):
        simulation.queue.status("third")


def test_a_request_runs_once_one_of_its_images_has_begun() -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.submit(request_id="two", num_inference_steps=3, num_images_per_prompt=2)
    simulation.turn()
    status = simulation.queue.status("two")
    assert (status.state, status.place, status.steps_done) == (RequestState.RUNNING, 0, 1)


def test_what_is_left_of_a_request_is_told_by_its_own_pace_from_its_second_step_on() -> None:
    clock = Clock()
    simulation = Simulation(Timed(clock), clock=clock)
    simulation.submit(request_id="first of all", num_inference_steps=10)
    simulation.turn(2)
    assert simulation.queue.status("first of all").seconds == pytest.approx(8 * 1.1)


def test_a_listener_that_fails_hears_no_more_and_the_others_hear_all(caplog: pytest.LogCaptureFixture) -> None:
    simulation, _ = measured()
    heard: list[Progress | Preview] = []

    def fails(_: Progress | Preview) -> None:
        raise ZeroDivisionError

    ticket = simulation.submit(num_inference_steps=3)
    ticket.listeners.extend([fails, heard.append])
    simulation.run()
    assert [news.steps_done for news in heard if isinstance(news, Progress)] == [1, 2, 3]
    assert caplog.text.count("a listener failed") == 1
    assert ticket.future.result(0).images


def test_a_listener_that_fails_at_once_costs_neither_the_request_nor_its_place() -> None:
    simulation, _ = measured()

    def fails(_: Progress | Preview) -> None:
        raise ZeroDivisionError

    ticket = simulation.submit(listener=fails)
    assert ticket.listeners == []
    simulation.run()
    assert ticket.future.result(0).images


def test_a_listener_that_fails_as_its_request_ends_is_not_the_devices_fault() -> None:
    simulation, _ = measured()

    def fails(news: Progress | Preview) -> None:
        if isinstance(news, Progress) and news.steps_done:
            ticket.cancel()
            raise ZeroDivisionError

    ticket = simulation.submit(listener=fails)
    simulation.run()
    assert isinstance(ticket.future.exception(0), Cancelled)
    simulation.assert_empty()


@pytest.mark.parametrize("moment", ["before the steps are noted", "before a listener hears of them"])
def test_what_two_devices_tell_of_one_request_never_goes_back(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    simulation = Simulation(Timed(clock), Timed(clock), clock=clock)
    heard: list[Progress] = []
    times: list[float] = []
    meanwhile: list[threading.Thread] = []

    def other_device() -> None:
        """Let the second device take its turn while the first one is at this point of its own."""
        if not meanwhile and heard:
            meanwhile.append(threading.Thread(target=simulation.workers[1].turn))
            meanwhile[0].start()
            meanwhile[0].join(0.2)

    def listen(news: Progress | Preview) -> None:
        if moment == "before a listener hears of them":
            other_device()
        if isinstance(news, Progress) and not news.place:
            heard.append(news)

    def stepped(ticket: Ticket, steps: int, now: float) -> None:
        if moment == "before the steps are noted":
            other_device()
        times.append(now)
        note(ticket, steps, now)

    note = Ticket.stepped
    monkeypatch.setattr(Ticket, "stepped", stepped)
    simulation.submit(num_images_per_prompt=2, num_inference_steps=10, listener=listen)
    simulation.turn()
    simulation.workers[0].turn()
    meanwhile[0].join()
    steps = [news.steps_done for news in heard]
    assert steps == sorted(steps) and times == sorted(times) and len(steps) == len(times) == 4


def test_whoever_waits_is_told_less_as_those_before_are_painted() -> None:
    simulation, _ = measured(max_batch_size=1)
    simulation.submit(num_inference_steps=20)
    simulation.submit(num_inference_steps=20, request_id="waits")
    told = []
    for _ in range(5):
        simulation.turn()
        told.append(simulation.queue.status("waits").seconds or 0.0)
    assert told == sorted(set(told), reverse=True)


def test_a_request_is_cancelled_by_its_id_and_forgotten() -> None:
    simulation, family = measured(max_batch_size=1)
    running, waiting = simulation.submit(request_id="running"), simulation.submit(request_id="waiting", seed=5)
    simulation.turn()
    passes = len(family.passes)
    assert simulation.queue.cancel("running").state is RequestState.CANCELLED
    assert simulation.queue.cancel("waiting").state is RequestState.CANCELLED
    with pytest.raises(RequestNotFound):
        simulation.queue.status("waiting")
    simulation.turn(3)
    assert len(family.passes) == passes
    assert isinstance(running.future.exception(0), Cancelled) and isinstance(waiting.future.exception(0), Cancelled)
    with pytest.raises(RequestNotFound):
        simulation.queue.cancel("nobody")
    simulation.assert_empty()


def test_a_request_that_is_done_cannot_be_cancelled_any_more() -> None:
    simulation, _ = measured()
    ticket = simulation.submit(request_id="a")
    simulation.run()
    assert simulation.queue.cancel("a").state is RequestState.DONE
    assert ticket.future.result(0).images


def test_of_two_with_one_id_the_last_is_told_of_and_both_are_cancelled() -> None:
    simulation, _ = measured()
    tickets = [simulation.submit(request_id="same", num_inference_steps=steps) for steps in (3, 7)]
    assert simulation.queue.status("same").steps_total == 7
    simulation.queue.cancel("same")
    assert all(ticket.over for ticket in tickets)


def test_ends_are_forgotten_after_a_while() -> None:
    simulation, _ = measured()
    for number in range(KEPT_OUTCOMES + 50):
        simulation.submit(request_id=str(number))
        simulation.run()
    assert len(simulation.queue._outcomes) == KEPT_OUTCOMES
    with pytest.raises(RequestNotFound):
        simulation.queue.status("0")
    assert simulation.queue.status(str(KEPT_OUTCOMES + 49)).state is RequestState.DONE


def test_metrics_tell_the_seconds_that_things_took() -> None:
    clock = Clock()
    simulation = Simulation(Timed(clock), clock=clock, max_batch_size=1)
    for _ in range(2):
        simulation.submit(num_inference_steps=3)
    simulation.run()
    assert simulation.metric("sdxl_queue_wait_seconds_sum") == pytest.approx(3 * 1.1 + 0.5), "the second for the first"
    assert simulation.metric("sdxl_stage_seconds_sum", stage="denoise_step") == pytest.approx(2 * 3 * 1.1)
    assert simulation.metric("sdxl_stage_seconds_sum", stage="decode") == pytest.approx(2 * 0.5)
    simulation.submit(num_inference_steps=10)
    assert simulation.metric("sdxl_admitted_seconds_total") == pytest.approx(10 * 1.1 + 0.5), "by what was measured"


# --- The same request twice ------------------------------------------------------------------------------------

ONCE = Once("key", b"body")


def test_the_same_key_joins_while_it_runs_and_gets_the_same_answer_for_a_while_after() -> None:
    simulation, family = measured(idempotency_seconds=60.0)
    family.began.clear()
    first = simulation.submit(once=ONCE, seed=1)
    second = simulation.submit(once=ONCE, seed=2, request_id="second")
    assert second is first
    simulation.run()
    simulation.clock.now += 59
    third = simulation.submit(once=ONCE, seed=3, request_id="third")
    assert third is first and third.future.result(0).images[0].seed == 1
    assert simulation.queue.status("second").state is simulation.queue.status("third").state is RequestState.DONE
    assert family.began == [1]
    simulation.clock.now += 2
    assert simulation.submit(once=ONCE, seed=4) is not first
    simulation.run()
    assert family.began == [1, 4]
    for outcome in ("joined", "replayed"):
        assert simulation.metric("sdxl_idempotent_total", outcome=outcome) == 1
    simulation.assert_empty()


def test_whoever_joins_leaves_the_first_caller_its_id() -> None:
    simulation, _ = measured()
    for name in ("first", "second"):
        simulation.submit(once=ONCE, request_id=name)
    assert simulation.queue.status("first") == simulation.queue.status("second")
    assert simulation.queue.cancel("first").state is RequestState.CANCELLED
    assert simulation.queue.status("second").state is RequestState.CANCELLED


def test_whoever_joins_without_previews_leaves_the_first_caller_its_own() -> None:
    simulation = Simulation(Previews())
    wish = PreviewWish(PreviewKind.LATENTS, 1)
    simulation.submit(once=ONCE, num_inference_steps=3, listener=lambda _: None, preview=wish)
    simulation.submit(once=ONCE, num_inference_steps=3)
    simulation.run()
    assert simulation.finisher.shown == [(0, 1), (0, 2)]


def test_a_key_that_came_with_another_request_is_refused() -> None:
    simulation, _ = measured()
    simulation.submit(once=ONCE)
    with pytest.raises(KeyReused, match="new key"):
        simulation.submit(once=Once("key", b"other"))
    assert simulation.metric("sdxl_idempotent_total", outcome="conflict") == 1
    assert places_taken(simulation.queue) == 1
    simulation.run()
    with pytest.raises(KeyReused):
        simulation.submit(once=Once("key", b"other"))


def test_a_full_queue_lets_the_same_request_in_again_for_it_takes_no_place() -> None:
    simulation, _ = measured(max_queue=2)
    simulation.submit()
    first = simulation.submit(once=ONCE)
    assert simulation.submit(once=ONCE) is first
    with pytest.raises(Overloaded):
        simulation.submit(once=Once("other", b"body"))


def test_a_request_that_failed_may_be_tried_again_under_its_key() -> None:
    simulation, _ = measured()
    first = simulation.submit(once=ONCE)
    first.cancel()
    second = simulation.submit(once=ONCE)
    assert second is not first
    simulation.run()
    assert second.future.result(0).images


def test_one_of_two_callers_may_leave_and_the_other_gets_the_picture() -> None:
    simulation, _ = measured()
    ticket = simulation.submit(once=ONCE)
    simulation.submit(once=ONCE)
    ticket.leave()
    simulation.run()
    assert ticket.future.result(0).images
    alone = simulation.submit(seed=9)
    alone.leave()
    assert isinstance(alone.future.exception(0), Cancelled)


def test_whoever_leaves_what_others_wait_for_hears_no_more_of_it_and_its_id_is_nobodys() -> None:
    simulation, _ = measured()
    heard: dict[str, list[Progress | Preview]] = {"first": [], "second": []}
    for name, news in heard.items():
        ticket = simulation.submit(once=ONCE, request_id=name, listener=news.append)
    ticket.leave(heard["first"].append, "first")
    told = len(heard["first"])
    assert simulation.queue.status("first").state is RequestState.CANCELLED
    assert simulation.queue.cancel("first").state is RequestState.CANCELLED
    simulation.run()
    assert len(heard["first"]) == told and len(heard["second"]) > told
    ticket.leave(heard["second"].append, "second")
    assert simulation.queue.status("second").state is RequestState.DONE
    assert ticket.future.result(0).images


def test_the_last_who_leaves_is_told_that_the_request_was_cancelled() -> None:
    simulation, _ = measured()
    simulation.submit(request_id="only").leave(None, "only")
    assert simulation.queue.status("only").state is RequestState.CANCELLED
    simulation.assert_empty()


def test_nobody_joins_between_the_last_caller_that_leaves_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, _ = measured()
    joined: list[Ticket] = []
    joining = threading.Thread(target=lambda: joined.append(simulation.submit(once=ONCE)))
    cancel = Ticket.cancel

    def cancel_late(ticket: Ticket) -> None:
        joining.start()
        joining.join(0.2)
        cancel(ticket)

    monkeypatch.setattr(Ticket, "cancel", cancel_late)
    simulation.submit(once=ONCE).leave()
    joining.join()
    simulation.run()
    assert joined[0].future.result(0).images


def test_answers_are_kept_within_bounds() -> None:
    simulation, _ = measured()
    answers = Answers(1e9, most_bytes=100_000)
    for number in range(2000):
        ticket = Ticket(
            [GenerateRequest(prompt="", seed=0, num_inference_steps=1, height=8, width=8)], [1], 0, 1, simulation.queue
        )
        ticket.images[0].encoded, ticket.images[0].pixels = bytes(500), Pixels(bytes(500), 10, 10)
        answers.add(Once(str(number), b""), ticket)
        answers.ended(ticket, True, 0.0)
        assert answers.size <= 100_000 and len(answers) <= 100
    assert answers.find(Once("1999", b""), 0.0) is ticket
    assert answers.find(Once("0", b""), 0.0) is None
    empty = Answers(1e9)
    for number in range(MAX_KEYS + 10):
        ticket = Ticket([GenerateRequest(prompt="", seed=0)], [1], 0, 1, simulation.queue)
        empty.add(Once(str(number), b""), ticket)
        empty.ended(ticket, True, 0.0)
    assert len(empty) == MAX_KEYS and not empty._keys


def test_answers_are_forgotten_in_time_though_nobody_asks_and_keep_no_input_images() -> None:
    simulation, _ = measured(idempotency_seconds=60.0)
    image = Pixels(bytes(3 * 64 * 64), 64, 64)
    ticket = simulation.submit(once=ONCE, image=image, mask_image=image)
    simulation.run()
    assert ticket.future.result(0).images and len(simulation.queue.answers) == 1
    kept = [*ticket.requests, *(image.request for image in ticket.images), ticket.future.result(0).images[0].request]
    assert not any(request.image or request.mask_image for request in kept)
    simulation.clock.now += 61.0
    simulation.queue.end_late()
    assert len(simulation.queue.answers) == 0


def test_no_forecast_keeps_who_has_ended() -> None:
    simulation = Simulation(Instant())
    simulation.submit(listener=lambda _: None)
    assert simulation.queue._last_forecast
    simulation.run()
    assert not simulation.queue._last_forecast


def test_without_seconds_no_answer_is_kept() -> None:
    simulation, _ = measured(idempotency_seconds=0.0)
    simulation.submit(once=ONCE)
    simulation.run()
    assert len(simulation.queue.answers) == 0


# --- Several devices, and devices that do not interleave -------------------------------------------------------


def test_two_devices_share_one_queue_and_both_have_work() -> None:
    clock = Clock()
    families = [Timed(clock), Timed(clock)]
    simulation = Simulation(*families, clock=clock, max_batch_size=2)
    tickets = [simulation.submit(seed=seed) for seed in range(8)]
    simulation.run()
    began = [set(family.began) for family in families]
    assert began[0] | began[1] == set(range(8)) and not began[0] & began[1]
    assert len(began[0]) == len(began[1]) == 4
    for seed, ticket in enumerate(tickets):
        assert ticket.future.result(0).images[0].pixels.data[0] == ord("p") + seed
    simulation.assert_empty()


def test_an_idle_device_takes_what_a_busy_one_would_have_to_queue() -> None:
    clock = Clock()
    busy, idle = Timed(clock), Timed(clock)
    simulation = Simulation(busy, idle, clock=clock)
    simulation.submit(num_inference_steps=50, seed=1)
    simulation.workers[0].turn()
    simulation.submit(num_inference_steps=2, seed=2)
    simulation.workers[0].turn()
    assert busy.began == [1]
    simulation.workers[1].turn()
    assert idle.began == [2]
    simulation.run()


def test_what_is_left_to_another_device_that_does_not_come_is_taken_one_pass_later() -> None:
    clock = Clock()
    busy, away = Timed(clock), Timed(clock)
    simulation = Simulation(busy, away, clock=clock)
    long = simulation.submit(num_inference_steps=300, seed=1)
    simulation.workers[0].turn()
    # The other one takes no turn: it may be in the middle of a long decode, or hang.
    urgent = [simulation.submit(num_inference_steps=4, seed=seed, timeout=40.0, priority=1) for seed in (2, 3, 4)]
    while not all(ticket.over for ticket in urgent):
        simulation.workers[0].turn()
    assert all(ticket.future.result(0).images for ticket in urgent)
    assert [sorted(seeds) for seeds in busy.passes] == [[1]] * 2 + [[1, 2, 3, 4]] * 4 and not long.over


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_where_enough_waits_for_all_devices_each_fills_its_passes(devices: int, steps: int) -> None:
    clock = Clock()
    families = [Timed(clock) for _ in range(devices)]
    simulation = Simulation(*families, clock=clock, max_batch_size=16)
    for turn in range(10 * steps):
        while places_taken(simulation.queue) < 32 * devices:
            simulation.submit(num_inference_steps=steps)
        simulation.turn()
        assert [len(family.passes[turn]) for family in families] == [16] * devices


@pytest.mark.parametrize("images", [3, 4, 6, 13, 40, 63])
def test_what_waits_is_spread_evenly_over_all_devices(images: int) -> None:
    families = [Instant() for _ in range(4)]
    simulation = Simulation(*families, max_batch_size=16)
    simulation.submit(num_images_per_prompt=images, num_inference_steps=100)
    simulation.turn(4)
    began = [len(family.began) for family in families]
    assert sum(began) == images and max(began) - min(began) <= 1


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_several_devices_do_not_make_one_picture_faster_than_it_is(devices: int) -> None:
    clock = Clock()
    simulation = Simulation(*(Timed(clock) for _ in range(devices)), clock=clock)
    for _ in range(2):
        simulation.submit(num_inference_steps=4)
        simulation.run()
    ticket, began = simulation.submit(num_inference_steps=50), clock()
    simulation.run()
    assert ticket.foreseen == pytest.approx(clock() - began, rel=0.05)


def test_what_several_devices_do_in_time_together_is_let_in_though_one_could_not() -> None:
    clock = Clock()
    simulation = Simulation(*(Timed(clock) for _ in range(4)), clock=clock, max_batch_size=1)
    simulation.submit()
    simulation.run()
    one = simulation.submit(num_inference_steps=10).foreseen
    simulation.run()
    simulation.submit(num_inference_steps=1)
    ticket = simulation.submit(num_inference_steps=10, num_images_per_prompt=4, timeout=3.5 * one)
    assert ticket.foreseen < 1.4 * one


def test_requests_with_other_adapters_are_foreseen_to_share_no_pass() -> None:
    def foreseen(*loras: tuple[tuple[str, float], ...] | None) -> float:
        simulation, _ = measured()
        return [simulation.submit(seed=seed, loras=each) for seed, each in enumerate(loras)][-1].foreseen

    alone = foreseen(None)
    assert foreseen((("style", 0.7),), (("style", 0.7),)) < 1.9 * alone
    assert foreseen((("style", 0.7),), (("style", 0.8),)) == pytest.approx(2 * alone, rel=0.05)


def test_a_family_that_moves_its_weights_does_whole_jobs_and_gives_the_same_pictures() -> None:
    clock = Clock()
    family = WholeJobs(clock)
    simulation = Simulation(family, clock=clock, max_batch_size=4)
    tickets = [simulation.submit(seed=seed, num_inference_steps=2 + seed % 3) for seed in range(3)]
    tickets += [simulation.submit(seed=3, width=32)]
    simulation.turn()
    tickets += [simulation.submit(seed=4)]
    simulation.run()
    for seed, ticket in enumerate(tickets):
        assert ticket.future.result(0).images[0].pixels.data[0] == ord("p") + seed
    # Each move of weights once for each group: encode, then one size to its end, then the other, then decode.
    moves = [stage for i, stage in enumerate(family.stages) if i == 0 or stage != family.stages[i - 1]]
    assert moves[:1] == ["encode"] and moves.index("decode") == 3
    assert family.stages.index("decode") < len(family.stages) - 1 - family.stages[::-1].index("encode"), (
        "the late one joined before the first ones were done"
    )
    assert len(moves) == 3 + 1 + 3


def test_a_family_that_moves_its_weights_moves_none_for_who_is_more_urgent() -> None:
    clock = Clock()
    family = WholeJobs(clock)
    simulation = Simulation(family, clock=clock)
    for width, count in ((16, 2), (32, 4), (16, 10)):
        simulation.submit(width=width, num_inference_steps=count)
    simulation.run()
    steps = [stage for stage in family.stages if stage.startswith("step")]
    assert steps == ["step (16, 16)"] * 10 + ["step (16, 32)"] * 4
