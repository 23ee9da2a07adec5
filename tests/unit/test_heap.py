"""Memory that passes use again."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from app import heap

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")


def run(code: str) -> list[int]:
    """Numbers that `code` prints in a process of its own."""
    outside = {name: value for name, value in os.environ.items() if name not in heap.VARIABLES}
    told = subprocess.run([sys.executable, "-c", code], env=outside, capture_output=True, text=True, check=True)
    return list(map(int, told.stdout.split()))


def test_memory_for_large_tensors_is_not_given_back_and_fetched_again_page_by_page() -> None:
    pages = 4 * 4 * 2**20 // resource.getpagesize()
    code = (
        "import resource, threading, app.heap, numpy as np\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use():\n"
        "    for _ in range(3): [np.ones(2**19) for _ in range(4)]\n"
        "    before = faults()\n"
        "    for _ in range(10): [np.ones(2**19) for _ in range(4)]\n"
        "    print(faults() - before)\n"
        "app.heap.keep()\n"
        "thread = threading.Thread(target=use); thread.start(); thread.join()\n"
    )
    (faults,) = run(code)
    assert faults < pages


def test_holes_between_what_is_still_used_are_given_back() -> None:
    code = (
        "import resource, app.heap, numpy as np\n"
        "def show():\n"
        "    with open('/proc/self/statm') as file: print(int(file.read().split()[1]) * resource.getpagesize())\n"
        "app.heap.keep()\n"
        "large, small = zip(*((np.ones(2**17), np.ones(2**9)) for _ in range(64)))\n"
        "show(); del large; show(); app.heap.trim(); show()\n"
    )
    full, free, trimmed = run(code)
    assert full - free < 8 * 2**20, "64 MiB are free, but below what is still used"
    assert full - trimmed > 56 * 2**20
