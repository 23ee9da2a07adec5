"""The load generator: latencies from when a request was due, errors by kind, figures that add up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clients.bench import Generator, Load, Mix, main, percentile


class Scripted:
    """A server that answers infer calls with the given statuses in turn, `delay` seconds after they came."""

    def __init__(self, statuses: list[int], delay: float = 0.0, retry_after: str = "0") -> None:
        self.retry_after = retry_after
        self.statuses = itertools.cycle(statuses)
        self.delay = delay
        self.bodies: list[dict[str, Any]] = []
        self.together = 0
        self.most_together = 0
        self.connections: set[asyncio.Task[None] | None] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(asyncio.current_task())
        # A client that has what it wants may reset the connection instead of closing it.
        with contextlib.suppress(ConnectionError):
            await self._converse(reader, writer)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            length = 0
            while (header := await reader.readline()).strip():
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = await reader.readexactly(length)
            status = 200
            if b"/infer" in line:
                self.bodies.append(json.loads(body))
                self.together += 1
                self.most_together = max(self.most_together, self.together)
                await asyncio.sleep(self.delay)
                self.together -= 1
                status = next(self.statuses)
            headers = f"Content-Length: 0\r\nRetry-After: {self.retry_after}"
            writer.write(f"HTTP/1.1 {status} X\r\n{headers}\r\n\r\n".encode())
            await writer.drain()
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def serving(scripted: Scripted) -> AsyncIterator[str]:
    server = await asyncio.start_server(scripted, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*filter(None, scripted.connections))


async def test_a_closed_loop_has_as_many_requests_under_way_as_callers() -> None:
    scripted = Scripted([200], delay=0.02)
    async with serving(scripted) as url:
        load = await Generator(url, "m").closed(3, 0.5, Mix())
    assert scripted.most_together == 3
    assert len(load.latencies) == len(scripted.bodies) >= 3
    assert min(load.latencies) >= 0.02 and not load.errors and load.probes


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    scripted = Scripted([200], delay=0.3)
    async with serving(scripted) as url:
        load = await Generator(url, "m").open(40.0, 0.5, Mix())
    assert scripted.most_together > 3
    assert len(load.latencies) == len(scripted.bodies)
    assert min(load.latencies) >= 0.3


@pytest.mark.parametrize("retry_after", ["300", "Wed, 21 Oct 2026 07:28:00 GMT"])
async def test_an_open_loop_is_over_with_its_last_answer(retry_after: str) -> None:
    """Nobody there asks a second time, so that nobody waits until he may."""
    scripted = Scripted([429], retry_after=retry_after)
    async with serving(scripted) as url, asyncio.timeout(60):
        load = await Generator(url, "m").open(40.0, 0.5, Mix())
    assert load.errors["429"] == len(scripted.bodies) > 0


async def test_a_closed_loop_waits_as_it_is_told() -> None:
    scripted = Scripted([429], retry_after="0.2")
    async with serving(scripted) as url:
        load = await Generator(url, "m").closed(1, 0.5, Mix())
    assert 1 <= load.errors["429"] <= 3


async def test_a_closed_loop_does_not_wait_to_ask_after_its_end() -> None:
    """What nobody does then would count as time in which nothing was painted."""
    scripted = Scripted([200, 429], retry_after="300")
    async with serving(scripted) as url, asyncio.timeout(60):
        load = await Generator(url, "m").closed(1, 0.5, Mix())
    assert load.errors["429"] == 1 and load.seconds < 30


async def test_errors_are_counted_by_kind_and_no_picture_of_them() -> None:
    scripted = Scripted([200, 429, 500])
    async with serving(scripted) as url:
        load = await Generator(url, "m").closed(1, 0.3, Mix())
    assert set(load.errors) == {"429", "500"}
    assert len(load.latencies) + sum(load.errors.values()) == len(scripted.bodies)


async def test_a_server_that_is_not_there_is_an_error_and_neither_a_hang_nor_asked_all_the_time() -> None:
    load = await Generator("http://127.0.0.1:9", "m").closed(1, 0.5, Mix())
    assert load.errors["ConnectError"] == 1 and not load.latencies


def test_equal_seeds_ask_for_equal_pictures_and_stay_within_the_mix() -> None:
    first, again, other = (list(itertools.islice(Mix(seed=seed).requests(), 50)) for seed in (3, 3, 4))
    assert first == again != other
    for body in first:
        assert 10 <= body["parameters"]["num_inference_steps"] <= 30


def test_figures_add_up() -> None:
    load = Load(seconds=10.0, latencies=[1.0, 2.0, 3.0, 14.0], probes=[0.001] * 99 + [0.1])
    load.errors["429"] += 2
    summary = load.summary(slo=10.0)
    assert (summary["pictures"], summary["images_per_second"], summary["goodput"]) == (4, 0.4, 0.3)
    assert (summary["p50"], summary["errors"]) == (2.5, {"429": 2})


@pytest.mark.parametrize(("values", "expected"), [([], None), ([2.0], 2.0), ([1.0, 3.0], 2.0)])
def test_percentiles_of_few_values(values: list[float], expected: float | None) -> None:
    assert percentile(values, 50) == expected


async def test_the_command_line_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.svg")]
    async with serving(Scripted([200])) as url:
        asked = ["--url", url, "--api_key", "schlüssel", "--seconds", "0.2", "--clients", "2", *files]
        code = await asyncio.to_thread(main, asked)
    assert code == 0
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["summary"] == json.loads(capsys.readouterr().out)
    assert len(written["latencies"]) == written["summary"]["pictures"] > 0
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


async def test_only_schedulers_that_the_model_has_are_asked_for() -> None:
    scripted = Scripted([200])
    async with serving(scripted) as url:
        await asyncio.to_thread(main, ["--url", url, "--seconds", "0.3", "--schedulers", "Euler", "Heun"])
    assert {body["parameters"]["scheduler"] for body in scripted.bodies} == {"Euler", "Heun"}


@pytest.mark.parametrize("value", ["0", "nan", "inf"])
@pytest.mark.parametrize("flag", ["--rate", "--seconds", "--slo"])
def test_a_run_that_means_nothing_or_does_not_end_is_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--url", "http://127.0.0.1:9", flag, value])
    assert "must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--clients 0", "--steps 5 2", "--steps 0 2", "--url localhost:8080"])
def test_a_run_of_nobody_or_of_no_steps_or_nowhere_is_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--url", "http://127.0.0.1:9", "--seconds", "0.1", *flags.split()])
    flag, *_ = flags.split()
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m clients.bench: error: {flag}")
