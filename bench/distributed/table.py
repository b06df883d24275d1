"""The CSV of losses across processes as Markdown: in full for a terminal, in short for a page.

All figures come from the rows given.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..losses import LOSSES, loss_of
from ..report import results
from ..report.markdown import duration, error, markdown, mebibytes, percent, times
from ..report.table import between, provenance, spread
from . import check, methods
from .cases import Case
from .methods import GATHERED, RING
from .row import Row

BEGIN, END = "<!-- distributed:begin -->", "<!-- distributed:end -->"
DTYPES = ("float32", "bfloat16")


def report(rows: list[Row]) -> str:
    """All columns of the rows, in one table for each loss and dtype."""
    if not rows:
        return "Nothing was measured."
    parts = [f"# {rows[-1].machine}, across processes", _provenance(rows)]
    for loss in LOSSES:
        for dtype in DTYPES:
            group = [row for row in rows if (row.loss, row.dtype) == (loss, dtype)]
            if group:
                parts += [f"## {loss_of(loss).label}, {dtype}: forward and backward", _group(group)]
    return "\n\n".join(parts)


def _provenance(rows: list[Row]) -> str:
    """`table.provenance` without the threads, which depend on the number of ranks."""
    row = rows[-1]
    return provenance(rows).replace(f"{row.threads} threads, ", "")


def _group(rows: list[Row]) -> str:
    header = ["ranks", "threads each", "b", "D", "method", "time", "+-", "rounds", "x open_clip"]
    header += ["predicted", "single", "gather", "scatter", "hop", "small"]
    header += ["MiB sent", "MiB peak", "dx", "dscale", "note"]
    table_rows = [
        [
            str(row.ranks), str(row.threads), str(row.b), str(row.d), row.method, duration(row.ms),
            spread(row), str(row.rounds or ""), times(row.over_open_clip),
            duration(row.predicted_ms), *map(duration, _yardsticks(row)), mebibytes(row.sent_mib),
            mebibytes(row.peak_mib), error(row.err_dx), error(row.err_dscale), row.note,
        ]
        for row in sorted(rows, key=lambda row: (row.ms is None, row.b, row.ranks))
    ]  # fmt: skip
    filled = [k for k in range(len(header)) if any(row[k] for row in table_rows)]
    return markdown([header[k] for k in filled], [[row[k] for k in filled] for row in table_rows])


def _yardsticks(row: Row) -> tuple[float | None, ...]:
    exchanges = row.gather_ms, row.scatter_ms, row.hop_ms, row.small_ms
    return row.single_ms, *exchanges


def essentials(rows: list[Row], path: Path) -> str:
    """The tables for the page: times with bytes and memory, memory against ranks, predictions."""
    threads = {row.ranks: row.threads for row in rows}
    shares = ", ".join(f"{_ranks(count)}: {threads[count]}" for count in sorted(threads))
    parts = [
        f"**{rows[-1].machine}**: {_provenance(rows)} All ranks run on this machine, with gloo; "
        f"threads of each rank with {shares}."
    ]
    timed = [row for row in rows if row.ms is not None]
    if timed:
        parts += [
            "Forward and backward, b pairs a rank, D = 512, scale 14.3: the slowest rank's time "
            "(in brackets: speed-up over open_clip), MiB that a rank sends, the most MiB that a "
            "rank holds beyond its inputs, error of the image gradient after the mean over ranks:",
            _times(timed),
        ]
    if memory := _against_ranks(rows):
        parts += [memory]
    if predictions := _predictions(timed):
        parts += [
            "The same steps by the scale model, from one process's rate while all ranks compute, "
            "and from the times of the exchanges alone, in the same rounds:",
            predictions,
        ]
    parts.append(f"All rows, with quartiles: `bench/results/distributed/{path.name}`.")
    return "\n\n".join(parts)


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _cases(rows: Iterable[Row]) -> list[tuple[str, str, int, int]]:
    """The rows' cases (loss, dtype, b, D): float32 first, large b first."""
    found = {(row.loss, row.dtype, row.b, row.d) for row in rows}
    return sorted(found, key=lambda c: (list(LOSSES).index(c[0]), DTYPES.index(c[1]), -c[2], c[3]))


def _pick(rows: list[Row], case: tuple[str, str, int, int], method: str) -> dict[int, Row]:
    """The rows of one case and method, by number of ranks."""
    return {
        row.ranks: row for row in rows
        if (row.loss, row.dtype, row.b, row.d) == case and row.method == method
    }  # fmt: skip


def _name(loss: str, method: str) -> str:
    rival = loss_of(loss).rivals.get(method)
    return rival.label if rival else method


def _times(rows: list[Row]) -> str:
    ranks = sorted({row.ranks for row in rows})
    header = ["loss", "b", "method", *(f"{count} ranks" for count in ranks)]
    header += [f"MiB sent, {count}" for count in ranks] + [f"MiB held, {count}" for count in ranks]
    header += [f"dx, {ranks[-1]}"]
    table_rows = []
    for case in _cases(rows):
        loss, dtype, b, _ = case
        for method in methods.names_of(loss):
            if own := _pick(rows, case, method):
                cells = [own.get(count, Row()) for count in ranks]
                table_rows.append(
                    [
                        f"{loss_of(loss).label}, {dtype}", str(b), _name(loss, method),
                        *map(_time_and_ratio, cells), *(mebibytes(row.sent_mib) for row in cells),
                        *(mebibytes(row.peak_mib) for row in cells), error(cells[-1].err_dx),
                    ]
                )  # fmt: skip
    return markdown(header, table_rows)


def _time_and_ratio(row: Row) -> str:
    if row.over_open_clip is None or row.method == methods.names_of(row.loss)[0]:
        return duration(row.ms)
    return f"{duration(row.ms)} ({times(row.over_open_clip)})"


def _against_ranks(rows: list[Row]) -> str:
    """Peak memory against the number of ranks, from the cases that were not timed."""
    parts = []
    for case in _cases(row for row in rows if row.ms is None and row.peak_mib is not None):
        loss, dtype, b, d = case
        every = {
            method: _pick(rows, case, method) for method in methods.names_of(loss, timed=False)
        }
        ranks = sorted({count for own in every.values() for count in own})
        table_rows = []
        for method, own in every.items():
            if own:
                cells = [own.get(count, Row()) for count in ranks]
                peaks = [mebibytes(row.peak_mib) for row in cells]
                table_rows.append([_name(loss, method), *peaks])
                table_rows += _stated(case, method, ranks)
        title = (
            "Peak MiB a rank beyond its inputs against the number of ranks, "
            f"{loss_of(loss).label}, {dtype}, b = {b}, D = {d} (a rank's texts and their gradient "
            f"are {mebibytes(2 * b * d * 4 / 2**20)} MiB in fp32):"
        )
        parts += [title, markdown(["method", *map(_ranks, ranks)], table_rows)]
    return "\n\n".join(parts)


def _stated(case: tuple[str, str, int, int], method: str, ranks: list[int]) -> list[list[str]]:
    loss, dtype, b, d = case
    jobs = [Case(loss, count, b, d, dtype) for count in ranks]
    stated = [check.stated_mib(job, method) if job.ranks > 1 else None for job in jobs]
    return [["stated, work space aside", *map(mebibytes, stated)]] if any(stated) else []


def _predictions(rows: list[Row]) -> str:
    known = [row for row in rows if row.predicted_ms is not None]
    if not known:
        return ""
    ranks = sorted({row.ranks for row in known})
    header = ["loss", "b", "method"]
    for count in ranks:
        header += [f"{count} ranks", "predicted", "of it"]
    table_rows = []
    for case in _cases(known):
        for method in (GATHERED, RING):
            own = _pick(known, case, method)
            if not own:
                continue
            cells = []
            for count in ranks:
                row = own.get(count, Row())
                share = None if row.ms is None else row.predicted_ms / row.ms
                cells += [duration(row.ms), duration(row.predicted_ms), percent(share)]
            table_rows.append(
                [f"{loss_of(case[0]).label}, {case[1]}", str(case[2]), method, *cells]
            )
    return markdown(header, table_rows)


def into_page(page: Path, paths: Iterable[Path]) -> None:
    """Replaces the text between the markers by the tables of `paths`."""
    body = "\n\n".join(essentials(results.read(path, Row), path) for path in paths)
    page.write_text(between(page, BEGIN, END, body))
