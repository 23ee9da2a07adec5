"""The benchmark of the start: medians, ratios and what the server's metrics say."""

from __future__ import annotations

import os
import time

import pytest

from app.start import PHASES
from app.telemetry import Telemetry
from tests.benchmarks.start import Round, Took, cpu_seconds, median, read_phases, table


def a_round(bare: float, ready: float, read: float) -> Round:
    return Round(
        Took(bare, bare / 2), Took(0.5, 0.4), Took(ready, 2 * ready), dict.fromkeys(PHASES, 0.0) | {"read": read}
    )


ROUNDS = [a_round(2.0, 3.0, 0.1), a_round(4.0, 5.0, 0.3), a_round(2.5, 9.0, 0.2)]


def test_medians_are_taken_of_each_side_and_kind_of_seconds() -> None:
    assert median(ROUNDS, "bare") == Took(2.5, 1.25)
    assert median(ROUNDS, "ready") == Took(5.0, 10.0)


def test_ratios_are_those_of_the_medians() -> None:
    text = table(ROUNDS)
    assert "| 2.50 | 1.00 | 1.25 | 1.00 |" in text
    assert "| 0.50 | 0.20 | 0.40 | 0.32 |" in text
    assert "| 5.00 | 2.00 | 10.00 | 8.00 |" in text
    assert text.endswith("import 0.00, read 0.20, device 0.00, compile 0.00, warm_up 0.00.")


def test_phases_are_read_as_the_server_tells_them() -> None:
    telemetry = Telemetry("sdxl")
    phases = {phase: float(index) for index, phase in enumerate(PHASES)}
    telemetry.started(10.0, phases)
    assert read_phases(telemetry.exposition().decode()) == phases


def test_cpu_seconds_are_those_of_the_process() -> None:
    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.1)
