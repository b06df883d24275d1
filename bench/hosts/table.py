"""The CSV of hosts as Markdown tables, for a terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..report import results
from ..report.markdown import duration, markdown, mebibytes, times
from ..report.table import between, provenance, spread
from .row import Row

BEGIN, END = "<!-- hosts:begin -->", "<!-- hosts:end -->"


def report(rows: list[Row]) -> str:
    """A table for each batch size, the largest first."""
    if not rows:
        return "Nothing was measured."
    versions = dict.fromkeys(f"{row.host} {row.version}" for row in rows)
    parts = [f"**{rows[-1].machine}**: {provenance(rows)} {', '.join(versions)}."]
    for n in sorted({row.n for row in rows}, reverse=True):
        parts += [f"N = {n}:", _table([row for row in rows if row.n == n])]
    return "\n\n".join(parts)


def into_page(page: Path, paths: Iterable[Path]) -> None:
    """Replaces what stands between the markers by the tables of `paths`."""
    parts = [report(results.read(path, Row)) for path in paths]
    page.write_text(between(page, BEGIN, END, "\n\n".join(parts)))


def _table(rows: list[Row]) -> str:
    header = ["host", "loss", "its own", "+-", "fastclip", "+-", "faster", "MiB", "MiB fastclip"]
    header += ["memory"]
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.host, row.loss), {})[row.method] = row
    table_rows = []
    for (host, loss), methods in found.items():
        theirs, ours = (methods.get(name, Row()) for name in ("host", "fastclip"))
        both = theirs.peak_mib and ours.peak_mib
        table_rows.append([
            host, loss, duration(theirs.ms), spread(theirs), duration(ours.ms), spread(ours),
            times(ours.over_host), mebibytes(theirs.peak_mib), mebibytes(ours.peak_mib),
            f"1/{theirs.peak_mib / ours.peak_mib:.0f}" if both else "",
        ])  # fmt: skip
    filled = [k for k in range(len(header)) if any(cells[k] for cells in table_rows)]
    return markdown(
        [header[k] for k in filled], [[cells[k] for k in filled] for cells in table_rows]
    )
