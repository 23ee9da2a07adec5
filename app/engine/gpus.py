"""How many GPUs there are, told without torch: the server answers HTTP before the seconds that torch takes.

Counts NVIDIA's device files, which a container has for the GPUs that it was given and for no others. What does not show
there, such as a GPU under Windows' Linux, is not counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path


def count_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """How many GPUs CUDA will show this process.

    Source: the CUDA programming guide on ``CUDA_VISIBLE_DEVICES``: numbers or names, up to the first that does not
    exist; of parts of a GPU (MIG) a process sees one.

    Args:
        environment: with ``CUDA_VISIBLE_DEVICES`` where only some are meant.
        devices: the folder of the device files.
    """
    present = sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    count = 0
    for name in names:
        if name.startswith("MIG-"):
            return min(present, 1)
        if not name.startswith("GPU-") and not (name.isdecimal() and int(name) < present):
            break
        count += 1
    return 0 if len(set(names[:count])) < count else min(count, present)
