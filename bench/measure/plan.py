"""Measures the cases of a plan one by one and writes each finished one into the CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ..report import results
from . import progress


class Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)
R = TypeVar("R", bound=results.Provenance)


@dataclass
class Options:
    """How a plan is run: each case is timed for `seconds`."""

    path: Path
    seconds: float
    memory: bool = True


def run(
    plan: Iterable[C], options: Options, row_class: type[R],
    measure: Callable[[C, R, Options], list[R]],
) -> list[R]:  # fmt: skip
    """Calls `measure` with each case and a row that names the machine; returns the new rows, which
    are also in the CSV."""
    plan = list(plan)
    machine = results.machine_row(row_class=row_class)
    old = results.read(options.path, row_class) if options.path.exists() else []
    rows: list[R] = []
    with progress.bar(len(plan)) as bar:
        for case in plan:
            bar.set_description(case.name)
            rows += measure(case, machine, options)
            results.write(options.path, results.merge(old, rows), row_class)
            bar.update(1)
    return rows
