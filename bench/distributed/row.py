"""The columns of the CSVs in `bench/results/distributed`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..report import results

RESULTS = results.RESULTS / "distributed"


def committed() -> list[Path]:
    """The committed CSVs."""
    return sorted(RESULTS.glob("*.csv"))


@dataclass
class Row(results.Provenance):
    """One method on one case. A number that was not measured is None, an empty cell in the file.

    Machine: as in `results.Provenance`; `threads` are those of each rank.

    Case: `loss`, `ranks`, `b` pairs per rank, `d`, `dtype` as in `cases.Case`; `method` as in
    `methods.py`.

    Time: `ms`, the median over `rounds` interleaved rounds of the slowest rank's forward and
    backward, in milliseconds; `low_ms`, `high_ms`, its quartiles; `over_open_clip`, how many times
    faster than open_clip's in the same rounds.

    Prediction by `scale/model.py`, from medians in the same rounds: `single_ms`, this library's
    loss of one rank's pairs while all ranks do the same; `gather_ms`, an all-gather of texts;
    `scatter_ms`, a reduce-scatter of all texts' gradients; `hop_ms`, sending a rank's texts to its
    neighbour; `small_ms`, an all-reduce of one number per pair. `predicted_ms` is the prediction of
    `ms` from them.

    Per rank, the largest of all ranks: `sent_mib`, sent to others as `traffic.py` counts;
    `peak_mib`, peak memory beyond the inputs.

    Relative errors (2-norms) against float64 on the whole batch, after the mean over ranks:
    `err_dx`, `err_dscale`. `note`: an error message, if any.
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
        """The columns that identify a row: a later measurement with the same key replaces it."""
        return (self.loss, self.ranks, self.b, self.d, self.dtype, self.method)
