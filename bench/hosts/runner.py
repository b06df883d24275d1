"""Measures the cases.

Both methods of a case are timed in interleaved rounds in this process. Peak memory comes from a
process for each, as in `measure.memory`:

    python -m bench.hosts.runner CASE METHOD
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import replace
from datetime import datetime, timezone

from ..measure import plan
from ..measure.memory import in_fresh_process, peak_bytes
from ..measure.plan import Options
from ..measure.timing import interleaved
from . import cases
from .cases import Case, make_step
from .row import Row

SECONDS, QUICK_SECONDS = 8.0, 1.0
MIB = 2**20


def run(cases: list[Case], options: Options) -> list[Row]:
    """Measures every case; returns the new rows, which are also in the CSV."""
    return plan.run(cases, options, Row, _measure)


def _measure(case: Case, machine: Row, options: Options) -> list[Row]:
    steps = {method: make_step(case, method) for method in case.methods}
    for step in steps.values():
        step()
    timings = interleaved(steps, options.seconds)
    rows = []
    for method, timing in timings.items():
        over = timings["host"].median / timing.median if "host" in timings else None
        row = replace(
            machine, when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"), host=case.host,
            version=importlib.metadata.version(case.host), loss=case.text, n=case.n,
            columns=case.columns, d=case.d, method=method, ms=1e3 * timing.median,
            low_ms=1e3 * timing.low, high_ms=1e3 * timing.high, rounds=timing.rounds,
            over_host=over,
        )  # fmt: skip
        if options.memory and case.memory:
            row.peak_mib, row.note = _peak(case, method)
        rows.append(row)
    return rows


def _peak(case: Case, method: str) -> tuple[float | None, str]:
    """The peak of a step in MiB, in a fresh process, or None with the reason."""
    peak, reason = in_fresh_process("bench.hosts.runner", case.name, method)
    return None if peak is None else peak / MIB, reason


def main() -> None:
    name, method = sys.argv[1:]
    (case,) = (one for one in (*cases.standard(), *cases.quick()) if one.name == name)
    # A small step first: it loads and allocates what does not depend on the batch.
    make_step(replace(case, n=64), method)()
    step, kept = make_step(case, method), []
    print(json.dumps(peak_bytes(lambda: kept.append(step()))))


if __name__ == "__main__":
    main()
