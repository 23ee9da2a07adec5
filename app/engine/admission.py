"""Who is let in, and what they are told of the wait: pure rules over accepted tickets. Knows no clock and no thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from app.engine.costs import Costs
from app.engine.ticket import Image, Stage, Ticket
from app.errors import DeadlineExceeded, Overloaded
from app.sentences import counted, in_seconds

LONGEST_WAIT = 600
"""Seconds that nobody is told to wait longer than."""
FIRST_CAUTION = 2.5
LEAST_CAUTION, MOST_CAUTION = 1.5, 4.0
CAUTION_HALF_LIFE = 600.0
"""Seconds in which half of what was learned is forgotten."""
LEAST_FORESEEN = 1.0
"""Seconds of a forecast that something can be learned from: what is shorter is off by what nobody forecasts."""
MISSED = 1.25
"""How much longer than until its deadline a request would have taken that was given up there."""


class Caution:
    """How many times longer than foreseen things may take on this host: what they took at most of late.

    A GPU of one's own keeps its promises within a few per cent; cores that others share may lose half their speed for
    seconds.

    Args:
        now: on any clock of seconds.
    """

    def __init__(self, now: float) -> None:
        self._most = FIRST_CAUTION
        self._since = now

    def now(self, now: float) -> float:
        kept: float = 0.5 ** ((now - self._since) / CAUTION_HALF_LIFE)
        return LEAST_CAUTION + (self._most - LEAST_CAUTION) * kept

    def learn(self, foreseen: float, seconds: float, now: float) -> None:
        """Note that what was `foreseen` to take so many seconds took `seconds`."""
        if foreseen >= LEAST_FORESEEN:
            self._most = min(max(self.now(now), seconds / foreseen), MOST_CAUTION)
            self._since = now


def schedule(tickets: Iterable[Ticket], costs: Costs, devices: int = 1) -> dict[Ticket, float]:
    """The seconds until each ticket is likely to be done, most urgent first: the policy, played forward.

    Say that a pass takes 1 second for one row and 1.5 for two. Of two tickets with one row each, the first wants 4
    steps and the second 10. Both share 4 passes, so that the first is done after 6 seconds; the second has 6 more
    passes for itself and is done after 12.

    Several devices share the work, but one picture is painted by one of them: with two, these are 4 and 10 seconds.
    """
    ordered = sorted(tickets, key=lambda ticket: (ticket.due, ticket.number))
    done = _play([(rank, image) for rank, ticket in enumerate(ordered) for image in ticket.images], costs)
    if devices > 1:
        for rank, ticket in enumerate(ordered):
            left = sorted(ticket.images, key=lambda image: image.remaining, reverse=True)
            share = _play([(rank, image) for image in left[: math.ceil(len(left) / devices)]], costs)
            done[rank] = max(done.get(rank, 0.0) / devices, share.get(rank, 0.0))
    return {ticket: done.get(rank, 0.0) for rank, ticket in enumerate(ordered)}


def _play(images: Iterable[tuple[int, Image]], costs: Costs) -> dict[int, float]:
    """The seconds until the images of each rank are done on one device.

    Who has the size and the adapters of the most urgent image shares its passes, until one of them is done; then the
    next ones join.
    """
    clock = 0.0
    done: dict[int, float] = {}
    groups: dict[Hashable, list[_Left]] = {}
    for rank, image in images:
        if image.remaining:
            left = _Left(rank, image, image.remaining, costs.rows(image))
            groups.setdefault((image.size, image.request.loras), []).append(left)
        elif not image.pixels:
            clock += costs.decode(image.size)
    while groups:
        group = min(groups, key=lambda each: groups[each][0].rank)
        size = groups[group][0].image.size
        batch = _fill(groups[group], size, costs)
        passes = min(left.steps for left in batch)
        clock += passes * costs.step(size, sum(left.rows for left in batch))
        clock += costs.join() * sum(left.image.stage is Stage.WAITING and not left.begun for left in batch)
        for left in batch:
            left.steps -= passes
            left.begun = True
        finished = [left for left in batch if not left.steps]
        clock += costs.decode(size * len(finished))
        for left in finished:
            done[left.rank] = clock
            groups[group].remove(left)  # from near its front, however many there are
        if not groups[group]:
            del groups[group]
    return done


@dataclass(slots=True, eq=False)
class _Left:
    """What is left to do for one image."""

    rank: int
    image: Image
    steps: int
    rows: int
    begun: bool = False


def _fill(candidates: Sequence[_Left], size: int, costs: Costs) -> list[_Left]:
    most = min(costs.most_rows, costs.most_load / max(size, 1))
    batch: list[_Left] = []
    rows = 0
    for left in candidates:
        if batch and rows + left.rows > most:
            if rows + 1 > most:
                break
            continue
        batch.append(left)
        rows += left.rows
    return batch


def places(forecast: Mapping[Ticket, float]) -> Iterator[tuple[Ticket, int, float]]:
    """Each waiting ticket with its place in the queue, from 1 on, and the seconds until it is likely to be done."""
    place = 0
    for ticket, seconds in forecast.items():
        if ticket.waiting:
            place += 1
            yield ticket, place, seconds


def remaining(ticket: Ticket, costs: Costs) -> float | None:
    """Seconds until a ticket that has begun is likely to be done, by its own pace."""
    steps = sum(image.remaining for image in ticket.images)
    if steps and not ticket.pace:
        return schedule([ticket], costs)[ticket] if costs.measured else None
    return ticket.pace * steps + sum(costs.decode(image.size) for image in ticket.images if not image.pixels)


def check_places(
    new: Ticket, others: Iterable[Ticket], foresee: Callable[[], Mapping[Ticket, float]], most: int
) -> None:
    """Refuse more images than there are places.

    Args:
        new: the ticket that wants some.
        others: that have theirs.
        foresee: the seconds until each of them is done, asked for where places are missing.
        most: places.

    Raises:
        Overloaded: with the seconds until as many as are missing have left.
    """
    taken = sum(len(ticket.images) for ticket in others)
    missing = taken + len(new.images) - most
    if missing <= 0:
        return
    for ticket, wait in sorted(foresee().items(), key=lambda each: each[1]):
        missing -= len(ticket.images)
        if missing <= 0:
            _refuse(f"The queue is full ({taken} of {most} images)", wait)


def check_seconds(
    new: Ticket,
    forecast: Mapping[Ticket, float],
    with_new: Mapping[Ticket, float],
    most: float,
    now: float,
    alone: float,
    caution: float,
) -> None:
    """Refuse what would be late, would make others late, or would make the queue too long.

    In this order: it would miss its deadline alone; it would among the others, taking `caution` times as long as
    forecast; it would make another one miss a deadline that is met without it, at half as much doubt; the queue would
    hold more than `most` seconds of work.

    Args:
        new: who wants in.
        forecast: who is in, and when they are likely to be done.
        with_new: the same with the new one among them.
        most: seconds of work in the queue.
        now: on the clock of the tickets.
        alone: seconds that the new one takes without company.
        caution: how many times longer than forecast it may take before a deadline is missed.

    Raises:
        Overloaded: with the seconds until it would fit.
        DeadlineExceeded: its deadline is too short even without company.
    """
    timeout = new.deadline - now
    if alone > timeout:
        raise DeadlineExceeded(
            f"The request takes about {in_seconds(alone)}, but its deadline is after {in_seconds(timeout)}; allow more "
            "time or ask for fewer steps or images."
        )
    late = with_new[new] - timeout / caution
    if late > 0:
        _refuse("The queue is too long for the request to meet its deadline", late)
    for ticket, before in forecast.items():
        # Half of it is for what has come since they were let in.
        late = now + with_new[ticket] * (1 + caution) / 2 - ticket.deadline
        if late > 0 and with_new[ticket] > before and now + before <= ticket.deadline:
            _refuse("The request would keep another one from meeting its deadline", late)
    total = max(with_new.values())
    if total > most:
        _refuse(f"The queue is full (about {total:.0f} of {most:.0f} seconds of work)", total - most)


def _refuse(why: str, wait: float) -> NoReturn:
    seconds = math.ceil(min(max(1.0, wait), LONGEST_WAIT))
    raise Overloaded(f"{why}; try again in {counted(seconds, 'second')}.", seconds)
