"""What a process holds, measured over a long run, and whether it grows."""

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
MOST_GROWTH = 32.0  # MiB from the warm-up to the end, along the least-squares line


class Held(NamedTuple):
    """Resident memory in MiB, and the numbers of file descriptors and threads."""

    rss: float
    descriptors: int
    threads: int


def held() -> Held:
    """Measures this process after it has freed what it keeps for reuse."""
    gc.collect()
    fastclip.release_workspace()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
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
    rest = measured[warm:]
    slope = np.polyfit(range(len(rest)), [h.rss for h in rest], 1)[0]
    found = []
    if slope * len(rest) > MOST_GROWTH:
        found.append(f"RSS grows by {slope * len(rest):.0f} MiB, allowed {MOST_GROWTH:.0f}")
    for name in ("descriptors", "threads"):
        before = max(getattr(h, name) for h in measured[:warm])
        now = min(getattr(h, name) for h in measured[-3:])
        if now > before:
            found.append(f"{now} {name}, {before} in the warm-up")
    return found
