"""A CSV that is written as a run goes on, so that an interrupted run leaves its rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class Table:
    """Rows under a header. path: where they go; None: nowhere."""

    def __init__(self, path: Path | None, header: Sequence[str]) -> None:
        self.path, self.header, self.rows = path, header, []

    def add(self, *row: Any) -> None:
        self.replace([*self.rows, row])

    def replace(self, rows: Iterable[Sequence[Any]]) -> None:
        self.rows = list(rows)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.header)
            writer.writerows([_short(value) for value in row] for row in self.rows)


def _short(value: Any) -> Any:
    return f"{value:.1f}" if isinstance(value, float) else value
