"""Whose turn it is: pure rules over images that are under way. Knows no clock, no thread and no device.

A request is due when it has waited `PATIENCE` times as long as it would take alone, or halfway to its deadline,
whichever comes first; its priority stretches or shrinks that time. Who is due first goes first, and takes along whoever
may share the forward pass. A request's due time is fixed when it is accepted, and every later one is due after its own
acceptance, so nobody is overtaken for ever: short requests pass long ones, but none passes one that has waited its
time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from app.engine.ticket import Image
from app.generation import DEFAULT_PRIORITY

PATIENCE = 4.0


def due(accepted: float, alone: float, timeout: float, priority: int = DEFAULT_PRIORITY) -> float:
    """By when a request should be done.

    Args:
        accepted: when.
        alone: seconds that it would take with the device for itself.
        timeout: seconds from acceptance to its deadline.
        priority: each level less urgent doubles the time.
    """
    return accepted + min(PATIENCE * alone * 2.0 ** (priority - DEFAULT_PRIORITY), timeout / 2)


def urgency(image: Image) -> tuple[float, int, int, int]:
    """A key to sort by: least first. Shortest remaining work breaks ties, then who came first."""
    ticket = image.ticket
    return ticket.due, image.remaining, ticket.number, image.index


def choose(
    images: Iterable[Image],
    signature: Callable[[Image], Hashable],
    rows: Callable[[Image], int],
    most_rows: int,
    most_load: float,
    stay: Hashable = None,
) -> list[Image]:
    """The images of the next forward pass: the most urgent one, and the most urgent of those that may share it.

    Args:
        images: that need a step.
        signature: of an image; only equal ones share a pass.
        rows: that an image brings.
        most_rows: of a pass; one image may always go.
        most_load: pixels times rows of a pass; one image may always go.
        stay: the signature to keep to while any image has it, where changing is costly.
    """
    ordered = sorted(images, key=urgency)
    if not ordered:
        return []
    signatures = {image: signature(image) for image in ordered}
    turn = stay if stay is not None and stay in signatures.values() else signatures[ordered[0]]
    candidates = [image for image in ordered if signatures[image] == turn]
    return fill(candidates, rows, most_rows, most_load)


def fill(candidates: Sequence[Image], rows: Callable[[Image], int], most_rows: int, most_load: float) -> list[Image]:
    """As many of `candidates` as there is room for, in order; the first one in any case."""
    chosen: list[Image] = []
    taken, load = 0, 0.0
    for image in candidates:
        more = rows(image)
        if chosen and (taken + more > most_rows or load + more * image.size > most_load):
            continue
        chosen.append(image)
        taken += more
        load += more * image.size
    return chosen
