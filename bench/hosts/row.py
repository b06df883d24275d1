"""The columns of the CSVs in `bench/results/hosts`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..report import results

RESULTS = results.RESULTS / "hosts"


def committed() -> list[Path]:
    """The committed CSVs."""
    return sorted(RESULTS.glob("*.csv"))


@dataclass
class Row(results.Provenance):
    """One method on one case. A number that was not measured is None, an empty cell in the file.

    Case: `host`, its `version`, `loss` as the page names it, `n` rows of each of `columns` matrices
    of `d` features; `method`: "host" or "fastclip".

    Time: `ms`, the median of forward and backward in milliseconds; `low_ms`, `high_ms`, its
    quartiles over `rounds` interleaved rounds; `over_host`, how many times faster than the host's
    in the same rounds.

    Memory: `peak_mib` beyond the embeddings, their gradients included. `note`: what went wrong.
    """

    host: str = ""
    version: str = ""
    loss: str = ""
    n: int = 0
    columns: int = 0
    d: int = 0
    method: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    over_host: float | None = None
    peak_mib: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """A later measurement with the same key replaces the row."""
        return (self.host, self.loss, self.n, self.columns, self.d, self.method)
