"""Measures the cases.

The methods of a case are timed in interleaved rounds in this process. Peak memory comes from a
process for each, as in `measure.memory`:

    python -m bench.retrieval.runner CASE METHOD
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone

from ..measure import plan
from ..measure.memory import in_fresh_process, peak_bytes
from ..measure.plan import Options
from ..measure.timing import interleaved
from .cases import Case, make_step
from .row import Row

SECONDS, QUICK_SECONDS = 10.0, 0.5
MIB = 2**20


def run(cases: list[Case], options: Options) -> list[Row]:
    """Measures every case; returns the new rows, which are also in the CSV."""
    return plan.run(cases, options, Row, _measure)


def _measure(case: Case, machine: Row, options: Options) -> list[Row]:
    steps, notes = {}, {}
    for method in case.methods:
        try:
            make_step(replace(case, m=256, n=256), method)()
            steps[method] = make_step(case, method)
        except ImportError as error:
            notes[method] = str(error)
    timings = interleaved(steps, options.seconds)
    rows = []
    for method in case.methods:
        row = replace(
            machine, when=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"), task=case.task,
            k=case.k, m=case.m, n=case.n, d=case.d, dtype=case.dtype, method=method,
            note=notes.get(method, ""),
        )  # fmt: skip
        if timing := timings.get(method):
            row = replace(
                row, ms=1e3 * timing.median, low_ms=1e3 * timing.low, high_ms=1e3 * timing.high,
                rounds=timing.rounds, over_product=timing.median / timings["product"].median,
            )  # fmt: skip
            if options.memory:
                row.peak_mib, row.note = _peak(case, method)
        rows.append(row)
    return rows


def _peak(case: Case, method: str) -> tuple[float | None, str]:
    """The peak of a step in MiB, in a fresh process, or None with the reason."""
    text = json.dumps(asdict(case))
    peak, reason = in_fresh_process("bench.retrieval.runner", text, method)
    return None if peak is None else peak / MIB, reason


def main() -> None:
    text, method = sys.argv[1:]
    fields = json.loads(text)
    case = Case(**{**fields, "methods": tuple(fields["methods"])})
    # A small step first: it loads and allocates what does not depend on the size.
    make_step(replace(case, m=256, n=256), method)()
    step, kept = make_step(case, method), []
    print(json.dumps(peak_bytes(lambda: kept.append(step()))))


if __name__ == "__main__":
    main()
