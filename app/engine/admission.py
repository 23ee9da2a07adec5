"""Who is let in, and what they are told of the wait: pure rules over accepted tickets. Knows no clock and no thread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NoReturn

from app.engine.costs import Costs, Drain
from app.engine.ticket import Ticket
from app.errors import DeadlineExceeded, Overloaded

LONGEST_WAIT = 600
"""Seconds that nobody is told to wait longer than."""


def in_order(tickets: Iterable[Ticket]) -> list[Ticket]:
    """Most urgent first."""
    return sorted(tickets, key=lambda ticket: (ticket.due, ticket.number))


def schedule(tickets: Iterable[Ticket], costs: Costs, devices: int = 1) -> Iterator[tuple[Ticket, float]]:
    """Each ticket, most urgent first, with the seconds until it is likely to be done."""
    drain = Drain(costs)
    for ticket in in_order(tickets):
        for image in ticket.images:
            drain.add(image)
        yield ticket, drain.seconds / devices


def places(tickets: Iterable[Ticket], costs: Costs, devices: int = 1) -> Iterator[tuple[Ticket, int, float | None]]:
    """Each waiting ticket with its place in the queue, from 1 on, and the seconds until it is likely to be done."""
    place = 0
    for ticket, seconds in schedule(tickets, costs, devices):
        if ticket.waiting:
            place += 1
            yield ticket, place, seconds if costs.measured else None


def remaining(ticket: Ticket, costs: Costs) -> float | None:
    """Seconds until a ticket that has begun is likely to be done, by its own pace."""
    steps = sum(image.remaining for image in ticket.images)
    if steps and not ticket.pace:
        return costs.alone(ticket.images) if costs.measured else None
    return ticket.pace * steps + costs.after_steps(ticket.images)


def check_places(new: Ticket, tickets: Iterable[Ticket], most: int, costs: Costs, devices: int) -> None:
    """Refuse more images than there are places.

    Raises:
        Overloaded: with the seconds until as many as are missing have left, most urgent first.
    """
    tickets = list(tickets)
    taken = sum(len(ticket.images) for ticket in tickets)
    missing = taken + len(new.images) - most
    if missing <= 0:
        return
    wait = 0.0
    for ticket, seconds in schedule(tickets, costs, devices):
        wait = seconds
        missing -= len(ticket.images)
        if missing <= 0:
            break
    _refuse(f"The queue is full ({taken} of {most} images)", wait)


def check_seconds(
    new: Ticket, tickets: Iterable[Ticket], most: float, costs: Costs, devices: int, now: float, alone: float
) -> None:
    """Refuse what would be late, would make others late, or would make the queue too long.

    With nobody else there nothing is refused: one odd measurement must not keep the next one from being made.

    Args:
        new: who wants in.
        tickets: who is in.
        most: seconds of work in the queue.
        costs: what is known of seconds.
        devices: that share the work.
        now: on the clock of the tickets.
        alone: seconds that the new one takes without company.

    Raises:
        Overloaded: with the seconds until it would fit.
        DeadlineExceeded: its deadline is too short even without company.
    """
    tickets = list(tickets)
    if not tickets or not costs.measured:
        return
    timeout = new.deadline - now
    if alone > timeout:
        raise DeadlineExceeded(
            f"The request takes about {alone:.1f} seconds, but its deadline is after {timeout:.1f}; allow more time or "
            "ask for fewer steps or images."
        )
    without = dict(schedule(tickets, costs, devices))
    total = 0.0
    for ticket, total in schedule([*tickets, new], costs, devices):
        late = now + total - ticket.deadline
        if late > 0 and ticket is new:
            _refuse("The queue is too long for the request to meet its deadline", late)
        if late > 0 and now + without[ticket] <= ticket.deadline:
            _refuse("The request would keep another one from meeting its deadline", late)
    if total > most:
        _refuse(f"The queue is full (about {total:.0f} of {most:.0f} seconds of work)", total - most)


def _refuse(why: str, wait: float) -> NoReturn:
    seconds = math.ceil(min(max(1.0, wait), LONGEST_WAIT))
    raise Overloaded(f"{why}; try again in {seconds} second{'' if seconds == 1 else 's'}.", seconds)
