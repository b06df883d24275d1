"""Tile sizes, warps and stages: one table per architecture, keyed by kernel, arithmetic and width.

The configurations of sm_90 for half precision won among the candidates that `make gpu` timed on an
H100. No card has timed the others: they were chosen by the registers, the shared memory and the
absence of spills that the compiler reports (tests/engines/triton/triton_resources.csv).

With FASTCLIP_TRITON_AUTOTUNE=1 the first call for each kernel, dtype and D times the candidates. M
and N, which change from batch to batch, never trigger it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from .constants import INTERPRETED

AUTOTUNE = "FASTCLIP_TRITON_AUTOTUNE"


class Config(NamedTuple):
    """The tile of a kernel, BM x BN with steps of BK along D, and how the kernel is launched."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8  # rows of tiles that are taken together, so that they share columns in L2
    # Slices of columns in which a tile goes through the epilogue: more slices take fewer registers.
    slices: int = 1
    # Uses tensor descriptors, and as many programs as fit on the card, each with many tiles.
    descriptors: bool = False


# Bytes of shared memory that one program may use.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "default": 64 << 10,
}


KERNELS = (
    "sweep", "kept", "weigh", "both", "heavy", "heavy kept", "gradient", "tile", "levels", "small",
)  # fmt: skip
Table = dict[tuple[str, str, str], Config]


def _table_of(
    half: dict[str, Config], tf32: dict[str, Config], split: dict[str, Config], ieee: Config,
    odd: Config,
) -> Table:  # fmt: skip
    """Returns the configurations of an architecture, by kernel, arithmetic and width.

    Kernels (`LogitBlock.kernel_of_...` chooses): "sweep" is the first sweep and "weigh" the second,
    on a block without masks and, for "weigh", with a light epilogue. "both" makes weights with
    another epilogue, in the second sweep or in one go with the first. "heavy" is any of these three
    on a block with masks. "kept" is a first sweep that keeps weights, "heavy kept" the same with
    masks or with an epilogue that is not light. "gradient" multiplies split weights with features.
    "tile" is for lines that have shifts of their own, "levels" for lines that have levels, "small"
    for small blocks.

    Arithmetics: "half" (bf16 and fp16 on tensor cores), "tf32", "split" (fp32 in parts of bf16),
    "ieee" (fp32 on the ordinary cores).

    Widths: rows that are "wide", "narrow" (too short for a long step along D) or "odd" (they do not
    begin on 16 bytes, and are loaded through registers).

    A kernel that is not named has the configuration of "tile"; a heavy one that of "both" or
    "kept"."""
    table = {}
    tables = {"half": half, "tf32": tf32, "split": split, "ieee": {"tile": ieee}}
    for arithmetic, configs in tables.items():
        tile = configs["tile"]
        heavy = {"heavy": configs.get("both", tile), "heavy kept": configs.get("kept", tile)}
        configs = heavy | configs
        for kernel in KERNELS:
            config = configs.get(kernel, tile)
            table[kernel, arithmetic, "wide"] = config
            narrow = config._replace(bk=min(config.bk, NARROW), stages=2)
            table[kernel, arithmetic, "narrow"] = config if arithmetic == "ieee" else narrow
            table[kernel, arithmetic, "odd"] = config if arithmetic == "ieee" else odd
    return table


NARROW = 32
_IEEE = Config(64, 64, 16, 4, 3)
_ODD = Config(64, 64, 32, 4, 2)
_SMALL = Config(64, 64, 64, 4, 3)
_TF32 = {"tile": Config(128, 64, 32, 8, 3), "small": Config(64, 64, 32, 4, 3)}
# A step takes three parts of each tower's features and a second accumulator.
_SPLIT = {"tile": Config(128, 64, 32, 8, 3), "small": Config(64, 64, 32, 4, 3)}
_INTERPRETED = Config(32, 32, 32, 1, 1, group=2)
_DESCRIBED = _INTERPRETED._replace(descriptors=True, slices=2)

TABLE: dict[str, Table] = {
    "sm_80": _table_of(
        {
            "kept": Config(128, 128, 64, 8, 3, slices=4),
            "both": Config(128, 64, 64, 8, 3, slices=2),
            "levels": Config(128, 64, 64, 8, 3),
            "tile": Config(128, 128, 64, 8, 3),
            "small": _SMALL,
        },
        _TF32, _SPLIT, _IEEE, _ODD,
    ),
    # Also sm_89 and sm_120: 99 KB of shared memory.
    "sm_86": _table_of(
        {
            "kept": Config(128, 128, 32, 8, 3, slices=4),
            "both": Config(128, 64, 32, 8, 3, slices=2),
            "levels": Config(128, 64, 32, 8, 3),
            "tile": Config(128, 128, 32, 8, 3),
            "small": _SMALL,
        },
        _TF32,
        {"tile": Config(128, 64, 32, 8, 2), "small": Config(64, 64, 32, 4, 1)},
        _IEEE, _ODD,
    ),
    # A tile twice as wide, or as high, halves the traffic of the other tower's features in L2. In a
    # high tile the first sweep's column sums take half the shuffles; a wide one has registers for
    # weights.
    "sm_90": _table_of(
        {
            "sweep": Config(256, 128, 64, 8, 3, descriptors=True),
            "kept": Config(128, 128, 64, 4, 4, slices=2, descriptors=True),
            "weigh": Config(128, 256, 64, 8, 4, group=16, slices=2, descriptors=True),
            "both": Config(128, 128, 64, 4, 3, slices=4, descriptors=True),
            "heavy": Config(128, 128, 64, 8, 4, slices=4, descriptors=True),
            "heavy kept": Config(128, 128, 64, 8, 3, slices=2, descriptors=True),
            "levels": Config(128, 64, 64, 8, 3),
            "tile": Config(128, 128, 64, 8, 3),
            "small": _SMALL,
        },
        {
            "sweep": Config(128, 128, 32, 8, 3, descriptors=True),
            "weigh": Config(128, 128, 32, 8, 3, descriptors=True),
            **_TF32,
        },
        {
            # Loads of the next step's features are issued after a step's products: with two stages
            # none would be in flight during the products.
            "sweep": Config(128, 128, 32, 8, 4, descriptors=True),
            "kept": Config(128, 128, 32, 8, 4, slices=4, descriptors=True),
            "weigh": Config(128, 128, 32, 8, 4, slices=2, descriptors=True),
            "both": Config(128, 128, 32, 8, 4, slices=4, descriptors=True),
            "gradient": Config(128, 128, 32, 8, 4),
            "tile": Config(128, 64, 32, 8, 3),
            "small": _SPLIT["small"],
        },
        _IEEE, _ODD,
    ),
    "sm_100": _table_of(
        {
            "sweep": Config(128, 128, 64, 8, 3, slices=2),
            "kept": Config(128, 128, 64, 8, 3, slices=4),
            "weigh": Config(128, 128, 64, 8, 3, slices=2),
            "both": Config(128, 128, 64, 8, 3, slices=2),
            "levels": Config(64, 64, 64, 8, 3),
            "tile": Config(128, 64, 64, 8, 3),
            "small": _SMALL,
        },
        _TF32, _SPLIT, _IEEE, _ODD,
    ),
    # ROCm, and architectures that are not known yet.
    "default": _table_of(
        {
            "kept": Config(128, 64, 32, 8, 2, slices=2),
            "both": Config(128, 64, 32, 8, 2),
            "levels": Config(128, 64, 32, 8, 2),
            "tile": Config(128, 128, 32, 8, 2),
            "small": _SMALL,
        },
        {"tile": Config(64, 64, 32, 4, 2)}, {"tile": Config(64, 64, 32, 4, 1)},
        _IEEE._replace(stages=2), _ODD,
    ),
    # Tiles are small, so that small blocks have edges, corners and several tiles.
    "interpreter": _table_of(
        {"tile": _DESCRIBED}, {"tile": _DESCRIBED}, {"tile": _DESCRIBED}, _INTERPRETED, _INTERPRETED
    ),
}  # fmt: skip

# Milliseconds of each candidate that was timed.
TIMES: dict[tuple[object, ...], dict[Config, float]] = {}


def architecture(capability: tuple[int, int]) -> str:
    """Returns the name of the table for a CUDA card's capability."""
    if capability == (8, 0):
        return "sm_80"
    if capability[0] == 8 or capability[0] == 12:
        return "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "default")


@functools.cache
def _table(device: torch.device) -> Table:
    if INTERPRETED.value:
        return TABLE["interpreter"]
    if torch.version.hip:
        return TABLE["default"]
    return TABLE[architecture(torch.cuda.get_device_capability(device))]


def arithmetic_of(dtype: torch.dtype, tf32: bool, split: bool = False) -> str:
    return "half" if dtype.itemsize == 2 else "tf32" if tf32 else "split" if split else "ieee"


def _name(kernel: str) -> str:
    """Returns the name in the table of a kernel or of its variant."""
    return kernel.partition(",")[0]


def choose(
    device: torch.device, dtype: torch.dtype, tf32: bool, d: int, unit: int, kernel: str,
    run: Callable[[Config], object] | None = None, split: bool = False,
) -> Config:  # fmt: skip
    """Returns the configuration of a kernel for features (_, d) whose rows begin at multiples of
    `unit` elements. kernel: one of KERNELS and, after commas, words that tell its variants apart.
    `run` launches the kernel once with a candidate: autotuning, if it is on, times that."""
    width = "odd" if unit == 1 else "narrow" if d <= NARROW else "wide"
    default = _table(device)[_name(kernel), arithmetic_of(dtype, tf32, split), width]
    if run is None or os.environ.get(AUTOTUNE) != "1" or INTERPRETED.value:
        return default
    key = (device, dtype, tf32 or split, d, unit, kernel)
    if key not in TIMES:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return default
        TIMES[key] = {config: _time(run, config) for config in candidates(default, kernel)}
    return min(TIMES[key], key=TIMES[key].__getitem__)


# Rows, columns, warps, slices. Triton 3.6 and 3.7 compile all of them for sm_90 without spilling,
# except "both" with four warps, which spills 16 bytes. Two programs of four warps and three stages
# share a processor: one multiplies while the other folds.
SHAPES = {
    "sweep": ((256, 128, 8, 1), (128, 256, 8, 1), (128, 128, 8, 1), (128, 128, 4, 1)),
    "weigh": ((128, 256, 8, 2), (256, 128, 8, 2), (128, 128, 8, 1), (128, 128, 4, 2)),
    "kept": ((128, 128, 8, 2), (128, 128, 4, 2)),
    "both": ((128, 128, 8, 4), (128, 128, 4, 4)),
}


def candidates(default: Config, kernel: str) -> list[Config]:
    """Returns configurations that may be faster for a kernel, the default first: the first wins a
    tie."""
    found = [default]
    if default.descriptors:
        for bm, bn, warps, slices in SHAPES.get(_name(kernel), ()):
            shape = default._replace(bm=bm, bn=bn, warps=warps, slices=slices)
            found += [shape._replace(stages=stages) for stages in (3, 4)]
        found += [default._replace(group=group) for group in (4, 8, 16)]
        # Pointers take registers that threads of four warps do not have.
        found.append(default._replace(descriptors=False, warps=max(default.warps, 8)))
    else:
        found += [
            default._replace(stages=max(stages, 1))
            for stages in (default.stages - 1, default.stages + 1)
        ]
        fewer = default._replace(warps=default.warps // 2 or 1)
        found += [fewer, fewer._replace(bm=default.bm // 2), fewer._replace(bn=default.bn // 2)]
    return list(dict.fromkeys(found))


def _time(run: Callable[[Config], object], config: Config) -> float:
    """Returns milliseconds; infinity for a candidate that does not fit on the card."""
    try:
        return float(do_bench(lambda: run(config), warmup=5, rep=20))
    except OutOfResources:
        return float("inf")
