"""Twenty minutes of everything at once, and what it leaves behind: ``make soak``.

Callers of the three ways of asking (infer, streams with previews, binary) want pictures of several sizes and steps, and
a third of them leaves in the middle. Memory is read every second; its slope is fitted after a warm-up of a fifth of the
time, once to all that was read and once to the least of each minute: what is held when the C library has just given
back the holes that pictures of mixed sizes leave. Writes ``results/soak.md`` and ``soak.svg``.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from tests.benchmarks.load import OURS, RESULTS, SERVERS, start

CALLERS = 12
SIZES = ((128, 128), (64, 64), (96, 160), (128, 64))
EVERY = 1.0
"""Seconds between two looks at memory."""
WARM_UP = 0.2
"""Share of the time in which memory may grow: caches fill, and the allocator learns what is wanted."""


async def caller(
    client: httpx.AsyncClient, rng: random.Random, until: float, outcomes: collections.Counter[str]
) -> None:
    while time.monotonic() < until:
        width, height = rng.choice(SIZES)
        parameters: dict[str, Any] = {
            "num_inference_steps": rng.randint(2, 30),
            "guidance_scale": rng.choice((1.0, 5.0)),
            "scheduler": rng.choice(("Euler", "DPM++ 2M Karras", "DDIM", "Euler a")),
            "width": width,
            "height": height,
            "seed": rng.randrange(2**32),
        }
        prompt = f"a red circle on a white background, {rng.randrange(10**9)}"
        ask = rng.choice((infer, stream))
        patience = rng.uniform(0.05, 1.0) if rng.random() < 1 / 3 else 300.0
        try:
            outcomes[await asyncio.wait_for(ask(client, prompt, parameters), patience)] += 1
        except TimeoutError:
            outcomes["left"] += 1


async def infer(client: httpx.AsyncClient, prompt: str, parameters: dict[str, Any]) -> str:
    body = {
        "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [prompt]}],
        "parameters": {**parameters, "binary_data_output": parameters["seed"] % 2 == 0},
    }
    answer = await client.post("/v2/models/sdxl/infer", json=body)
    return "picture" if answer.status_code == httpx.codes.OK else str(answer.status_code)


async def stream(client: httpx.AsyncClient, prompt: str, parameters: dict[str, Any]) -> str:
    body = {"prompt": prompt, **parameters, "preview": "latents", "preview_every": 5}
    last = ""
    async with client.stream("POST", "/v2/models/sdxl/generate_stream", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                last = line.removeprefix("event: ")
    return "picture" if last == "done" else f"stream ended with {last or answer.status_code}"


async def look(client: httpx.AsyncClient, pid: int, until: float) -> list[tuple[float, float]]:
    """Seconds and MiB of resident memory."""
    began = time.monotonic()
    seen: list[tuple[float, float]] = []
    while (now := time.monotonic()) < until:
        seen.append((now - began, resident(pid)))
        await client.get("/v2/health/live")
        await asyncio.sleep(EVERY)
    return seen


def resident(pid: int) -> float:
    """MiB that the process holds in memory."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def slope(seen: list[tuple[float, float]]) -> float:
    """MiB an hour, fitted."""
    seconds, memory = np.array(seen).T
    return float(np.polyfit(seconds, memory, 1)[0] * 3600)


def least_of_each_minute(seen: list[tuple[float, float]]) -> list[tuple[float, float]]:
    minutes = itertools.groupby(seen, key=lambda point: point[0] // 60)
    return [min(points, key=lambda point: point[1]) for _, points in minutes]


async def run(url: str, pid: int, seconds: float) -> tuple[collections.Counter[str], list[tuple[float, float]]]:
    outcomes: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits) as client:
        callers = [caller(client, random.Random(seed), until, outcomes) for seed in range(CALLERS)]
        memory = asyncio.create_task(look(client, pid, until))
        await asyncio.gather(memory, *callers)
    return outcomes, memory.result()


def unfinished(url: str) -> float:
    """Images that the server still counts as pending or running."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("sdxl_pending_images", "sdxl_running_images", "sdxl_open_streams")
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url, pid = start(stack, SERVERS[OURS])
        outcomes, seen = asyncio.run(run(url, pid, 60 * arguments.minutes))
        for _ in itertools.takewhile(lambda _: unfinished(url), range(100)):
            time.sleep(0.1)
        left = unfinished(url)
    late = [point for point in seen if point[0] >= WARM_UP * seen[-1][0]]
    slopes = f"{slope(late):+.1f} MiB an hour, {slope(least_of_each_minute(late)):+.1f} for the least of each minute"
    told = ", ".join(f"{count:,} × {outcome}" for outcome, count in outcomes.most_common())
    text = (
        f"{arguments.minutes:g} minutes, {CALLERS} callers of four sizes, 2 to 30 steps, streams with previews among "
        f"them, a third leaving in the middle: {told}. Memory {seen[0][1]:.0f} MiB at the start, "
        f"{max(point[1] for point in seen):.0f} at most, {seen[-1][1]:.0f} at the end; after the warm-up {slopes}. "
        f"Images and streams left over: {left:.0f}.\n"
    )
    (RESULTS / "soak.md").write_text(text, encoding="utf-8")
    plot(seen, RESULTS / "soak.svg")
    print(text)


def plot(seen: list[tuple[float, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    seconds, memory = np.array(seen).T
    axes.plot(seconds / 60, memory, linewidth=0.8)
    lowest, least = np.array(least_of_each_minute(seen)).T
    axes.plot(lowest / 60, least, marker="o", markersize=3, label="least of each minute")
    axes.axvline(WARM_UP * seconds[-1] / 60, color="grey", linestyle=":", label="end of the warm-up")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB")
    axes.set_ylim(0, 1.1 * memory.max())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
