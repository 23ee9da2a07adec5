"""Two minutes of three times as many requests as the server can paint: ``python -m tests.benchmarks.overload``.

What it can paint is measured first, with eight callers. Then requests come at random times, each with a deadline; who
is refused stays away. Writes ``results/overload.md``.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from clients.bench import Generator, Mix
from tests.benchmarks.load import OURS, RESULTS, SERVERS, start
from tests.benchmarks.soak import resident, unfinished

DEADLINE = 10.0
ANSWERS = {"429", "503", "504"}
"""What a request that gets no picture may get."""


class Impatient(Mix):
    """The usual mix, with a deadline on each request."""

    def requests(self) -> Iterator[dict[str, Any]]:
        for body in super().requests():
            body["parameters"]["timeout"] = int(DEADLINE * 1e6)
            yield body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--times", type=float, default=3.0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url, pid = start(stack, SERVERS[OURS])
        generator = Generator(url, "sdxl")
        capacity = asyncio.run(generator.closed(8, 15.0, Mix())).summary(DEADLINE)["images_per_second"]
        before = resident(pid)
        load = asyncio.run(generator.open(arguments.times * capacity, arguments.seconds, Impatient(seed=1)))
        after, left = resident(pid), unfinished(url)
    summary = load.summary(DEADLINE)
    others = {name: count for name, count in load.errors.items() if name not in ANSWERS}
    late = sum(latency > DEADLINE for latency in load.latencies)
    refused = ", ".join(f"{count:,} got {name}" for name, count in sorted(load.errors.items()))
    text = (
        f"{arguments.times:g} times the {capacity:.1f} images/s that eight callers get, for {arguments.seconds:g} s, "
        f"each with a deadline of {DEADLINE:g} s: {len(load.latencies):,} pictures "
        f"({summary['images_per_second']:.1f}/s), p50 {summary['p50']:.2f} s, p99 {summary['p99']:.2f} s, {late} of "
        f"them after their deadline; {refused}; {sum(others.values())} requests got anything else. "
        f"`/v2/health/live` p99 {summary['health_p99_ms']:.0f} ms. "
        f"Memory {before:.0f} MiB before and {after:.0f} MiB after; images left over: {left:.0f}.\n"
    )
    (RESULTS / "overload.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
