"""How a start is told: every second belongs to one phase, and counting begins with the process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time

import pytest

from app.start import PHASES, Timeline, importing, process_began
from app.telemetry import Telemetry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_every_second_belongs_to_one_phase(clock: Clock) -> None:
    timeline = Timeline(98.0, clock)  # two seconds before anybody could count them
    for phase, seconds in (("read", 0.1), ("device", 0.0), ("read", 0.3), ("warm_up", 0.9)):
        clock.now += 0.5  # between phases
        with timeline.phase(phase):
            clock.now += seconds
    assert timeline.seconds == pytest.approx({"import": 4.0, "read": 0.4, "device": 0.0, "warm_up": 0.9})
    assert timeline.total == pytest.approx(clock.now - 98.0)
    assert str(timeline) == "import 4.0, read 0.4, to device 0.0, warm up 0.9"


def test_a_phase_inside_a_phase_counts_for_itself(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    with timeline.phase("warm_up"):
        clock.now += 1
        with timeline.phase("compile"):
            clock.now += 10
        clock.now += 2
    assert timeline.seconds == {"import": 0.0, "warm_up": 3.0, "compile": 10.0}
    assert str(timeline) == "import 0.0, compile 10.0, warm up 3.0"


def test_a_phase_that_fails_has_taken_its_time_all_the_same(clock: Clock) -> None:
    timeline = Timeline(clock=clock)
    with pytest.raises(ValueError, match="no"), timeline.phase("read"):
        clock.now += 3
        raise ValueError("no")
    with timeline.phase("device"):
        pass
    assert timeline.seconds == {"import": 0.0, "read": 3.0, "device": 0.0}


def test_metrics_tell_every_phase() -> None:
    telemetry = Telemetry("m")
    telemetry.started(5.5, {"import": 4.0, "warm_up": 1.5})
    value = telemetry.registry.get_sample_value
    assert value("sdxl_model_load_seconds", {"model_name": "m"}) == 5.5
    told = {phase: value("sdxl_start_seconds", {"model_name": "m", "phase": phase}) for phase in PHASES}
    assert told == {"import": 4.0, "read": 0.0, "device": 0.0, "compile": 0.0, "warm_up": 1.5}


def test_a_process_knows_when_it_began() -> None:
    code = "import time; time.sleep(0.3); from app.start import process_began; print(process_began())"
    before = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # The system counts in hundredths of a second.
    assert before - 0.02 <= float(said) <= time.monotonic() - 0.3 + 0.02
    assert process_began() < before


def test_what_is_imported_is_left_out_when_garbage_is_looked_for() -> None:
    code = (
        "import gc, json, sys; from app.start import importing\n"
        "with importing('http.client'):\n"
        "    inside = gc.isenabled(); import http.client\n"
        "frozen = gc.get_freeze_count()\n"
        "with importing('http.client'):\n"
        "    again = gc.isenabled()\n"
        "print(json.dumps([inside, gc.isenabled(), again, frozen > 1000, gc.get_freeze_count() == frozen]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == [False, True, True, True, True]


def test_a_library_that_cannot_be_imported_leaves_the_search_for_garbage_on() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), importing("no_such_library"):
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() >= frozen
    gc.unfreeze()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_is_heard_while_the_command_is_imported(number: str) -> None:
    """The first process of a container would miss it otherwise, and be killed after the grace period."""
    code = (
        "import os, signal, sys, app.start, app.__main__\n"
        f"def importing(library): os.kill(os.getpid(), signal.{number})\n"
        "app.start.importing, sys.argv = importing, ['sdxl-runtime', '--model_id', 'demo']\n"
        "sys.exit(app.__main__.main())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
