"""Many callers at once: our server beside KServe's, with the same weights and requests, alternating in one run.

``make bench`` runs it and writes ``results/load.md``, ``load.json`` and ``load.svg``. All servers are up all the time;
while one is measured the others wait idle. Medians are over the rounds, and so are the medians of their ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch

from app import cores
from clients.bench import Generator, Load, Mix, plot

RESULTS = Path(__file__).parent / "results"
OURS = "ours"
FAIR = "KServe, executor of one thread"
SERVERS = {
    OURS: ["-m", "app", "--model_id", "demo", "--model_name", "sdxl"],
    FAIR: ["-m", "tests.benchmarks.baseline", "--mode", "executor"],
    "KServe, synchronous predict": ["-m", "tests.benchmarks.baseline", "--mode", "naive"],
}
SLO = 10.0
COLUMNS = {
    "images_per_second": "images/s",
    "goodput": f"in {SLO:g} s, images/s",
    "p50": "p50, s",
    "p90": "p90, s",
    "p99": "p99, s",
    "health_p99_ms": "health p99, ms",
}


def start(stack: ExitStack, flags: list[str]) -> tuple[str, int]:
    """A server in a process of its own, ready: where it listens, and its process. It ends with `stack`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *flags, "--http_port", str(port)],
        env={**os.environ, "LOG_LEVEL": "error"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/v2/models/sdxl/ready").status_code == httpx.codes.OK:
                return url, process.pid
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the server {' '.join(flags)} ended with code {process.returncode}")


def median(loads: list[Load]) -> dict[str, float]:
    summaries = [load.summary(SLO) for load in loads]
    return {name: statistics.median(summary[name] for summary in summaries) for name in COLUMNS}


def ratios(servers: dict[str, list[Load]]) -> dict[str, list[float]]:
    """Of ours to `FAIR`, round by round: a machine that is slow for a while is so for both."""
    pairs = [
        (ours.summary(SLO), theirs.summary(SLO)) for ours, theirs in zip(servers[OURS], servers[FAIR], strict=True)
    ]
    return {name: [ours[name] / theirs[name] for ours, theirs in pairs] for name in ("images_per_second", "p50")}


def table(figures: dict[int, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| clients | server | " + " | ".join(COLUMNS.values()) + " |",
        "|--:|:--" + "|--:" * len(COLUMNS) + "|",
    ]
    for clients, servers in figures.items():
        for server, row in servers.items():
            cells = " | ".join(
                f"{row[name]:.2f}" if name != "health_p99_ms" else f"{row[name]:.0f}" for name in COLUMNS
            )
            lines.append(f"| {clients} | {server} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each server in each round")
    arguments = parser.parse_args()
    cores.share()  # all of them as ours does

    runs: dict[int, dict[str, list[Load]]] = {n: {name: [] for name in SERVERS} for n in arguments.clients}
    with ExitStack() as stack:
        urls = {name: start(stack, flags)[0] for name, flags in SERVERS.items()}
        for url in urls.values():
            asyncio.run(Generator(url, "sdxl").closed(1, 2.0, Mix(seed=1)))
        for clients in arguments.clients:
            for round_ in range(arguments.rounds):
                for name, url in urls.items():
                    load = asyncio.run(Generator(url, "sdxl").closed(clients, arguments.seconds, Mix(seed=round_)))
                    if not load.summary(SLO)["pictures"]:
                        raise SystemExit(f"{name} painted nothing: {load.summary(SLO)['errors']}")
                    runs[clients][name].append(load)
                    print(clients, name, load.summary(SLO), flush=True)
    figures = {n: {name: median(loads) for name, loads in servers.items()} for n, servers in runs.items()}
    write(figures, runs, arguments)


def write(measured: dict[int, dict[str, dict[str, float]]], runs: Any, arguments: argparse.Namespace) -> None:
    """Numbers of clients that were measured replace what was known of them; the others stay."""
    path = RESULTS / "load.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    of = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    known |= {
        str(clients): {"servers": servers, "ratios": ratios(runs[clients]), **of}
        for clients, servers in measured.items()
    }
    known = dict(sorted(known.items(), key=lambda item: int(item[0])))
    notes = [
        "Closed loop, 10 to 30 steps, mixed guidance and schedulers; medians of alternating rounds; "
        f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, the demo model. KServe's server "
        "runs the stock pipeline on the same weights."
    ]
    for clients, found in known.items():
        images, p50 = (found["ratios"][name] for name in ("images_per_second", "p50"))
        notes.append(
            f"{clients} {'client' if clients == '1' else 'clients'}, {found['rounds']} rounds of "
            f"{found['seconds']:g} s: in the median round {statistics.median(images):.2f} times the images of the "
            f"executor ({min(images):.2f} to {max(images):.2f}), p50 {statistics.median(p50):.2f} of its."
        )
    text = "\n\n".join((*notes, table({int(clients): found["servers"] for clients, found in known.items()})))
    (RESULTS / "load.md").write_text(text, encoding="utf-8")
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    most = max(runs)
    if most == max(map(int, known)):
        last = {name: loads[-1] for name, loads in runs[most].items()}
        plot(last, RESULTS / "load.svg")
    print(text)


if __name__ == "__main__":
    main()
