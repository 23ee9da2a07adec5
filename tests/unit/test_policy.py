"""Whose turn it is: short ones pass long ones, none is overtaken for ever, and a pass holds what it may."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from app.engine import policy
from app.engine.ticket import Ticket
from app.generation import GenerateRequest, Preview, Progress
from tests.fakes import Clock, StopsGuiding, Timed
from tests.simulation import Simulation


def timed(**options: Any) -> tuple[Simulation, Timed]:
    clock = Clock()
    family = Timed(clock)
    return Simulation(family, clock=clock, **options), family


def measured(**options: Any) -> tuple[Simulation, Timed]:
    """One that has seen what a step costs, in company and alone."""
    simulation, family = timed(**options)
    for sizes in ((16, 16), (16,), (32, 32), (32,)):
        for width in sizes:
            simulation.submit(width=width)
        simulation.run()
    family.passes.clear()
    family.began.clear()
    family.decodes.clear()
    return simulation, family


# --- Due times -------------------------------------------------------------------------------------------------


def test_who_needs_less_is_due_sooner_and_who_waits_long_enough_is_due_before_anybody_new() -> None:
    assert policy.due(0, 1, 1000) < policy.due(0, 10, 1000)
    assert policy.due(0, 10, 1000) < policy.due(41, 1e-9, 1000)


def test_a_deadline_brings_the_due_time_forward() -> None:
    assert policy.due(0, 100, 20) == 10


@pytest.mark.parametrize("priority", range(1, 9))
def test_each_level_of_priority_is_due_in_half_the_time_of_the_next(priority: int) -> None:
    assert policy.due(0, 1, 1e9, priority) * 2 == policy.due(0, 1, 1e9, priority + 1)


# --- Turns -----------------------------------------------------------------------------------------------------


def test_a_short_request_of_another_size_passes_long_ones() -> None:
    simulation, family = measured()
    long = [simulation.submit(width=16, num_inference_steps=50, seed=seed) for seed in range(8)]
    simulation.turn(5)
    passes = len(family.passes)
    short = simulation.submit(width=32, num_inference_steps=4, seed=99)
    while not short.over:
        simulation.turn()
    assert len(family.passes) - passes <= 2 * 4
    assert not any(ticket.over for ticket in long)


def test_a_short_request_behind_eight_long_ones_is_done_within_twice_the_time_of_its_steps_in_their_company() -> None:
    simulation, family = measured(max_batch_size=32)
    for seed in range(8):
        simulation.submit(num_inference_steps=50, seed=seed)
    simulation.turn(3)
    arrived = simulation.clock.now
    short = simulation.submit(num_inference_steps=4, seed=99)
    while not short.over:
        simulation.turn()
    in_company = 4 * (family.fixed + 9 * family.per_row) + family.decoding
    assert simulation.clock.now - arrived <= 2 * in_company


class Wordy(Timed):
    """Takes long to read a prompt, and lets a test have something happen meanwhile."""

    reading = 5.0

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.read: list[str] = []
        self.meanwhile: Callable[[], None] | None = None

    def encode(self, request: GenerateRequest) -> int:
        self.read.append(request.prompt)
        self.clock.now += self.reading
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return super().encode(request)


def test_a_short_request_waits_for_one_prompt_and_not_for_all_that_came_before_it() -> None:
    clock = Clock()
    family = Wordy(clock)
    simulation = Simulation(family, clock=clock)
    simulation.submit("first")
    simulation.run()
    family.meanwhile = lambda: tickets.append(simulation.submit("short", num_inference_steps=4))
    tickets: list[Ticket] = [simulation.submit("long", num_inference_steps=50, seed=seed) for seed in range(6)]
    simulation.run()
    assert family.read == ["first", "long", "short", *["long"] * 5]
    assert all(ticket.future.result(0).images for ticket in tickets)


def test_whoever_is_being_painted_waits_for_one_prompt_at_most_between_two_steps() -> None:
    clock = Clock()
    family = Wordy(clock)
    simulation = Simulation(family, clock=clock)
    running = simulation.submit("first", num_inference_steps=10)
    simulation.turn()
    for seed in range(4):
        simulation.submit("long", num_inference_steps=50, seed=seed)
    for read in range(1, 5):
        steps, before = running.steps_done, clock.now
        simulation.turn()
        assert len(family.read) == 1 + read and running.steps_done == steps + 1
        assert clock.now - before <= family.reading + family.fixed + 8 * family.per_row


def test_whoever_waits_hears_of_its_place_as_others_begin_though_nobody_has_ended() -> None:
    clock = Clock()
    simulation = Simulation(Wordy(clock), clock=clock)
    heard: list[Progress | Preview] = []
    for _ in range(2):
        simulation.submit("long", num_inference_steps=50)
    simulation.submit("long", num_inference_steps=50, listener=heard.append)
    simulation.turn(2)
    assert [news.place for news in heard if isinstance(news, Progress)] == [3, 2, 1]


def test_prompts_that_are_read_in_no_time_all_join_the_same_pass() -> None:
    simulation, family = timed()
    for seed in range(8):
        simulation.submit(seed=seed)
    simulation.turn()
    assert [len(each) for each in family.passes] == [8]


def test_a_short_request_takes_a_row_from_long_ones_where_there_is_no_room_for_all() -> None:
    simulation, family = measured(max_batch_size=4)
    for seed in range(12):
        simulation.submit(num_inference_steps=50, seed=seed)
    simulation.turn(3)
    short = simulation.submit(num_inference_steps=4, seed=99)
    passes = len(family.passes)
    while not short.over:
        simulation.turn()
    assert len(family.passes) - passes <= 5


def busy_until(simulation: Simulation, ticket: Ticket, **others: Any) -> float:
    """Keep the device busy with others that come as fast as they can be done; gives the seconds until `ticket` ends."""
    arrived = simulation.clock.now
    seed = 0
    while not ticket.over:
        seed += 1
        simulation.submit(width=16, num_inference_steps=2, seed=seed, **others)
        simulation.turn()
        assert simulation.clock.now - arrived < 10_000, "the request starves"
    return simulation.clock.now - arrived


def test_a_long_request_is_not_starved_by_short_ones_that_never_stop_coming() -> None:
    simulation, family = measured(max_batch_size=2)
    alone = 20 * (family.fixed + family.per_row) + family.decoding
    long = simulation.submit(width=32, num_inference_steps=20, seed=1000)
    assert busy_until(simulation, long) < (policy.PATIENCE + 3) * alone


def test_the_least_urgent_of_all_is_done_too_while_urgent_ones_keep_coming() -> None:
    simulation, family = measured(max_batch_size=2)
    alone = 4 * (family.fixed + family.per_row) + family.decoding
    last = simulation.submit(width=32, num_inference_steps=4, seed=1000, priority=9)
    seconds = busy_until(simulation, last, priority=1)
    assert 4 * policy.PATIENCE * alone < seconds < 2 * 16 * policy.PATIENCE * alone


def test_a_more_urgent_priority_goes_first() -> None:
    simulation, _ = measured(max_batch_size=1)
    running = simulation.submit(num_inference_steps=3, seed=1)
    simulation.turn()
    later = [simulation.submit(num_inference_steps=3, seed=seed, priority=5) for seed in (2, 3)]
    urgent = simulation.submit(num_inference_steps=3, seed=4, priority=1)
    while not urgent.over:
        simulation.turn()
    assert not any(ticket.over for ticket in later)
    simulation.run()
    assert running.over


def test_nobody_waits_for_company() -> None:
    simulation, family = measured()
    simulation.submit(seed=7)
    simulation.turn()
    assert family.passes == [[7]]


def test_two_sizes_that_need_the_same_wait_the_same() -> None:
    simulation, _ = measured(max_batch_size=4)
    rng = random.Random(0)
    tickets: list[Ticket] = []
    for seed in range(600):
        if rng.random() < 0.6:
            tickets.append(simulation.submit(width=rng.choice((16, 32)), num_inference_steps=5, seed=seed))
        simulation.turn()
    simulation.run()
    waits: dict[int | None, list[float]] = {16: [], 32: []}
    for ticket in tickets:
        waits[ticket.requests[0].width].append(ticket.last_step - ticket.accepted)
    means = [sum(each) / len(each) for each in waits.values()]
    assert max(means) < 1.3 * min(means)


def test_passes_that_could_not_be_shared_with_the_one_before_are_counted() -> None:
    simulation, _ = timed()
    for width in (16, 32, 32, 16):
        simulation.submit(width=width)
        simulation.run()
    assert simulation.metric("sdxl_turn_switches_total") == 2


# --- What a pass holds -----------------------------------------------------------------------------------------


def test_a_pass_has_at_most_so_many_rows_and_guidance_takes_two() -> None:
    simulation, family = timed(max_batch_size=5)
    for seed in range(6):
        simulation.submit(seed=seed, guidance_scale=5.0)
    simulation.run()
    assert max(map(len, family.passes)) == 2


def test_where_guidance_has_ended_an_image_takes_one_row_and_makes_room() -> None:
    clock = Clock()
    family = StopsGuiding(clock)
    simulation = Simulation(family, clock=clock, max_batch_size=4)
    for seed in range(3):
        simulation.submit(seed=seed, num_inference_steps=8, guidance_scale=5.0)
    simulation.run()
    assert family.passes == [[0, 1]] * 4 + [[0, 1, 2]] * 4 + [[2]] * 4
    assert simulation.metric("sdxl_rows_per_forward_pass_sum") == 3 * (4 * 2 + 4)
    assert simulation.costs.step(16 * 16, 4) == pytest.approx(family.fixed + family.per_row * 4)


def test_a_row_that_is_too_small_for_the_next_goes_to_whom_it_fits() -> None:
    simulation, family = timed(max_batch_size=3)
    for seed in range(4):
        simulation.submit(seed=seed, num_inference_steps=20, guidance_scale=5.0)
    simulation.turn()
    for seed in (8, 9):
        simulation.submit(seed=seed, num_inference_steps=5, priority=9)
    simulation.turn(10)
    assert family.passes == [[0]] + [[0, 8]] * 5 + [[0, 9]] * 5


def test_one_image_goes_however_few_rows_a_pass_may_have() -> None:
    simulation, family = timed(max_batch_size=1)
    simulation.submit(guidance_scale=5.0)
    simulation.run()
    assert family.passes == [[1]] * 4


def test_a_pass_has_at_most_so_many_pixels_times_rows() -> None:
    simulation, family = timed(max_batch_size=100, max_batch_pixels=16 * 16 * (2 * 3 + 1))
    for seed in range(10):
        simulation.submit(seed=seed, guidance_scale=5.0)
    simulation.submit(seed=99, guidance_scale=5.0, height=512, width=512)
    simulation.run()
    assert max(map(len, family.passes)) == 3
    assert [99] in family.passes


def test_small_pictures_are_decoded_together_and_large_ones_one_by_one() -> None:
    simulation, family = timed(max_batch_size=8)
    for seed in range(4):
        simulation.submit(seed=seed)
    simulation.run()
    assert [sorted(seeds) for seeds in family.decodes] == [[0, 1, 2, 3]]
    family.decodes.clear()
    for seed in range(3):
        simulation.submit(seed=seed, height=1024, width=1024)
    simulation.run()
    assert sorted(family.decodes) == [[0], [1], [2]]


def test_as_many_pixels_are_decoded_together_as_the_family_wants() -> None:
    family = Timed(Clock())
    family.decode_load = 2 * 16 * 16
    simulation = Simulation(family, clock=family.clock, max_batch_size=8)
    for seed in range(4):
        simulation.submit(seed=seed)
    simulation.run()
    assert sorted(map(len, family.decodes)) == [2, 2]


def test_between_two_steps_of_the_more_urgent_only_one_group_is_decoded() -> None:
    family = Timed(Clock())
    family.decode_load = 16 * 16
    simulation = Simulation(family, clock=family.clock, max_batch_size=8)
    urgent = simulation.submit(seed=50, num_inference_steps=30, priority=1)
    for seed in range(4):
        simulation.submit(seed=seed, num_inference_steps=1, priority=9)
    decoded = []
    while not urgent.over:
        before = len(family.decodes)
        simulation.turn()
        decoded.append(len(family.decodes) - before)
    assert decoded == [1] * 4 + [0] * 25 + [1]


# --- What only equal pieces may do -----------------------------------------------------------------------------


def test_choosing_among_none_is_none() -> None:
    assert policy.choose([], lambda _: 0, lambda _: 1, 8, 1e9) == []


def test_requests_of_one_ticket_with_most_work_left_come_last() -> None:
    request = GenerateRequest(prompt="", height=8, width=8, num_inference_steps=9, seed=0, num_images_per_prompt=3)
    simulation, _ = timed()
    images = Ticket([request], [9], 0.0, 1.0, simulation.queue).images
    images[2].steps_done = 5
    assert policy.choose(images, lambda _: 0, lambda _: 1, 2, 1e9) == [images[2], images[0]]
