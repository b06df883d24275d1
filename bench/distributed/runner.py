"""Measures a plan across processes and writes each finished case into the CSV.

Times come from one group of processes per case, peak memory from one group per method. Failures
leave rows with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from ..measure import progress
from ..methods.registry import Unavailable
from ..report import results
from . import check, methods, processes, rank
from .cases import Case
from .row import Row

MIB = 2**20
# Seconds for the rounds of one case, in a standard and in a quick plan.
SECONDS, QUICK_SECONDS = 8.0, 1.5


@dataclass
class Options:
    """How a plan is run; the rounds of one case take `seconds`."""

    path: Path
    seconds: float = SECONDS
    memory: bool = True


def run(plan: list[Case], options: Options, wanted: list[str] | None = None) -> list[Row]:
    """Measures every case of `plan` with the methods wanted, or all; returns the new rows, which
    are also in the CSV."""
    where = results.machine_row(row_class=Row)
    old = results.read(options.path, Row) if options.path.exists() else []
    rows: list[Row] = []
    chosen = {case: taking_part(case, wanted) for case in plan}
    with progress.bar(sum(map(len, chosen.values()))) as bar:
        for case, names in chosen.items():
            bar.set_description(case.name)
            rows += measure_case(case, names, options, where, bar.set_postfix_str)
            bar.update(len(names))
            results.write(options.path, results.merge(old, rows), Row)
    return rows


def taking_part(case: Case, wanted: list[str] | None) -> tuple[str, ...]:
    return tuple(
        name for name in methods.names_of(case.loss, case.timed) if not wanted or name in wanted
    )


def measure_case(
    case: Case,
    names: tuple[str, ...],
    options: Options,
    where: Row,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """The rows of one case."""
    rows = {name: _blank(case, name, where) for name in names}
    able = []
    for name, row in rows.items():
        try:
            methods.make(case.loss, name, 0, case.ranks)
            able.append(name)
        except (Unavailable, ImportError) as error:
            row.note = str(error)
    tell("all methods")
    try:
        found = processes.run(rank.measure, case.ranks, case, tuple(able), options.seconds)
    except processes.Failed as error:
        for name in able:
            rows[name].note = str(error)[:200]
        return list(rows.values())
    for name in able:
        _set(rows[name], case, name, found)
    if options.memory and case.memory:
        for name in able:
            tell(f"memory of {name}")
            _set_memory(rows[name], case, name)
    return list(rows.values())


def _blank(case: Case, method: str, where: Row) -> Row:
    return replace(
        where,
        threads=processes.threads_of(case.ranks),
        when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        loss=case.loss, ranks=case.ranks, b=case.b, d=case.d, dtype=case.dtype, method=method,
    )  # fmt: skip


def _set(row: Row, case: Case, method: str, found: list[rank.Measured]) -> None:
    row.sent_mib = max(one.sent[method] for one in found) / MIB
    first = found[0]
    if not case.timed:
        return
    row.err_dx, row.err_dscale = first.errors[method]
    timing = first.times[method]
    row.ms, row.low_ms, row.high_ms = (
        1e3 * seconds for seconds in (timing.median, timing.low, timing.high)
    )
    row.rounds = timing.rounds
    rival = methods.names_of(case.loss)[0]
    if rival in first.times:
        row.over_open_clip = first.times[rival].median / timing.median
    for column, name in (
        ("single_ms", rank.SINGLE), ("gather_ms", rank.GATHER),
        ("scatter_ms", rank.SCATTER), ("hop_ms", rank.HOP), ("small_ms", rank.SMALL),
    ):  # fmt: skip
        setattr(row, column, 1e3 * first.times[name].median)
    row.predicted_ms = check.predicted_ms(case, method, first.times)


def _set_memory(row: Row, case: Case, method: str) -> None:
    try:
        peaks = processes.run(rank.peak, case.ranks, case, method)
    except processes.Failed as error:
        row.note = f"memory: {error}"[:200]
        return
    if None in peaks:
        row.note = "memory: cannot be measured on this machine"
    else:
        row.peak_mib = max(peaks) / MIB
