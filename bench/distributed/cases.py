"""The cases across processes: each is one loss on one shape and number of ranks.

Features are those of `bench/cases.py`; each rank takes its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .. import cases
from ..case import Inputs
from ..losses import LOSSES

SCALE = 14.3


@dataclass(frozen=True)
class Case:
    """Forward and backward of b pairs per rank. If not `timed`, only memory and bytes sent are
    measured."""

    loss: str  # of LOSSES
    ranks: int
    b: int
    d: int = 512
    dtype: str = "float32"  # of the features; or "bfloat16"
    timed: bool = True
    memory: bool = True  # also measure peak memory

    @property
    def name(self) -> str:
        """The name that `--only` is matched against."""
        suffix = "" if self.timed else " memory"
        return f"{self.loss} {self.ranks} ranks {self.b}x{self.d} {self.dtype}{suffix}"

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def whole(self) -> cases.Case:
        """All ranks' pairs, as the case of one process."""
        batch = self.ranks * self.b
        return cases.Case(self.loss, batch, batch, self.d, self.dtype, SCALE)

    @property
    def single(self) -> cases.Case:
        """One rank's pairs, as the case of one process."""
        return cases.Case(self.loss, self.b, self.b, self.d, self.dtype, SCALE)


def own_inputs(case: Case, rank: int, whole: Inputs | None = None) -> Inputs:
    """The rank's rows of `whole` (default: the case's inputs), as leaves."""
    whole = whole or cases.make_inputs(case.whole)
    mine = slice(rank * case.b, (rank + 1) * case.b)
    x, y = (side.detach()[mine].clone().requires_grad_() for side in (whole.x, whole.y))
    return Inputs(x, y, whole.scale, whole.bias)


def _memory(b: int, *ranks: int) -> Iterator[Case]:
    for loss in LOSSES:
        for count in ranks:
            yield Case(loss, count, b, timed=False)


def standard() -> list[Case]:
    """The plan of a plain run: under eight minutes on two cores."""
    made = []
    for ranks in (2, 4):
        for loss in LOSSES:
            made += [Case(loss, ranks, 2048), Case(loss, ranks, 512, memory=False)]
            made.append(Case(loss, ranks, 2048, dtype="bfloat16"))
    return [*made, *_memory(1024, 1, 2, 4, 8)]


def quick() -> list[Case]:
    """A plan of one minute, to check the benchmark itself: its figures are rough."""
    made = [Case(loss, ranks, 512, memory=False) for ranks in (2, 4) for loss in LOSSES]
    made.append(Case("clip", 2, 512, dtype="bfloat16"))
    return [*made, *_memory(256, 1, 2, 4)]
