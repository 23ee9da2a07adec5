"""What holds for every test."""

from __future__ import annotations

import os
import signal

# Before anything imports torch, and for the servers that tests start too: with other numbers of threads a CPU rounds
# differently, so that pictures from two processes would not be the same, and several teams would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts tests in its background has them ignore Ctrl-C, and so would what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
