"""How many of a CPU's cores torch takes, and for how long its threads hold one while they wait for each other.

Both are said in the environment, before torch is imported and loads its OpenMP library.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

SPINS = 2000
"""Rounds of a loop in which a thread waits for the others before it leaves its core: as fast as the library's own
300,000 where nobody else wants it. Where others do, that many keep the core from those very threads that are waited
for, and what takes a tenth of a second may take ten."""
COUNTS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
"""Of the threads of a computation, and of the processes that compile; each of those takes hundreds of megabytes."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")


def share(folder: Path = CONTROL_GROUPS) -> None:
    """Take no more threads than the container may use cores, and leave a core early; what the environment says stays.

    Args:
        folder: see `cpu_limit`.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    limit = cpu_limit(folder)
    if limit is not None and limit < len(os.sched_getaffinity(0)):
        for name in COUNTS:
            os.environ.setdefault(name, str(math.ceil(limit)))


def cpu_limit(folder: Path = CONTROL_GROUPS) -> float | None:
    """Cores' worth of time that this process's container gets; ``None`` without a limit.

    torch counts all cores of the host. With more threads than the limit allows, each pass waits until there is time for
    the last of them.

    Args:
        folder: of the container's control group, in its second or its first version.

    Source: docs.kernel.org/admin-guide/cgroup-v2.html, "CPU Interface Files", and scheduler/sched-bwc.html.
    """
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = ((folder / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return None
    return limit if limit > 0 else None
