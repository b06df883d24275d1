"""Tile sizes, warps and stages: one table per architecture, keyed by arithmetic and width.

Chosen by compiling (registers, shared memory, no spills: `tests/triton_resources.csv`), not by
timing. FASTCLIP_TRITON_AUTOTUNE=1 times the candidates on the first call for each kernel, dtype
and D; never M or N, which change from batch to batch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from .epilogues import INTERPRETED

AUTOTUNE = "FASTCLIP_TRITON_AUTOTUNE"


class Config(NamedTuple):
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8

    def constants(self, d: int) -> dict[str, int | bool]:
        """The kernels' compile-time arguments."""
        return {
            "BM": self.bm, "BN": self.bn, "BK": self.bk, "GROUP": self.group,
            "EVEN": d % self.bk == 0,
        }  # fmt: skip


# Bytes of shared memory that one program may ask for.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "default": 64 << 10,
}

# "half": bf16 and fp16 on tensor cores; "tf32"; "ieee": fp32 on the ordinary cores. A narrow D has
# no use for a long step along it.
TABLE: dict[str, dict[tuple[str, str], Config]] = {
    "sm_80": {
        ("half", "wide"): Config(128, 128, 64, 8, 3),
        ("half", "narrow"): Config(128, 128, 32, 8, 3),
        ("tf32", "wide"): Config(128, 128, 32, 8, 3),
        ("tf32", "narrow"): Config(128, 128, 32, 8, 2),
        ("ieee", "wide"): Config(64, 64, 16, 4, 3),
        ("ieee", "narrow"): Config(64, 64, 16, 4, 2),
    },
    # Also sm_89 and sm_120: 99 KB of shared memory.
    "sm_86": {
        ("half", "wide"): Config(128, 128, 32, 8, 3),
        ("half", "narrow"): Config(128, 128, 32, 8, 2),
        ("tf32", "wide"): Config(128, 128, 32, 8, 2),
        ("tf32", "narrow"): Config(128, 128, 32, 8, 2),
        ("ieee", "wide"): Config(64, 64, 16, 4, 3),
        ("ieee", "narrow"): Config(64, 64, 16, 4, 2),
    },
    "sm_90": {
        ("half", "wide"): Config(128, 128, 64, 8, 4),
        ("half", "narrow"): Config(128, 128, 32, 8, 3),
        ("tf32", "wide"): Config(128, 128, 32, 8, 3),
        ("tf32", "narrow"): Config(128, 128, 32, 8, 2),
        ("ieee", "wide"): Config(64, 64, 16, 4, 3),
        ("ieee", "narrow"): Config(64, 64, 16, 4, 2),
    },
    "sm_100": {
        ("half", "wide"): Config(128, 128, 64, 8, 4),
        ("half", "narrow"): Config(128, 128, 32, 8, 3),
        ("tf32", "wide"): Config(128, 128, 32, 8, 3),
        ("tf32", "narrow"): Config(128, 128, 32, 8, 2),
        ("ieee", "wide"): Config(64, 64, 16, 4, 3),
        ("ieee", "narrow"): Config(64, 64, 16, 4, 2),
    },
    # ROCm, and whatever comes next.
    "default": {
        ("half", "wide"): Config(128, 128, 32, 8, 2),
        ("half", "narrow"): Config(128, 128, 32, 8, 2),
        ("tf32", "wide"): Config(64, 64, 32, 4, 2),
        ("tf32", "narrow"): Config(64, 64, 32, 4, 2),
        ("ieee", "wide"): Config(64, 64, 16, 4, 2),
        ("ieee", "narrow"): Config(64, 64, 16, 4, 2),
    },
    # Small, so that small blocks have edges, corners and several tiles.
    "interpreter": {
        (arithmetic, width): Config(32, 32, 16 if width == "narrow" else 32, 1, 1, group=2)
        for arithmetic in ("half", "tf32", "ieee")
        for width in ("wide", "narrow")
    },
}  # fmt: skip

NARROW = 32

_TUNED: dict[tuple[object, ...], Config] = {}


def architecture(capability: tuple[int, int]) -> str:
    """The table for a CUDA card's capability."""
    if capability == (8, 0):
        return "sm_80"
    if capability[0] == 8 or capability[0] == 12:
        return "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "default")


@functools.cache
def _table(device: torch.device) -> dict[tuple[str, str], Config]:
    if INTERPRETED.value:
        return TABLE["interpreter"]
    if torch.version.hip:
        return TABLE["default"]
    return TABLE[architecture(torch.cuda.get_device_capability(device))]


def arithmetic_of(dtype: torch.dtype, tf32: bool) -> str:
    return "half" if dtype.itemsize == 2 else "tf32" if tf32 else "ieee"


def choose(
    device: torch.device, dtype: torch.dtype, tf32: bool, d: int, kernel: str = "",
    run: Callable[[Config], object] | None = None,
) -> Config:  # fmt: skip
    """The configuration for features (_, d). `run` launches `kernel` once with a candidate: it is
    what autotuning, where it is asked for, takes the time of."""
    table = _table(device)
    width = "narrow" if d <= NARROW else "wide"
    default = table[arithmetic_of(dtype, tf32), width]
    if run is None or os.environ.get(AUTOTUNE) != "1":
        return default
    key = (device, dtype, tf32, d, kernel)
    if key not in _TUNED:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return default
        _TUNED[key] = min(candidates(default), key=lambda config: _time(run, config))
    return _TUNED[key]


def candidates(default: Config) -> list[Config]:
    """Neighbours of the default, itself first: of equal times the first wins."""
    found = [default]
    for stages in (default.stages - 1, default.stages + 1):
        found.append(default._replace(stages=max(stages, 1)))
    found.append(default._replace(warps=default.warps // 2 or 1))
    found.append(default._replace(bm=default.bm // 2, warps=default.warps // 2 or 1))
    found.append(default._replace(bn=default.bn // 2, warps=default.warps // 2 or 1))
    return list(dict.fromkeys(found))


def _time(run: Callable[[Config], object], config: Config) -> float:
    """Milliseconds; infinite for a candidate that the card has no room for."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(config), warmup=5, rep=20))
    except OutOfResources:
        return float("inf")
