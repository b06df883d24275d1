"""The warning of ranks whose scales or biases differ.

DDP keeps parameters equal, so a difference is a fault of the training set-up. Values travel in the
message of the agreement, where reading them waits for nothing: numbers, and tensors on the CPU.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from torch import Tensor

from ..engine.warn_once import warn_once
from .described import by_rank


def code_of_number(value: float) -> int:
    """The bits of a number as an int64."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def number_of(code: int) -> float:
    return struct.unpack("<d", struct.pack("<q", code))[0]


def code_of_scalar(value: Tensor | float | None) -> int:
    """The code of a scale or a bias; that of NaN if it is not known without waiting."""
    if isinstance(value, Tensor):
        value = value.detach().item() if value.device.type == "cpu" else None
    return code_of_number(math.nan if value is None else float(value))


def warn_of_drift(name: str, codes: Sequence[int]) -> None:
    """Warns once per process, on every rank, if ranks have different numbers. codes: each rank's,
    in their order."""
    values = [number_of(code) for code in codes]
    if len({value for value in values if value == value}) > 1:
        warn_once(
            f"drift of {name}",
            f"{name} must be the same on all ranks, got {by_rank(values)}: each pair takes that of "
            "its row's rank, see fastclip.distributed; keep the parameters of all ranks equal, as "
            "DDP does",
        )
