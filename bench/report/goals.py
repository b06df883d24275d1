"""The goals for a CSV's device, and the verdict on each.

A goal whose rows are missing is "not measured".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cases import SCALES
from .goal import Goal
from .goals_cpu import CPU_GOALS
from .goals_gpu import GPU_GOALS
from .markdown import markdown
from .results import Row


@dataclass(frozen=True)
class Judged:
    """A goal, its figure at each scale, and the verdict: aim, floor, missed or not measured."""

    goal: Goal
    figures: list[float | None]
    verdict: str


def judged(rows: list[Row]) -> list[Judged]:
    """The verdict on every goal for the device of the rows."""
    found = []
    for goal in GPU_GOALS if any(row.on_gpu for row in rows) else CPU_GOALS:
        figures = [goal.figure([row for row in rows if row.scale == scale]) for scale in SCALES]
        known = [pair for pair in zip(figures, goal.aims, strict=True) if pair[0] is not None]
        verdict = "missed" if known else "not measured"
        if known and all(goal.reached(figure, goal.floor) for figure, _ in known):
            every = all(goal.reached(figure, aim) for figure, aim in known)
            verdict = "aim" if every else "floor"
        found.append(Judged(goal, figures, verdict))
    return found


def table_of(rows: list[Row]) -> str:
    """All goals as a Markdown table."""
    table_rows = []
    for one in judged(rows):
        goal = one.goal
        aims = [goal.form(aim) for aim in dict.fromkeys(goal.aims)]
        here = ["" if figure is None else goal.form(figure) for figure in one.figures]
        table_rows.append([goal.text, goal.form(goal.floor), ", ".join(aims), *here, one.verdict])
    header = ["goal", "floor", "aim", *(f"scale {scale:g}" for scale in SCALES), "reached"]
    return markdown(header, table_rows)
