"""The columns of the CSVs in `bench/results/retrieval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..report import results

RESULTS = results.RESULTS / "retrieval"


def committed() -> list[Path]:
    """The committed CSVs."""
    return sorted(RESULTS.glob("*.csv"))


@dataclass
class Row(results.Provenance):
    """One method on one case. A number that was not measured is None, an empty cell in the file.

    Case: `task`, `k`, `m` queries and `n` keys of `d` features of a `dtype`; `method`.

    Time: `ms`, the median in milliseconds; `low_ms`, `high_ms`, its quartiles over `rounds`
    interleaved rounds; `over_product`, how many times as long as the product of all scores takes in
    the same rounds.

    Memory: `peak_mib` beyond the features. `note`: what went wrong.
    """

    task: str = ""
    k: int = 0
    m: int = 0
    n: int = 0
    d: int = 0
    dtype: str = ""
    method: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    over_product: float | None = None
    peak_mib: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """A later measurement with the same key replaces the row."""
        return (self.task, self.k, self.m, self.n, self.d, self.dtype, self.method)
