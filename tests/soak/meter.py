"""The memory and handles that a process holds, measured over a long run, and whether it grows."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fastclip

WARM_UP = 0.2  # of the measurements
# MiB from the warm-up to the end, along the least-squares line.
MOST_GROWTH = {"allocated": 4.0, "rss": 32.0}

LIBC = ctypes.CDLL(None)
if not hasattr(LIBC, "mallinfo2"):
    raise ImportError("the soak measures memory with glibc's mallinfo2, of 2.33 and later")


class Held(NamedTuple):
    """Allocated and resident memory in MiB, and the numbers of file descriptors and threads."""

    allocated: float
    rss: float
    descriptors: int
    threads: int


class _Allocator(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    )  # fmt: skip


LIBC.mallinfo2.restype = _Allocator


def return_freed_memory() -> None:
    """Makes glibc return large blocks to the system, and share two arenas among all threads.

    Otherwise its free lists grow for thousands of calls of random sizes, and RSS with them: by
    130 MiB in 1,500 steps, while the allocated memory stayed within 1 MiB.
    """
    m_arena_max, m_mmap_threshold = -8, -3
    LIBC.mallopt(m_arena_max, 2)
    LIBC.mallopt(m_mmap_threshold, 64 << 10)


def held() -> Held:
    """Measures this process after it has freed what it keeps for reuse."""
    gc.collect()
    fastclip.release_workspace()
    LIBC.malloc_trim(0)
    found = LIBC.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        (found.uordblks + found.hblkhd) / 2**20,
        pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )  # fmt: skip


def growth(measured: Sequence[Held]) -> list[str]:
    """Returns a line for each quantity that grows after the warm-up.

    Memory may grow by MOST_GROWTH along the line of least squares. Neither the descriptors nor the
    threads may end above their largest number in the warm-up. Fewer than ten measurements show
    nothing.
    """
    warm = int(WARM_UP * len(measured))
    if len(measured) < 10:
        return []
    rest, found = measured[warm:], []
    for name, most in MOST_GROWTH.items():
        slope = np.polyfit(range(len(rest)), [getattr(h, name) for h in rest], 1)[0]
        if slope * len(rest) > most:
            found.append(f"{name} memory grows by {slope * len(rest):.1f} MiB, allowed {most}")
    for name in ("descriptors", "threads"):
        before = max(getattr(h, name) for h in measured[:warm])
        now = min(getattr(h, name) for h in measured[-3:])
        if now > before:
            found.append(f"{now} {name}, {before} in the warm-up")
    return found
