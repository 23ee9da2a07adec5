"""The accepted requests of one model, from their place in the queue to their end, whatever devices work on them.

Everything here may be called from any thread. Knows no family and no HTTP.
"""

from __future__ import annotations

import collections
import enum
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from app.engine import admission, policy
from app.engine.costs import Costs
from app.engine.idempotency import Answers, Once
from app.engine.ticket import Image, Listener, Stage, Ticket
from app.errors import (
    Cancelled,
    DeadlineExceeded,
    KeyReused,
    ModelNotReady,
    RequestNotFound,
    RuntimeFault,
    ShuttingDown,
)
from app.generation import DEFAULT_PRIORITY, GenerateRequest, PreviewWish
from app.sentences import in_seconds
from app.telemetry import Telemetry

logger = logging.getLogger(__name__)

KEPT_OUTCOMES = 1024
"""Ended requests that can still be asked about."""
FORECAST_SECONDS = 0.25
"""For which a forecast is good."""


class RequestState(enum.StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """What can be said of one request.

    Attributes:
        place: in the queue, from 1 on; 0 once it has begun.
        seconds: until it is likely to be done; ``None`` while nothing like it was measured, and at the end.
        error: why it failed.
    """

    state: RequestState
    steps_done: int
    steps_total: int
    place: int = 0
    seconds: float | None = None
    error: str | None = None


class Queue:
    """The accepted requests of one model.

    Args:
        costs: what is known of seconds.
        telemetry: where counts go.
        max_images: accepted at the same time.
        max_seconds: of estimated work, accepted at the same time.
        keep_answers: seconds for which an answer stays known by its idempotency key.
        clock: seconds that only grow.
        devices: that share the work.
    """

    def __init__(
        self,
        costs: Costs,
        telemetry: Telemetry,
        *,
        max_images: int,
        max_seconds: float,
        keep_answers: float,
        clock: Callable[[], float],
        devices: int = 1,
    ) -> None:
        self._costs = costs
        self._telemetry = telemetry
        self._max_images = max_images
        self._max_seconds = max_seconds
        self._clock = clock
        self._devices = devices
        self.condition = threading.Condition()
        """Guards all that follows, and wakes whoever waits for a change."""
        self.tickets: dict[Ticket, None] = {}
        self.waiting: list[Image] = []
        self.closing = False
        self.broken = ""
        """Why nothing will ever be done again, if so."""
        self._caution = admission.Caution(clock())
        self.answers = Answers(keep_answers)
        self._outcomes: collections.OrderedDict[str, RequestStatus] = collections.OrderedDict()
        self._places_moved = False
        self._last_forecast: dict[Ticket, float] = {}
        self._forecast_until = 0.0
        telemetry.queue_seconds.set_function(self.seconds)

    # --- Letting in --------------------------------------------------------------------------------------------

    def submit(
        self,
        requests: Sequence[GenerateRequest],
        steps: Sequence[int],
        timeout: float,
        *,
        priority: int = DEFAULT_PRIORITY,
        listener: Listener | None = None,
        preview: PreviewWish | None = None,
        once: Once | None = None,
        request_id: str | None = None,
    ) -> Ticket:
        """Take a place for each image of `requests`, or join the same request where it came before.

        Args:
            requests: resolved, with seeds.
            steps: that each of their pictures takes.
            timeout: seconds until the request is given up.
            priority: 1 comes first, `MAX_PRIORITY` last.
            listener: hears of the request's progress.
            preview: which previews the listener wants.
            once: makes it the same request as an earlier one.
            request_id: by which it can be asked about and cancelled.

        Raises:
            Overloaded, DeadlineExceeded: see `admission`.
            KeyReused: the idempotency key came with another request.
            Unavailable: nothing is taken any more.
        """
        with self.condition:
            now = self._clock()
            self._check_open()
            ticket = self._join(once, now) if once else None
            if ticket is None:
                ticket = Ticket(requests, steps, now, now + timeout, self)
                try:
                    self._accept(ticket, priority)
                except RuntimeFault:
                    ticket.images.clear()  # as at the end of those that were accepted
                    raise
                if once:
                    self.answers.add(once, ticket)
            if ticket.over:
                self._remember(request_id, ticket, None)
                return ticket
            if request_id is not None:
                ticket.request_ids.append(request_id)
            ticket.preview = ticket.preview or preview
            if listener is not None:
                ticket.listeners.append(listener)
                if place := self._place_of(ticket):
                    ticket.place, seconds = place
                    ticket.tell_one(listener, ticket.progress(seconds))
        return ticket

    def _check_open(self) -> None:
        if self.broken:
            raise ModelNotReady(self.broken)
        if self.closing:
            raise ShuttingDown

    def _join(self, once: Once, now: float) -> Ticket | None:
        try:
            ticket = self.answers.find(once, now)
        except KeyReused:
            self._telemetry.idempotent("conflict")
            raise
        if ticket is not None:
            ticket.waiters += 1
            self._telemetry.idempotent("replayed" if ticket.over else "joined")
        return ticket

    def _accept(self, ticket: Ticket, priority: int) -> None:
        now = ticket.accepted
        work = admission.schedule([ticket], self._costs)[ticket]  # of one device
        alone = self._schedule([ticket])[ticket]
        ticket.due = policy.due(now, alone, ticket.deadline - now, priority)
        # By what was foreseen of late: a full queue may have many to refuse.
        admission.check_places(ticket, self.tickets, lambda: self._forecast(now), self._max_images)
        forecast = self._schedule(self.tickets)
        if self._costs.measured:
            with_new = self._schedule([*forecast, ticket])
            # With nobody else there nothing is refused: one odd measurement must not keep the next from being made.
            if forecast:
                caution = self._caution.now(now)
                admission.check_seconds(ticket, forecast, with_new, self._max_seconds, now, alone, caution)
            ticket.foreseen = with_new[ticket]
            for other, before in forecast.items():
                other.foreseen += with_new[other] - before if other.foreseen else 0.0
        self.tickets[ticket] = None
        self.waiting.extend(ticket.images)
        self._telemetry.pending.inc(len(ticket.images))
        self._telemetry.admitted_seconds.inc(work if self._costs.measured else 0.0)
        self._work_changed()

    # --- The device's side -------------------------------------------------------------------------------------

    def take(self, may: Callable[[Image], bool]) -> Image | None:
        """Hand over to a device the most urgent waiting image that `may` begin."""
        with self.condition:
            image = next(filter(may, sorted(self.waiting, key=policy.urgency)), None)
            if image is None:
                return None
            self.waiting.remove(image)
            image.stage = Stage.RUNNING
            image.began = self._clock()
            image.ticket.place = 0
            self._places_moved = True
            self._telemetry.pending.dec()
            self._telemetry.running.inc()
            waited = image.began - image.ticket.accepted
            self._telemetry.queue_wait.observe(waited)
            image.ticket.seconds.setdefault("queue", waited)
            return image

    def tell_places(self) -> None:
        """Tell listeners of waiting requests where they stand, where that has changed."""
        with self.condition:
            if not self._places_moved:
                return
            self._places_moved = False
            if not any(ticket.listeners for ticket in self.tickets):
                return
            for ticket, place, seconds in admission.places(self._forecast(self._clock())):
                if place != ticket.place and ticket.listeners:
                    ticket.place = place
                    ticket.tell(ticket.progress(self._known(seconds)))

    def finished(self, image: Image, encoded: bytes, seconds: float) -> None:
        """One image is whole; with the last one its ticket ends."""
        ticket = image.ticket
        with self.condition:
            ticket.seconds["encode"] += seconds
            image.encoded = encoded
            last = all(other.encoded is not None for other in ticket.images)
        if last:
            self.end(ticket, None)

    # --- The end of a ticket, in one place ---------------------------------------------------------------------

    def end(self, ticket: Ticket, fault: RuntimeFault | None) -> None:
        """Resolve `ticket` and give its places back; only the first call for a ticket does anything.

        A device that works on one of its images finds out before its next step.
        """
        with self.condition:
            if ticket.over:
                return
            ticket.over = True
            self.tickets.pop(ticket, None)
            waiting = [image for image in ticket.images if image.stage is Stage.WAITING]
            if waiting:
                self.waiting[:] = [image for image in self.waiting if image.ticket is not ticket]
            self._telemetry.pending.dec(len(waiting))
            self._telemetry.running.dec(len(ticket.images) - len(waiting))
            self._learn(ticket, fault)
            if fault is None:
                ticket.drop_inputs()
            self.answers.ended(ticket, fault is None, self._clock())
            for request_id in ticket.request_ids:
                self._remember(request_id, ticket, fault)
            ticket.listeners.clear()
            self._work_changed()
        self._resolve(ticket, fault)
        # They hold their ticket as it holds them: all pictures would stay until Python looks for such cycles.
        ticket.images.clear()

    def _resolve(self, ticket: Ticket, fault: RuntimeFault | None) -> None:
        if fault is None:
            self._telemetry.images.inc(len(ticket.images))
            ticket.future.set_result(ticket.generation())
            return
        if isinstance(fault, Cancelled):
            self._telemetry.cancelled.inc()
        else:
            self._telemetry.failed(fault.code)
            whose = {"request_id": ticket.known_as, "fields": {"reason": fault.code}}
            logger.warning("a request failed: %s", fault, extra=whose)
        ticket.future.set_exception(fault)

    def _learn(self, ticket: Ticket, fault: RuntimeFault | None) -> None:
        now = self._clock()
        if fault is None:
            self._caution.learn(ticket.foreseen, now - ticket.accepted, now)
        elif isinstance(fault, DeadlineExceeded):
            self._caution.learn(ticket.foreseen, (now - ticket.accepted) * admission.MISSED, now)

    def end_all(self, fault: RuntimeFault) -> None:
        with self.condition:
            tickets = list(self.tickets)
        for ticket in tickets:
            self.end(ticket, fault)

    def end_late(self) -> None:
        """Give up what is past its deadline, whether a device is busy with it or not, and forget old answers."""
        with self.condition:
            now = self._clock()
            late = [ticket for ticket in self.tickets if now >= ticket.deadline]
            self.answers.forget_old(now)
        for ticket in late:
            waited = in_seconds(now - ticket.accepted)
            self.end(ticket, DeadlineExceeded(f"The request was not done after {waited} and was given up."))

    def leave(self, ticket: Ticket, listener: Listener | None = None, request_id: str | None = None) -> None:
        """One caller waits no longer; with the last one the request is cancelled. See `Ticket.leave`."""
        with self.condition:
            ticket.waiters -= 1
            if ticket.waiters <= 0:
                ticket.cancel()
            if ticket.over:
                return
            if listener in ticket.listeners:
                ticket.listeners.remove(listener)
            if request_id in ticket.request_ids:
                ticket.request_ids.remove(request_id)
                self._remember(request_id, ticket, Cancelled("The caller left."))

    def _remember(self, request_id: str | None, ticket: Ticket, fault: RuntimeFault | None) -> None:
        if request_id is None:
            return
        state = RequestState.DONE if fault is None else RequestState.FAILED
        if isinstance(fault, Cancelled):
            state = RequestState.CANCELLED
        self._outcomes.pop(request_id, None)
        # One that has ended has no images any more.
        steps_done = ticket.steps_total if fault is None else ticket.steps_done
        self._outcomes[request_id] = RequestStatus(
            state, steps_done, ticket.steps_total, error=str(fault) if fault else None
        )
        if len(self._outcomes) > KEPT_OUTCOMES:
            self._outcomes.popitem(last=False)

    def _work_changed(self) -> None:
        self._places_moved = True
        # Emptied, or it would keep who has ended, with all pictures, until somebody asks.
        self._last_forecast, self._forecast_until = {}, 0.0
        self.condition.notify_all()

    # --- Asking ------------------------------------------------------------------------------------------------

    def seconds(self) -> float:
        """Until all that is accepted is likely to be done."""
        with self.condition:
            forecast = self._forecast(self._clock())
            return self._known(max(forecast.values(), default=0.0)) or 0.0

    def status(self, request_id: str) -> RequestStatus:
        """How the request is.

        Raises:
            RequestNotFound: none of that id runs, and none did lately.
        """
        with self.condition:
            if tickets := self._of(request_id):
                ticket = tickets[0]
                if place := self._place_of(ticket):
                    return RequestStatus(RequestState.QUEUED, 0, ticket.steps_total, *place)
                left = admission.remaining(ticket, self._costs)
                return RequestStatus(RequestState.RUNNING, ticket.steps_done, ticket.steps_total, 0, left)
            if request_id in self._outcomes:
                return self._outcomes[request_id]
        raise RequestNotFound(
            "There is no request of that id; ids are in the X-Request-Id header, and those that ended are forgotten "
            "after a while."
        )

    def cancel(self, request_id: str) -> RequestStatus:
        """End the request, whoever waits for it, and forget it; one that is over is only forgotten.

        Returns:
            How it ended.

        Raises:
            RequestNotFound: none of that id runs, and none did lately.
        """
        with self.condition:
            tickets = self._of(request_id)
        for ticket in tickets:
            ticket.cancel()
        with self.condition:
            status = self.status(request_id)
            self._outcomes.pop(request_id, None)
            return status

    def _forecast(self, now: float) -> dict[Ticket, float]:
        """The seconds until each open ticket is likely to be done, most urgent first; made anew when that may differ
        and once in a while, so that asking often, and refusing many, costs little."""
        if now >= self._forecast_until:
            self._last_forecast = self._schedule(self.tickets)
            self._forecast_until = now + FORECAST_SECONDS
        return self._last_forecast

    def _schedule(self, tickets: Iterable[Ticket]) -> dict[Ticket, float]:
        return admission.schedule(tickets, self._costs, self._devices)

    def _place_of(self, ticket: Ticket) -> tuple[int, float | None] | None:
        """Its place in the queue and the seconds until it is likely to be done; ``None`` once it has begun."""
        for other, place, seconds in admission.places(self._forecast(self._clock())):
            if other is ticket:
                return place, self._known(seconds)
        return None

    def _known(self, seconds: float) -> float | None:
        return seconds if self._costs.measured else None

    def _of(self, request_id: str) -> list[Ticket]:
        """The open tickets of that id, the last one first: an id is what a caller sent, and may come twice."""
        return [ticket for ticket in reversed(self.tickets) if request_id in ticket.request_ids]
