"""The report of a run on one page: figures, goals, failures, and last the verdict.

The verdict comes last because remote output may be cut to its end.
"""

from __future__ import annotations

from collections import Counter

from ..report import results
from ..report.goals import judged
from ..report.markdown import duration, markdown, mebibytes, percent, times
from . import rows, tiles, winners
from .cases import GROUPS
from .steps import CUT, FAILED, NOT_RUN, Outcome, Session

MOST_FAILURES = 6  # of one step


def report(session: Session) -> str:
    """The page, also for a run that was cut."""
    parts = ["\n=== report"]
    found = measured(session)
    shown = ("again",) if session.again else ("headline", "engines")
    parts += [part for group in shown if (part := table_of(found, group))]
    if not session.again:
        found_tiles = winners.winners(session.out / tiles.FILE)
        parts += ["\n".join(map(str, found_tiles))] if found_tiles else []
        parts += [goals_of(found)] if found else []
    parts.append(steps_of(session.outcomes))
    parts += skipped(found)
    parts += [failures] if (failures := failures_of(session.outcomes)) else []
    return "\n\n".join([*parts, verdict(session)])


def measured(session: Session) -> list[results.Row]:
    """The rows of this run; the file may also hold rows of earlier runs."""
    path = rows.path_of(session.out, session.device, session.again)
    found = results.read(path) if path.exists() else []
    return [row for row in found if row.when >= session.began]


def table_of(found: list[results.Row], group: str) -> str:
    """A table of methods by cases: time, speed-up over open_clip or the dense loss, percentage of
    the GEMM limit, peak MiB."""
    keys, by_method = [], {}
    wanted = {(c.loss, c.m, c.dtype, c.scale, c.mode) for c in GROUPS[group]()}
    for row in found:
        key = (row.loss, row.m, row.dtype, row.scale, row.mode)
        if key not in wanted or row.n != row.m:
            continue
        if key not in keys:
            keys.append(key)
        by_method.setdefault(row.method, {})[key] = row
    if not keys:
        return ""
    short = {"bfloat16": "bf16", "float32": "fp32"}
    header = [f"{loss} {m >> 10}k {short[dtype]} {scale:g}" for loss, m, dtype, scale, _ in keys]
    table_rows = [
        [method, *(_cell(cells.get(key)) for key in keys)] for method, cells in by_method.items()
    ]
    return f"{group}\n{markdown([group, *header], table_rows)}"


def _cell(row: results.Row | None) -> str:
    if row is None:
        return ""
    if row.ms is None:
        return row.note.split(":")[0][:16] or "failed"
    over = row.over_open_clip or row.over_dense
    parts = [duration(row.ms), times(over), percent(row.fraction), mebibytes(row.peak_mib)]
    return " ".join(part.replace(" %", "%") for part in parts if part)


def goals_of(found: list[results.Row]) -> str:
    """A table of the goals that were measured; the verdict counts the others."""
    table_rows = []
    for one in judged(found):
        if one.verdict == "not measured":
            continue
        goal = one.goal
        here = ", ".join("-" if figure is None else goal.form(figure) for figure in one.figures)
        aim = goal.form(goal.aims[0])
        table_rows.append([goal.text, goal.form(goal.floor), aim, here, one.verdict])
    if not table_rows:
        return "goals: none was measured"
    return markdown(["goal", "floor", "aim", "at scale 14.3, 100", "reached"], table_rows)


def steps_of(outcomes: list[Outcome]) -> str:
    table_rows = [
        [o.step, o.status, f"{o.seconds:.0f} s" if o.seconds else "", o.note[:90]] for o in outcomes
    ]
    return markdown(["step", "status", "took", "note"], table_rows)


def skipped(found: list[results.Row]) -> list[str]:
    reasons = [f"{row.method} ({row.note})" for row in found if row.mode == "skipped"]
    return [f"not measured: {'; '.join(dict.fromkeys(reasons))}"] if reasons else []


def failures_of(outcomes: list[Outcome]) -> str:
    messages = []
    for outcome in outcomes:
        told = [message[:200] for message in outcome.failures[:MOST_FAILURES]]
        more = len(outcome.failures) - len(told)
        messages += [f"{outcome.step}: {message}" for message in told]
        messages += [f"{outcome.step}: and {more} more, see the log"] if more > 0 else []
    return "\n".join(messages)


def verdict(session: Session) -> str:
    """One line: how the steps ended, then the number of goals reached and missed."""
    outcomes = session.outcomes
    failed = [o.step for o in outcomes if o.status == FAILED]
    cut = [o.step for o in outcomes if o.status == CUT]
    left = [o.step for o in outcomes if o.status == NOT_RUN]
    passed = len(outcomes) - len(failed) - len(cut) - len(left)
    told = [f"{passed} of {len(outcomes)} steps passed"]
    for text, names in (("FAILED", failed), ("cut", cut), ("not run", left)):
        told += [f"{text}: {', '.join(names)}"] if names else []
    found = [] if session.again else measured(session)
    if found:
        counts = Counter(one.verdict for one in judged(found))
        order = ("aim", "floor", "missed", "not measured")
        told.append("goals: " + ", ".join(f"{counts[name]} {name}" for name in order))
    return f"verdict: {'; '.join(told)}"


def exit_status(session: Session) -> int:
    return 1 if any(o.status == FAILED for o in session.outcomes) else 0
