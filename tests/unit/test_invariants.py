"""What holds whatever comes: each accepted request ends once, gets its own picture, and leaves nothing behind."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.engine.idempotency import Once
from app.engine.ticket import Ticket
from app.errors import Cancelled, DeadlineExceeded, KeyReused, OutOfMemory, Overloaded, RuntimeFault
from app.generation import PreviewKind, PreviewWish
from tests.fakes import Clock, FakeJob, Timed
from tests.simulation import Simulation, places_taken

MAX_QUEUE = 24


class Moody(Timed):
    """Runs out of memory, breaks or works, as a seed decides, and never harms the neighbours."""

    def __init__(self, clock: Clock, seed: int, interleaves: bool) -> None:
        super().__init__(clock)
        self.rng = random.Random(seed)
        self.interleaves = interleaves

    def _mood(self, jobs: Any) -> None:
        if any(job.request.prompt == "break" for job in jobs):
            raise RuntimeError("broke")
        if self.rng.random() < 0.1 * len(jobs):
            raise OutOfMemory("The device has too little memory.")

    def step(self, jobs: Any) -> None:
        self._mood(jobs)
        super().step(jobs)

    def decode(self, jobs: Any, tiled: bool = False) -> Any:
        if not tiled:
            self._mood(jobs)
        return super().decode(jobs, tiled)

    def preview(self, job: FakeJob, whole: bool = False) -> Any:
        self._mood([job])


class Server(RuleBasedStateMachine):
    """Requests of every kind come, leave, expire and repeat, between turns of one or two devices."""

    @initialize(
        seed=st.integers(0, 2**32), devices=st.integers(1, 2), rows=st.integers(1, 6), interleaves=st.booleans()
    )
    def start(self, seed: int, devices: int, rows: int, interleaves: bool) -> None:
        clock = Clock()
        families = [Moody(clock, seed + number, interleaves) for number in range(devices)]
        self.simulation = Simulation(
            *families,
            clock=clock,
            max_queue=MAX_QUEUE,
            max_batch_size=rows,
            max_queue_seconds=500.0,
            idempotency_seconds=20.0,
        )
        self.accepted: list[Ticket] = []
        self.ends: Counter[Ticket] = Counter()
        self.heard: Counter[Ticket] = Counter()

    @rule(
        prompt=st.sampled_from(("p", "q", "break")),
        steps=st.integers(1, 12),
        width=st.sampled_from((16, 32, 1024)),
        images=st.integers(1, 5),
        guidance=st.sampled_from((1.0, 5.0)),
        timeout=st.sampled_from((2.0, 30.0, 1e6)),
        priority=st.integers(1, 9),
        key=st.sampled_from((None, None, "a", "b")),
        preview=st.sampled_from((None, PreviewWish(PreviewKind.LATENTS, 2))),
    )
    def submit(
        self,
        prompt: str,
        steps: int,
        width: int,
        images: int,
        guidance: float,
        timeout: float,
        priority: int,
        key: str | None,
        preview: PreviewWish | None,
    ) -> None:
        before = places_taken(self.simulation.queue)
        told: list[object] = []
        try:
            ticket = self.simulation.submit(
                prompt,
                timeout,
                seed=len(self.accepted),
                num_inference_steps=steps,
                width=width,
                num_images_per_prompt=images,
                guidance_scale=guidance,
                priority=priority,
                preview=preview,
                once=Once(key, f"{prompt} {steps}".encode()) if key else None,
                listener=told.append,
            )
        except (Overloaded, DeadlineExceeded, KeyReused):
            assert places_taken(self.simulation.queue) == before
            return
        if ticket in self.accepted:
            return
        self.accepted.append(ticket)
        ticket.future.add_done_callback(lambda _: self.ends.update([ticket]))

    @rule(which=st.integers(0, 1000), all_callers=st.booleans())
    def leave(self, which: int, all_callers: bool) -> None:
        if self.accepted:
            ticket = self.accepted[which % len(self.accepted)]
            ticket.cancel() if all_callers else ticket.leave()

    @rule(times=st.integers(1, 10))
    def turn(self, times: int) -> None:
        self.simulation.turn(times)

    @rule(seconds=st.floats(0, 30))
    def pause(self, seconds: float) -> None:
        self.simulation.clock.now += seconds

    @invariant()
    def places_are_those_of_the_open_requests(self) -> None:
        if not hasattr(self, "simulation"):
            return
        queue = self.simulation.queue
        still_open = [ticket for ticket in self.accepted if not ticket.over]
        assert set(queue.tickets) == set(still_open)
        assert places_taken(queue) == sum(len(ticket.images) for ticket in still_open) <= MAX_QUEUE
        pending, running = (self.simulation.metric(f"sdxl_{name}_images") for name in ("pending", "running"))
        assert pending == len(queue.waiting)
        assert pending + running == places_taken(queue)

    @invariant()
    def nobody_ends_twice(self) -> None:
        assert all(count == 1 for count in getattr(self, "ends", {}).values())

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        self.simulation.run()
        assert set(self.ends) == set(self.accepted)
        for ticket in self.accepted:
            self.check_end(ticket)
        self.simulation.assert_empty()
        assert not any(ticket.listeners for ticket in self.accepted)
        self.simulation.clock.now += 21
        self.simulation.submit(once=Once("new", b""))
        assert len(self.simulation.queue.answers) == 1, "old answers are still there"

    def check_end(self, ticket: Ticket) -> None:
        error = ticket.future.exception(0)
        if error is not None:
            assert isinstance(error, RuntimeFault)
            if not isinstance(error, Cancelled | DeadlineExceeded | OutOfMemory):
                assert ticket.requests[0].prompt == "break", error
            return
        request = ticket.requests[0]
        assert request.prompt != "break"
        images = ticket.future.result(0).images
        assert len(images) == request.num_images_per_prompt
        for number, image in enumerate(images):
            assert image.seed == (request.seed or 0) + number
            assert image.pixels.data[0] == (sum(request.prompt.encode()) + image.seed) % 256
            assert (image.pixels.height, image.pixels.width) == (request.height, request.width)


Server.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestServer = Server.TestCase


def test_three_thousand_requests_leave_nothing_behind() -> None:
    clock = Clock()
    simulation = Simulation(Timed(clock), clock=clock, max_queue=64, idempotency_seconds=5.0)
    rng = random.Random(7)
    for number in range(3_000):
        try:
            ticket = simulation.submit(
                seed=number,
                num_inference_steps=rng.randint(1, 3),
                width=8 * rng.randint(1, 200),
                request_id=str(number),
                once=Once(str(number), b""),
                listener=lambda _: None,
                timeout=rng.choice((5.0, 1e6)),
            )
            if rng.random() < 0.2:
                ticket.cancel()
        except (Overloaded, DeadlineExceeded):
            pass
        if rng.random() < 0.7:
            simulation.turn()
    simulation.run()
    simulation.assert_empty()
    queue, worker = simulation.queue, simulation.workers[0]
    clock.now += 10
    queue._forecast(clock.now)
    simulation.submit(once=Once("last", b""))
    assert len(queue.answers) == len(queue.answers._keys) == 1 and queue.answers.size == 0
    assert len(queue._outcomes) <= 1024
    assert len(simulation.costs._steps) <= 64
    assert len(queue._last_forecast) <= 1 and len(worker.running) == 0
