"""A queue and its devices without threads: a test takes the turns itself, on a clock that it holds."""

from __future__ import annotations

from typing import Any

from app.engine.costs import Costs
from app.engine.family import Family
from app.engine.queue import Queue
from app.engine.ticket import Image, Ticket
from app.engine.worker import Worker
from app.generation import GenerateRequest, Pixels
from app.telemetry import Telemetry
from tests.fakes import Clock


class FinishesAtOnce:
    """Takes pixels for finished files."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.shown: list[tuple[int, int]] = []

    def finish(self, image: Image) -> None:
        assert image.pixels is not None
        self._queue.finished(image, image.pixels.data[:1], 0.0)

    def show(self, image: Image, pixels: Pixels) -> bool:
        self.shown.append((image.index, image.steps_done))
        return True


def places_taken(queue: Queue) -> int:
    """Images that are accepted and not over."""
    return sum(len(ticket.images) for ticket in queue.tickets)


class Simulation:
    """Families on one queue.

    Args:
        families: one for each device.
        clock: theirs, where they have one.
        options: `max_queue`, `max_queue_seconds`, `max_batch_size`, `max_batch_pixels`, `idempotency_seconds`,
            `step_timeout`.
    """

    def __init__(self, *families: Family[Any], clock: Clock | None = None, **options: float) -> None:
        self.clock = clock or Clock()
        self.family = families[0]
        self.telemetry = Telemetry("fake")
        rows = int(options.get("max_batch_size", 8))
        load = options.get("max_batch_pixels", 1e9)
        self.costs = Costs(rows, load)
        self.queue = Queue(
            self.costs,
            self.telemetry,
            max_images=int(options.get("max_queue", 1000)),
            max_seconds=options.get("max_queue_seconds", 1e9),
            keep_answers=options.get("idempotency_seconds", 60.0),
            clock=self.clock,
            devices=len(families),
        )
        self.finisher = FinishesAtOnce(self.queue)
        self.workers = [
            Worker(
                lambda family=family: family,  # type: ignore[misc]
                self.queue,
                self.costs,
                self.telemetry,
                self.finisher,
                most_rows=rows,
                most_load=load,
                step_timeout=options.get("step_timeout", 1e6),
                clock=self.clock,
            )
            for family in families
        ]
        for worker in self.workers:
            worker.peers = [peer for peer in self.workers if peer is not worker]
            worker.load(warm_up=False)

    def submit(self, prompt: str = "p", timeout: float = 1e6, **parameters: Any) -> Ticket:
        options = {
            name: parameters.pop(name)
            for name in ("priority", "listener", "preview", "once", "request_id")
            if name in parameters
        }
        request = GenerateRequest(prompt=prompt, **{"seed": 1, "guidance_scale": 1.0, **parameters})
        resolved = self.family.resolve(request)
        return self.queue.submit([resolved], [self.family.steps(resolved)], timeout, **options)

    def turn(self, times: int = 1) -> None:
        """Let every device take so many turns."""
        for _ in range(times):
            for worker in self.workers:
                worker.turn()

    def run(self, most: int = 100_000) -> None:
        """Take turns until nobody waits."""
        for _ in range(most):
            if not self.queue.tickets:
                return
            self.turn()
        raise AssertionError(f"{len(self.queue.tickets)} requests are not done after {most} turns")

    def metric(self, name: str, **labels: str) -> float:
        return self.telemetry.registry.get_sample_value(name, {"model_name": "fake", **labels}) or 0.0

    def assert_empty(self) -> None:
        """No place taken, nothing waits, nothing runs, and no gauge says otherwise."""
        self.turn()
        assert places_taken(self.queue) == 0 and not self.queue.waiting and not self.queue.tickets
        assert not any(worker.running for worker in self.workers)
        assert self.metric("sdxl_pending_images") == self.metric("sdxl_running_images") == 0
        assert self.metric("sdxl_queue_seconds") == 0
