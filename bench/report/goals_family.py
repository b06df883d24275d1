"""The goals of the family on CPUs: each loss against its dense form, and memory."""

from __future__ import annotations

from ..losses import FAMILY
from .goal import Figure, Goal, pick, worst_of
from .markdown import mebibytes, times

N = 8192
MEBIBYTES = 128


def family_goals() -> list[Goal]:
    """Two goals for each loss; they have no aim beyond the floor."""
    made = []
    for name, loss in FAMILY.items():
        made += [
            Goal(
                f"{loss.label}, N = {N}: faster than the dense loss",
                _speed(name), loss.floor, (loss.floor,) * 2, times,
            ),
            Goal(
                "the same, every N measured: MiB beyond inputs, gradients, budget",
                _rest(name), MEBIBYTES, (MEBIBYTES,) * 2, mebibytes, at_most=True,
            ),
        ]  # fmt: skip
    return made


def _speed(loss: str) -> Figure:
    return lambda rows: worst_of(
        (row.over_dense for row in pick(rows, "fastclip", loss=loss, n=N)), min
    )


def _rest(loss: str) -> Figure:
    return lambda rows: worst_of((row.rest_mib for row in pick(rows, "fastclip", loss=loss)), max)
