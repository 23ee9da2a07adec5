"""What the C library does with memory that nobody uses: it is kept from one pass to the next, and given back later.

Both are ways of the GNU C library; others do without.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3); the numbers are those of ``malloc.h``."""
KEPT_BYTES = 512 * 2**20
LARGEST_MMAP_THRESHOLD = 32 * 2**20
"""The most that mallopt(3) promises to take."""
VARIABLES = {"GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
"""By which whoever starts the process may have chosen otherwise."""
TRIM_EVERY = 60.0
"""Seconds after which the system gets back what is free; it takes some milliseconds."""


def keep() -> None:
    """On a CPU, have the next pass find the memory of this one.

    By itself the library gives large tensors back to the system at once, and gets them again page by page: for
    thousands of pages in each pass.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and VARIABLES.isdisjoint(os.environ):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)


def trim() -> None:
    """Give the system the pages that are free in the middle of the heap.

    Pictures of many sizes leave holes that the next ones do not fit into, and the library gives none of them back by
    itself, so a server that had a large load would stay large.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(ctypes.c_size_t(0))
