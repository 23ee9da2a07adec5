"""What holds for every test."""

from __future__ import annotations

import os

# Before anything imports torch, and for the servers that tests start too: with other numbers of threads a CPU rounds
# differently, so that pictures from two processes would not be the same, and several teams would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"
