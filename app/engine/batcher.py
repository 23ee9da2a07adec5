"""One model at work: a queue, a thread for each device that works it off, and one that keeps the time.

Works on any `Family` and knows no model and no HTTP. The word scheduler stays with the noise schedulers of diffusion.
`queue.py` says who waits and how a request ends, `policy.py` whose turn it is, `worker.py` what happens in a turn.
"""

from __future__ import annotations

import concurrent.futures
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from app import heap
from app.engine.costs import Costs
from app.engine.family import Family
from app.engine.faults import LOST
from app.engine.finishing import Encoders
from app.engine.idempotency import Once
from app.engine.queue import Queue, RequestStatus
from app.engine.ticket import Listener, Ticket
from app.engine.worker import Worker
from app.errors import DeviceLost, GenerationFailed, RuntimeFault, ShuttingDown
from app.generation import DEFAULT_PRIORITY, GenerateRequest, PreviewWish
from app.start import Timeline
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

Load = Callable[[], Family[Any]]
DEVICE_THREAD = "device"
THREAD_END_SECONDS = 0.5
"""For a device's thread to see that it is over; in the middle of a step it cannot."""
TICK = 0.25
"""Seconds between two looks at deadlines and at devices that may hang."""


class Batcher:
    """The queue in front of one or more devices, and the threads that own them.

    Args:
        load: makes the family; one function for each device, called once, on the thread that owns it.
        telemetry: where counts and seconds go.
        max_queue: images accepted at the same time.
        max_batch_size: rows of one forward pass; an image with guidance brings two.
        encode_threads: threads that encode finished pixels.
        embed_metadata: PNG text chunks.
        warm_up: run one short generation before `ready`.
        max_batch_pixels: pixels times rows of one forward pass.
        max_queue_seconds: of estimated work, accepted at the same time.
        step_timeout: seconds beyond what is usual after which a device counts as hung.
        idempotency_seconds: for which an answer stays known by its idempotency key.
        on_lost: called from a device's thread when the device is beyond repair.
        timelines: one for each device, on which `load` has noted what it did.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        load: Load | Sequence[Load],
        telemetry: Telemetry,
        *,
        max_queue: int,
        max_batch_size: int,
        encode_threads: int,
        embed_metadata: bool,
        warm_up: bool,
        max_batch_pixels: float = 16_777_216,
        max_queue_seconds: float = 600.0,
        step_timeout: float = 60.0,
        idempotency_seconds: float = 120.0,
        on_lost: Callable[[BaseException], None] | None = None,
        timelines: Sequence[Timeline] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        loads = [load] if callable(load) else list(load)
        self._warm_up = warm_up
        self._on_lost = on_lost
        self._clock = clock
        self._telemetry = telemetry
        self.ready: concurrent.futures.Future[Family[Any]] = concurrent.futures.Future()
        """The loaded family, the first device's, once all have theirs; or why there is none."""
        costs = Costs(max_batch_size, max_batch_pixels)
        self.queue = Queue(
            costs,
            telemetry,
            max_images=max_queue,
            max_seconds=max_queue_seconds,
            keep_answers=idempotency_seconds,
            clock=clock,
            devices=len(loads),
        )
        self._encoders = Encoders(self.queue, telemetry, encode_threads, embed_metadata)
        self.workers = [
            Worker(
                each,
                self.queue,
                costs,
                telemetry,
                self._encoders,
                most_rows=max_batch_size,
                most_load=max_batch_pixels,
                step_timeout=step_timeout,
                clock=clock,
                timeline=timeline,
            )
            for each, timeline in zip(loads, timelines or [Timeline() for _ in loads], strict=True)
        ]
        for worker in self.workers:
            worker.peers = [peer for peer in self.workers if peer is not worker]
        self._loaded = 0
        self._hurried = False
        self._threads = [
            threading.Thread(target=self._main, args=(worker,), name=DEVICE_THREAD, daemon=True)
            for worker in self.workers
        ]
        self._tick = min(TICK, step_timeout / 4)
        self._stopped = threading.Event()
        self._timekeeper = threading.Thread(target=self._keep_time, name="timekeeper", daemon=True)

    # --- What callers use --------------------------------------------------------------------------------------

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._timekeeper.start()

    @property
    def alive(self) -> bool:
        """Whether every device's thread is there and none hangs; else only a restart helps."""
        return not self.queue.broken and all(thread.is_alive() for thread in self._threads)

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        timeout: float,
        listener: Listener | None = None,
        *,
        priority: int = DEFAULT_PRIORITY,
        preview: PreviewWish | None = None,
        once: Once | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Take a place for each image of `requests`; see `Queue.submit`. Only once it is ready."""
        family = self.ready.result()
        return self.queue.submit(
            requests,
            [family.steps(request) for request in requests],
            timeout,
            priority=priority,
            listener=listener,
            preview=preview,
            once=once,
            request_id=request_id,
        )

    def status(self, request_id: str) -> RequestStatus:
        """How a request is; see `Queue.status`."""
        return self.queue.status(request_id)

    def cancel(self, request_id: str) -> RequestStatus:
        """End a request; see `Queue.cancel`."""
        return self.queue.cancel(request_id)

    def close(self, grace: float) -> None:
        """Take no more requests, wait `grace` seconds for the accepted ones, end the rest and then the threads."""
        with self.queue.condition:
            self.queue.closing = True
            self.queue.condition.notify_all()
            self.queue.condition.wait_for(lambda: self._hurried or not self.queue.tickets or not self.alive, grace)
        self.queue.end_all(ShuttingDown("The server shut down before the request was done."))
        if self.ready.done():  # a thread that still loads cannot be told to stop
            deadline = time.monotonic() + THREAD_END_SECONDS
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        self._stopped.set()
        self._encoders.close()

    def hurry(self) -> None:
        """Have `close` wait no longer, also one that is yet to come."""
        with self.queue.condition:
            self._hurried = True
            self.queue.condition.notify_all()

    # --- The devices' threads ----------------------------------------------------------------------------------

    def _main(self, worker: Worker) -> None:
        try:
            worker.load(self._warm_up)
        except BaseException as error:
            with self.queue.condition:
                if not self.ready.done():
                    self.ready.set_exception(error)
            return
        self._count_loaded()
        fault: RuntimeFault = GenerationFailed("The device thread ended before the request was done.")
        try:
            while worker.wait_for_work():
                worker.turn()
            worker.family.close()
        except DeviceLost as lost:
            fault = lost
            self._break(fault)
            if self._on_lost is not None:
                self._on_lost(lost)
        except BaseException:
            logger.critical("the device thread ended", exc_info=True)
            self._break(fault)

    def _count_loaded(self) -> None:
        with self.queue.condition:
            self._loaded += 1
            last = self._loaded == len(self.workers) and not self.ready.done()
        if last:
            self.ready.set_result(self.workers[0].family)

    def _break(self, fault: RuntimeFault) -> None:
        """Nothing will be done any more: say so to everybody who waits, and to whoever watches."""
        self._telemetry.ready.set(0)
        with self.queue.condition:
            self.queue.broken = self.queue.broken or "The device has failed; the server must be restarted."
            self.queue.condition.notify_all()
        self.queue.end_all(fault)

    # --- The timekeeper's thread -------------------------------------------------------------------------------

    def _keep_time(self) -> None:
        trimmed = self._clock()
        while not self._stopped.wait(self._tick):
            self.look()
            if self._clock() - trimmed >= heap.TRIM_EVERY:
                heap.trim()
                trimmed = self._clock()

    def look(self) -> None:
        """End what is late, and everything once a device hangs: then even a deadline would wait for it."""
        self.queue.end_late()
        if self.queue.broken:
            return
        for worker, thread in zip(self.workers, self._threads, strict=True):
            operation = worker.hung(self._clock())
            if operation is not None:
                frame = sys._current_frames().get(thread.ident or 0)
                stack = "".join(traceback.format_stack(frame)) if frame else ""
                logger.critical(
                    "the device hangs: %s has taken more than %.0f seconds; restart the server\n%s",
                    operation.stage,
                    operation.bound,
                    stack,
                )
                self._telemetry.hung_steps.inc()
                self._break(DeviceLost(LOST))
