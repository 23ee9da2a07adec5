"""What a device can do at best, and how it fares meanwhile: its matrix rate, its clocks, power and temperature."""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import time
from typing import Any

import torch

ROUNDS = 10
QUERY = {"clocks.sm": "clock_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c"}
"""What nvidia-smi is asked for, and what it is called here."""


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two large square matrices of noise, the median of ten rounds."""
    cuda = device.type == "cuda"
    side, products = (8192, 20) if cuda else (256, 4)
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(one)
    seconds = []
    # The first round picks kernels and brings the clocks up.
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(one, other, out=result)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - started) / products)
    return 2 * side**3 / statistics.median(seconds[1:]) / 1e12


class Log:
    """The GPU's clocks, power and temperature, twice a second for as long as it is open; nothing without nvidia-smi."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self.summary: dict[str, dict[str, float]] | None = None
        """The least, the middle and the most of each, once it is closed."""

    def __enter__(self) -> Log:
        if self._device.type == "cuda":
            self._output = tempfile.TemporaryFile()
            which = f"--id=GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            fields = ",".join(QUERY)
            command = ["nvidia-smi", which, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-lms", "500"]
            try:
                self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.DEVNULL)
            except OSError:
                self._output.close()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        self._process.wait()
        with self._output as output:
            output.seek(0)
            self.summary = summarize(output.read().decode())


def summarize(lines: str) -> dict[str, dict[str, float]] | None:
    """What nvidia-smi said, a line for each look; ``None`` where it said nothing of use."""
    looks: list[list[float]] = []
    # The last line may have been cut off.
    for line in lines[: lines.rfind("\n") + 1].splitlines():
        try:
            look = [float(cell) for cell in line.split(",")]
        except ValueError:
            continue
        looks.append(look)
    if not looks:
        return None
    columns: dict[str, Any] = dict(zip(QUERY.values(), zip(*looks, strict=True), strict=True))
    return {
        name: {"least": min(values), "median": statistics.median(values), "most": max(values)}
        for name, values in columns.items()
    }
