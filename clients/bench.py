"""Load for a server that speaks the Open Inference Protocol v2: how many pictures, how late, how many in time.

``python -m clients.bench --clients 8`` asks in a closed loop: each of eight callers sends its next request when it has
its picture. ``--rate 2`` asks in an open loop: requests are due at random times (a Poisson process), two a second on
average, whether the server keeps up or not, and a latency counts from when its request was due. The requests are a
seeded mix of steps, guidance and schedulers. Knows nothing of our server but the protocol.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from clients.client import parse_url
from clients.errors import UnreachableError

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
GUIDANCE = (1.0, 3.0, 5.0, 7.5)
SCHEDULERS = ("Euler", "Euler a", "DPM++ 2M Karras", "DDIM")
PROBE_SECONDS = 0.05
"""Pause between two questions for health."""
PAUSE = 1.0
"""Seconds after an error for which nobody says how long to wait; callers would ask thousands of times otherwise."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What is asked for.

    Attributes:
        steps: fewest and most denoising steps.
        guidance: scales to choose from.
        schedulers: names to choose from.
        seed: of the choices; equal seeds give equal requests in equal order.
    """

    steps: tuple[int, int] = (10, 30)
    guidance: Sequence[float] = GUIDANCE
    schedulers: Sequence[str] = SCHEDULERS
    seed: int = 0

    def requests(self) -> Iterator[dict[str, Any]]:
        """Endless bodies of infer calls."""
        rng = random.Random(self.seed)
        while True:
            colour, background = rng.sample(COLOURS, 2)
            prompt = f"a {colour} {rng.choice(SHAPES)} on a {background} background"
            yield {
                "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [prompt]}],
                "parameters": {
                    "num_inference_steps": rng.randint(*self.steps),
                    "guidance_scale": rng.choice(self.guidance),
                    "scheduler": rng.choice(self.schedulers),
                    "seed": rng.randrange(2**32),
                },
            }


@dataclass(slots=True)
class Load:
    """What one run saw.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: seconds of each picture, from when it was due.
        errors: requests without a picture, by status or kind of error.
        probes: seconds of each question for health; a probe without an answer counts as its timeout.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    probes: list[float] = field(default_factory=list)

    def summary(self, slo: float) -> dict[str, Any]:
        """The figures that people compare.

        Args:
            slo: seconds within which a picture is in time.
        """
        return {
            "pictures": len(self.latencies),
            "seconds": round(self.seconds, 2),
            "images_per_second": round(len(self.latencies) / self.seconds, 3),
            "goodput": round(sum(latency <= slo for latency in self.latencies) / self.seconds, 3),
            **{f"p{cut}": percentile(self.latencies, cut) for cut in (50, 90, 99)},
            "health_p99_ms": percentile([1000 * seconds for seconds in self.probes], 99),
            "errors": dict(self.errors),
        }


def percentile(values: Sequence[float], cut: int) -> float | None:
    """Of a few values too, to a thousandth; ``None`` of none."""
    if len(values) < 2:
        return round(values[0], 3) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[cut - 1], 3)


class Generator:
    """Sends load to one server.

    Args:
        url: of the server, without a path.
        model: its name there.
        timeout: seconds after which a request counts as lost.
        api_key: sent with every request, where the server wants one.
    """

    def __init__(self, url: str, model: str, timeout: float = 600.0, api_key: str | None = None) -> None:
        self._path = f"/v2/models/{model}/infer"
        self._settings: dict[str, Any] = {
            "base_url": url,
            "timeout": timeout,
            "limits": httpx.Limits(max_connections=None),
            "headers": {"Authorization": f"Bearer {api_key}".encode()} if api_key else {},
        }

    async def closed(self, clients: int, seconds: float, mix: Mix) -> Load:
        """`clients` callers, each with one request at a time; what is under way at the end is waited for."""
        requests = mix.requests()

        async def caller(client: httpx.AsyncClient, load: Load, start: float) -> None:
            end = start + seconds
            while (now := time.perf_counter()) < end:
                pause = await self._ask(client, next(requests), now, load)
                # Nobody asks again after the end.
                await asyncio.sleep(min(pause, end - time.perf_counter()))

        return await self._run(lambda *run: [caller(*run) for _ in range(clients)])

    async def open(self, rate: float, seconds: float, mix: Mix) -> Load:
        """Requests due at random times, `rate` a second on average."""
        rng = random.Random(mix.seed)
        due: list[float] = []
        moment = rng.expovariate(rate)
        while moment < seconds:
            due.append(moment)
            moment += rng.expovariate(rate)
        bodies = mix.requests()

        async def caller(client: httpx.AsyncClient, load: Load, when: float, body: dict[str, Any]) -> None:
            await asyncio.sleep(max(0.0, when - time.perf_counter()))
            await self._ask(client, body, when, load)  # only once: nobody waits for a second try

        return await self._run(
            lambda client, load, start: [caller(client, load, start + moment, next(bodies)) for moment in due]
        )

    async def _run(self, callers: Callable[[httpx.AsyncClient, Load, float], Sequence[Awaitable[None]]]) -> Load:
        load = Load()
        async with httpx.AsyncClient(**self._settings) as client, httpx.AsyncClient(**self._settings) as prober:
            probing = asyncio.create_task(self._probe(prober, load))
            started = time.perf_counter()
            await asyncio.gather(*callers(client, load, started))
            load.seconds = time.perf_counter() - started
            probing.cancel()
        return load

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any], due: float, load: Load) -> float:
        """Seconds after which the caller may ask again."""
        try:
            answer = await client.post(self._path, json=body)
        except httpx.HTTPError as error:
            load.errors[type(error).__name__] += 1
            return PAUSE
        if answer.status_code == httpx.codes.OK:
            load.latencies.append(time.perf_counter() - due)
            return 0.0
        load.errors[str(answer.status_code)] += 1
        with contextlib.suppress(ValueError):  # a date
            return float(answer.headers.get("Retry-After", PAUSE))
        return PAUSE

    async def _probe(self, client: httpx.AsyncClient, load: Load) -> None:
        while True:
            started = time.perf_counter()
            try:
                await client.get("/v2/health/live")
            except httpx.HTTPError as error:
                load.errors[f"probe {type(error).__name__}"] += 1
            load.probes.append(time.perf_counter() - started)
            await asyncio.sleep(PROBE_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m clients.bench", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="sdxl")
    parser.add_argument("--api_key")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--clients", type=int, default=8, help="closed loop: callers with one request each")
    loop.add_argument("--rate", type=positive, help="open loop: requests a second on average")
    parser.add_argument("--seconds", type=positive, default=30.0, help="how long to send requests")
    parser.add_argument("--steps", type=int, nargs=2, default=(10, 30), help="fewest and most denoising steps")
    parser.add_argument(
        "--schedulers", nargs="+", default=SCHEDULERS, metavar="NAME", help="to choose from; FLUX has Euler and Heun"
    )
    parser.add_argument("--slo", type=positive, default=10.0, help="seconds within which a picture is in time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--plot", type=Path, help="picture of the latencies (needs matplotlib)")
    given = parser.parse_args(arguments)

    if given.clients < 1:
        parser.error(f"--clients must be 1 or more, not {given.clients}")
    fewest, most = given.steps
    if not 1 <= fewest <= most:
        parser.error(f"--steps must be the fewest, from 1, and then the most, not {fewest} {most}")
    try:
        parse_url(given.url)
    except UnreachableError as error:
        parser.error(f"--url {error}")

    generator = Generator(given.url, given.model, api_key=given.api_key)
    mix = Mix(steps=(fewest, most), schedulers=given.schedulers, seed=given.seed)
    if given.rate is not None:
        load = asyncio.run(generator.open(given.rate, given.seconds, mix))
    else:
        load = asyncio.run(generator.closed(given.clients, given.seconds, mix))
    summary = load.summary(given.slo)
    print(json.dumps(summary, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps({"summary": summary, **asdict(load)}, indent=2) + "\n", encoding="utf-8")
    if given.plot is not None:
        plot({"this run": load}, given.plot)
    return 0 if load.latencies else 1


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def plot(loads: dict[str, Load], path: Path) -> None:
    """The share of pictures that came within each latency, a line for each run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, load in loads.items():
        latencies = sorted(load.latencies)
        shares = [100 * (i + 1) / len(latencies) for i in range(len(latencies))]
        axes.step(latencies, shares, where="post", label=name)
    axes.set(xlabel="seconds from when the request was due", ylabel="pictures, %", ylim=(0, 100))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(loads), frameon=False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
