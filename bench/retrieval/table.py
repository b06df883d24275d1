"""The CSV of retrieval as a Markdown table, for a terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..report import results
from ..report.markdown import duration, markdown, mebibytes
from ..report.table import between, provenance, spread
from .row import Row

BEGIN, END = "<!-- retrieval:begin -->", "<!-- retrieval:end -->"
HEADER = ["task", "queries x keys x D", "method", "time", "+-", "x product", "MiB"]


def report(rows: list[Row]) -> str:
    if not rows:
        return "Nothing was measured."
    cells = [
        [
            f"{row.task}, k = {row.k}" if row.k else row.task,
            f"{row.m:,} x {row.n:,} x {row.d}, {row.dtype}", row.method, duration(row.ms),
            spread(row), f"{row.over_product:.2f}" if row.over_product else row.note,
            mebibytes(row.peak_mib),
        ]
        for row in rows
    ]  # fmt: skip
    return f"**{rows[-1].machine}**: {provenance(rows)}\n\n{markdown(HEADER, cells)}"


def into_page(page: Path, paths: Iterable[Path]) -> None:
    """Replaces what stands between the markers by the tables of `paths`."""
    parts = [report(results.read(path, Row)) for path in paths]
    page.write_text(between(page, BEGIN, END, "\n\n".join(parts)))
