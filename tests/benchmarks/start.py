"""How long a start takes: from a new process to the ready demo, beside a bare import of torch and diffusers.

``make bench`` runs it and writes ``results/start.md`` and ``results/start.json``. Both sides are new processes, one
after the other, on a machine that has read their files before. CPU seconds stand beside the seconds that passed, as
they tell more on a machine that has other things to do. At last, two starts with ``--optimize compile``: one that
compiles, and one that finds in ``--cache_dir`` what the first has kept.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch

from app.start import PHASES

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
BARE = (sys.executable, "-c", "import torch, diffusers")
SERVE = (sys.executable, "-m", "app", "--model_id", "demo", "--model_name", "sdxl", "--host", "127.0.0.1")
POLL_SECONDS = 0.02
PATIENCE = 1800.0
"""Seconds; compiling takes minutes."""
PHASE = re.compile(r'^sdxl_start_seconds\{.*phase="(\w+)".*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Took:
    """What something took, in seconds: that passed, and of all cores."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Round:
    """One start of each side.

    Attributes:
        bare: importing torch and diffusers, until that process has ended.
        live: until the server answered that it is alive.
        ready: until it answered that its model is ready.
        phases: what the server itself says about its start, seconds by phase.
    """

    bare: Took
    live: Took
    ready: Took
    phases: Mapping[str, float]


def import_bare() -> Took:
    began = time.perf_counter()
    process = subprocess.Popen(BARE, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    took = Took(time.perf_counter() - began, usage.ru_utime + usage.ru_stime)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{BARE[-1]} failed")
    return took


def start_server(*flags: str) -> tuple[Took, Took, dict[str, float]]:
    """Until the server is live, until it is ready, and what it says about that."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen([*SERVE, *flags, "--http_port", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:

        def until(path: str) -> Took:
            while ask(port, path) is None:
                if process.poll() is not None or time.perf_counter() - began > PATIENCE:
                    raise RuntimeError("the server does not start")
                time.sleep(POLL_SECONDS)
            return Took(time.perf_counter() - began, cpu_seconds(process.pid))

        live, ready = until("/v2/health/live"), until("/v2/health/ready")
        return live, ready, read_phases(ask(port, "/metrics") or "")
    finally:
        process.terminate()
        process.wait()


def start_compiled() -> tuple[Took, Took]:
    """Until the server is ready: the first time, and the second."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (start_server("--optimize", "compile", "--cache_dir", folder)[1] for _ in range(2))
    return first, second


def ask(port: int, path: str) -> str | None:
    """What the server answers, if it is 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return text if answer.status == http.HTTPStatus.OK else None


def cpu_seconds(pid: int) -> float:
    """Of a process that runs, user and system.

    Source: proc(5), fields 14 and 15 of ``/proc/PID/stat``.
    """
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_phases(exposition: str) -> dict[str, float]:
    return {phase: float(seconds) for phase, seconds in PHASE.findall(exposition)}


def median(rounds: Sequence[Round], side: str) -> Took:
    each = [getattr(one, side) for one in rounds]
    return Took(statistics.median(took.wall for took in each), statistics.median(took.cpu for took in each))


def table(rounds: Sequence[Round]) -> str:
    """Medians, and their ratios to the bare import's."""
    bare = median(rounds, "bare")
    rows = [
        ("`import torch, diffusers`, to the end of that process", bare),
        ("live: `/v2/health/live` answers 200", median(rounds, "live")),
        ("ready: `/v2/health/ready` answers 200", median(rounds, "ready")),
    ]
    lines = ["| from a new process to | seconds | ratio | CPU seconds | ratio |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {name} | {took.wall:.2f} | {took.wall / bare.wall:.2f} | {took.cpu:.2f} | {took.cpu / bare.cpu:.2f} |"
        for name, took in rows
    ]
    phases = {phase: statistics.median(one.phases[phase] for one in rounds) for phase in PHASES}
    told = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
    return "\n".join([*lines, "", f"What `sdxl_start_seconds` says of the same starts: {told}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="starts of each side")
    arguments = parser.parse_args()

    import_bare()  # so that all files have been read once
    rounds = []
    for index in range(arguments.rounds):
        # Who goes first alternates, so that what else goes on meets both.
        if index % 2:
            live, ready, phases = start_server()
            bare = import_bare()
        else:
            bare = import_bare()
            live, ready, phases = start_server()
        rounds.append(Round(bare, live, ready, phases))
        print(f"bare {bare.wall:.2f}, live {live.wall:.2f}, ready {ready.wall:.2f} s", flush=True)
    machine = (
        f"{os.cpu_count()} cores, torch {torch.__version__}, diffusers {diffusers.__version__}, Python "
        f"{platform.python_version()}"
    )
    first, second = start_compiled()
    compiled = (
        f"With `--optimize compile` ready after {first.wall:.0f} s, and after {second.wall:.0f} s the second time, "
        "from `--cache_dir`."
    )
    note = f"Medians of {len(rounds)} alternating pairs of new processes, demo model, {machine}."
    RESULTS.joinpath("start.md").write_text(f"{note}\n\n{table(rounds)}\n\n{compiled}\n", encoding="utf-8")
    record = {
        "machine": machine,
        "rounds": [asdict(one) for one in rounds],
        "compiled": {"first": asdict(first), "second": asdict(second)},
    }
    RESULTS.joinpath("start.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(rounds), compiled, sep="\n\n")


if __name__ == "__main__":
    main()
