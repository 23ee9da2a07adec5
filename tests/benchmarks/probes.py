"""How fast ``/v2/health/live`` answers while eight requests run: ``make bench``, table in ``results/probes.md``."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import httpx

from tests.benchmarks.solo import PROMPT, serve

RESULTS = Path(__file__).parent / "results" / "probes.md"
REQUESTS = 8
ROUNDS = 6


async def measure(url: str) -> list[float]:
    """Seconds of every probe, asked every 10 ms while `REQUESTS` pictures of 50 steps are painted, over and over."""
    inputs = [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}]
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for _ in range(ROUNDS):
            posts = [client.post("/v2/models/sdxl/infer", json={"inputs": inputs}) for _ in range(REQUESTS)]
            load = asyncio.gather(*posts)
            while not load.done():
                started = time.perf_counter()
                (await client.get("/v2/health/live")).raise_for_status()
                seconds.append(time.perf_counter() - started)
                await asyncio.sleep(0.01)
            for answer in await load:
                answer.raise_for_status()
    return seconds


def main() -> None:
    server, url = serve()
    seconds = asyncio.run(measure(url))
    server.should_exit = True
    cuts = statistics.quantiles(seconds, n=100)
    row = " | ".join(f"{1000 * value:.1f}" for value in (cuts[49], cuts[89], cuts[98], max(seconds)))
    table = f"| probes | p50, ms | p90, ms | p99, ms | max, ms |\n|--:|--:|--:|--:|--:|\n| {len(seconds)} | {row} |\n"
    note = (
        f"{REQUESTS} requests of 50 steps at a time, {ROUNDS} times; the prober shares the server's process and cores."
    )
    RESULTS.write_text(f"{note}\n\n{table}", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
