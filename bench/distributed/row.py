"""The columns of a CSV of `bench/results/distributed`; this file never measures anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..report import results

RESULTS = results.RESULTS / "distributed"


def committed() -> list[Path]:
    """The CSVs there."""
    return sorted(RESULTS.glob("*.csv"))


@dataclass
class Row(results.Where):
    """One method on one case. A number that was not measured is None, an empty cell in the file.

    Where it ran: as in `results.Where`; `threads` are those of each rank.

    What: `loss`, `ranks`, `b` pairs a rank, `d`, `dtype` as in `cases.Case`; `method` as in
    `methods.py`.

    Time: `ms`, the median over `rounds` interleaved rounds of the slowest rank's forward and
    backward, in milliseconds; `low_ms`, `high_ms`, its quartiles; `over_open_clip`, how many times
    faster than open_clip's in the same rounds.

    Prediction of `scale.py`, from the medians in the same rounds: `single_ms`, this library's loss
    of a rank's pairs alone while all ranks do the same; `gather_ms`, of texts, `scatter_ms`, of all
    texts' gradients, `hop_ms`, of a rank's texts to its neighbour, `small_ms`, an all-reduce of a
    number for each pair. `predicted_ms`: what follows from them for `ms`.

    A rank's: `sent_mib` to others, as `traffic.py` counts; `peak_mib` beyond its inputs, the most
    of all ranks.

    Error against float64 on the whole batch, relative, as 2-norms: `err_dx`, `err_dscale`, after
    the mean over ranks. `note`: what went wrong, if anything.
    """

    loss: str = ""
    ranks: int = 0
    b: int = 0
    d: int = 0
    dtype: str = ""
    method: str = ""
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    over_open_clip: float | None = None
    single_ms: float | None = None
    gather_ms: float | None = None
    scatter_ms: float | None = None
    hop_ms: float | None = None
    small_ms: float | None = None
    predicted_ms: float | None = None
    sent_mib: float | None = None
    peak_mib: float | None = None
    err_dx: float | None = None
    err_dscale: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What a later measurement replaces."""
        return (self.loss, self.ranks, self.b, self.d, self.dtype, self.method)
