"""Reads and writes the CSVs of a run that are not rows of the benchmark.

Each row is one write to a file opened for appending. Several processes may therefore share a file,
and rows survive if the process is killed.
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
    """Writes an empty file with its header, in place of an earlier one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(",".join(columns) + "\n")


def append(path: Path, row: Mapping[str, object], columns: Iterable[str] = FIGURES) -> None:
    """Adds one row; it may lack columns, but an unknown one is an error."""
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
    return " ".join(text.split())  # puts error messages on one line


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, if it exists. A row that a cut left incomplete is dropped."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def reason(error: BaseException, most: int = 300) -> str:
    """The first cause of an error, in one line: a compiler's own message is a page of source."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def replace(path: Path, rows: Iterable[Mapping[str, object]], columns: Iterable[str]) -> None:
    """Replaces a file atomically: a cut leaves either the old or the new one."""
    columns = list(columns)
    partial = path.with_suffix(".partial")
    start(partial, columns)
    for row in rows:
        append(partial, row, columns)
    partial.replace(path)
