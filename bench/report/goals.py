"""The goals for a CSV's device, and the verdict on each.

A goal whose rows are missing is "not measured".
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cases import SCALES
from ..losses import FAMILY
from .goal import Goal
from .goals_cpu import CPU_GOALS
from .goals_family import family_goals
from .goals_gpu import GPU_GOALS
from .markdown import markdown
from .results import Row, of_losses


@dataclass(frozen=True)
class Judged:
    """A goal, its figure at each scale, and the verdict: aim, floor, missed or not measured."""

    goal: Goal
    figures: list[float | None]
    verdict: str


def judged(rows: list[Row], goals: list[Goal] | None = None) -> list[Judged]:
    """The verdict on every goal; by default on those for the device of the rows."""
    found = []
    if goals is None:
        goals = GPU_GOALS if any(row.on_gpu for row in rows) else CPU_GOALS
    for goal in goals:
        figures = [goal.figure([row for row in rows if row.scale == scale]) for scale in SCALES]
        known = [pair for pair in zip(figures, goal.aims, strict=True) if pair[0] is not None]
        verdict = "missed" if known else "not measured"
        if known and all(goal.reached(figure, goal.floor) for figure, _ in known):
            every = all(goal.reached(figure, aim) for figure, aim in known)
            verdict = "aim" if every else "floor"
        found.append(Judged(goal, figures, verdict))
    return found


def table_of_family(rows: list[Row]) -> str:
    """The goals of the family as a Markdown table; empty if it was not measured."""
    mine = of_losses(rows, FAMILY)
    return table_of(mine, family_goals()) if mine else ""


def table_of(rows: list[Row], goals: list[Goal] | None = None) -> str:
    """All goals as a Markdown table."""
    table_rows = []
    for one in judged(rows, goals):
        goal = one.goal
        aims = [goal.form(aim) for aim in dict.fromkeys(goal.aims)]
        here = ["" if figure is None else goal.form(figure) for figure in one.figures]
        table_rows.append([goal.text, goal.form(goal.floor), ", ".join(aims), *here, one.verdict])
    header = ["goal", "floor", "aim", *(f"scale {scale:g}" for scale in SCALES), "reached"]
    return markdown(header, table_rows)
