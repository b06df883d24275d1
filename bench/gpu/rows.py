"""Measures one group of cases by `bench.measure.runner`: `python -m bench.gpu.rows GROUP`.

If it is started again within a run, it continues: it skips cases and methods that already have a
row, and methods that lost the device or hung.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from ..cases import Case
from ..measure import runner
from ..report import results
from . import cases, fp32, steps, winners

# Seconds that the first calls of a method, which compile it, may take.
PATIENCE = 40.0
# Seconds for the rounds of one case; large cases take three rounds, however long.
SECONDS = {
    "headline": 2.5, "engines": 1.5, "contrast": 1.5, "small": 0.3, "rest": 1.0, "again": 2.0,
}  # fmt: skip


def path_of(out: Path, device: str, again: bool = False) -> Path:
    """The CSV of the rows. A second run has its own, because its tiles are not the table's."""
    machine = results.machine_row(device).machine
    return out / ("gpu-again-rows.csv" if again else f"{machine}.csv")


def of_group(rows: list[results.Row], group: str) -> list[results.Row]:
    """The rows of a group's cases and methods."""
    wanted = {(*case_key(case), name) for case in cases.GROUPS[group]() for name in case.methods}
    return [row for row in rows if row.key in wanted]


def case_key(case: Case) -> tuple[object, ...]:
    """The start of the key of each of the case's rows."""
    shape = (case.m, case.n, case.d)
    return (case.loss, *shape, case.dtype, case.data, case.scale, case.mode)


def remaining(plan: list[Case], done: list[results.Row], without: list[str]) -> list[Case]:
    """The cases and methods that are left to measure, given the rows of this run."""
    lost = {row.method for row in done if row.note.startswith(runner.LOST_NOTE)} | set(without)
    known = {row.key for row in done if row.ms is not None or row.note}
    left = []
    for case in plan:
        key = case_key(case)
        methods = tuple(
            name for name in case.methods if name not in lost and (*key, name) not in known
        )
        if methods:
            left.append(replace(case, methods=methods))
    return left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.rows")
    parser.add_argument("group", choices=cases.GROUPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    parser.add_argument("--without", nargs="*", default=[], metavar="METHOD")
    parser.add_argument("--winners", type=Path, help="a file of tile candidates")
    options = parser.parse_args(arguments)
    fp32.add_method()
    if options.winners:
        winners.add_method(options.winners)
    path = path_of(options.out, options.device, options.group == "again")
    began = os.environ.get("FASTCLIP_BENCH_BEGAN", "")
    old = results.read(path) if path.exists() else []
    done = [row for row in old if began and row.when >= began]
    plan = remaining(cases.GROUPS[options.group](), done, options.without)
    chosen = runner.Options(
        path, SECONDS[options.group], options.device, at_most=0.9 * steps.seconds_left(),
        patience=PATIENCE, give_up=lambda: os._exit(steps.LOST_STATUS),
    )  # fmt: skip
    try:
        rows = runner.run(plan, chosen)
    except runner.DeviceLost as error:
        print(f"device lost: {error}", flush=True)
        return steps.LOST_STATUS
    rows = of_group(done + rows, options.group)
    broken = failures(rows)
    for row in broken:
        print(f"FAILED: {row.method} on {row.loss} {row.n} {row.dtype}: {row.note}", flush=True)
    timed = sum(row.ms is not None for row in rows)
    print(f"{timed} rows with a time, {len(broken)} of our own without; in {path.name}")
    return 1 if broken else 0


def failures(rows: list[results.Row]) -> list[results.Row]:
    """Rows of fastclip's methods that should have a time and have none."""
    own = (row for row in rows if row.method.startswith("fastclip") and row.mode != "skipped")
    return [row for row in own if row.ms is None]


if __name__ == "__main__":
    sys.exit(main())
