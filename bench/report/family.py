"""The page of the family: a table for each batch size, from the rows of CSVs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..losses import FAMILY, loss_of
from . import goals, results
from .markdown import duration, error, markdown, mebibytes, percent, times
from .results import Row, of_losses
from .table import between, provenance

BEGIN, END = "<!-- family:begin -->", "<!-- family:end -->"


def into_page(page: Path, paths: Iterable[Path]) -> None:
    """Replaces what stands between the markers by the tables of `paths`."""
    parts = [part for path in paths for part in essentials(results.read(path))]
    page.write_text(between(page, BEGIN, END, "\n\n".join(parts)))


def essentials(rows: list[Row]) -> list[str]:
    """The parts of the page; none if the rows have no loss of the family."""
    mine = of_losses(rows, FAMILY)
    if not mine:
        return []
    parts = [f"**{mine[-1].machine}**: {provenance(mine)}"]
    for n in sorted({row.n for row in mine}):
        parts += [f"N = {n}:", _table([row for row in mine if row.n == n])]
    if met := goals.table_of_family(rows):
        parts += ["Goals of these losses, and what this machine reaches:", met]
    return parts


def _table(rows: list[Row]) -> str:
    header = ["loss", "method", "time", "x dense", "x compiled", "passes", "of limit", "MiB"]
    header += ["rest", "dx"]
    order = list(FAMILY)
    table_rows = [
        [
            loss_of(row.loss).label, row.method, duration(row.ms), times(row.over_dense),
            times(row.over_compiled), f"{row.passes:.3g}", percent(row.fraction),
            mebibytes(row.peak_mib), mebibytes(row.rest_mib), error(row.err_dx),
        ]
        for row in sorted(rows, key=lambda row: order.index(row.loss))
        if row.ms is not None or row.peak_mib is not None
    ]  # fmt: skip
    filled = [k for k in range(len(header)) if any(cells[k] for cells in table_rows)]
    return markdown(
        [header[k] for k in filled], [[cells[k] for k in filled] for cells in table_rows]
    )
