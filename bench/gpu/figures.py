"""The files of a run that are no rows of the bench: plain CSVs, written line by line.

A line is one write to a file opened for appending, so several processes may share a file, and
whatever was written stays if the process is killed.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

# Rates of the card, times of kernels and counters of Nsight Compute share one file.
FIGURES = ("step", "subject", "name", "value", "unit")


def start(path: Path, columns: Iterable[str]) -> None:
    """An empty file with its header; an earlier one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",".join(columns) + "\n")


def append(path: Path, row: Mapping[str, object], columns: Iterable[str] = FIGURES) -> None:
    """Adds one line; `row` may lack columns, but has no others."""
    columns = list(columns)
    if unknown := set(row) - set(columns):
        raise ValueError(f"{path.name}: expected columns of {columns}, got {sorted(unknown)}")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([_text(row.get(name, "")) for name in columns])
    if not path.exists():
        start(path, columns)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, buffer.getvalue().encode())
    finally:
        os.close(descriptor)


def _text(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())  # an error's message is one line here


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a file; none where there is no file. A line that a cut left half is dropped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [line for line in csv.DictReader(file) if None not in line.values()]


def reason(error: BaseException, most: int = 300) -> str:
    """An error in one line: what began it, for a compiler's own message is a page of source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def replace(path: Path, rows: Iterable[Mapping[str, object]], columns: Iterable[str]) -> None:
    """Writes all of a file in one step: a cut leaves the old one or the new one."""
    columns = list(columns)
    partial = path.with_suffix(".partial")
    start(partial, columns)
    for row in rows:
        append(partial, row, columns)
    partial.replace(path)
