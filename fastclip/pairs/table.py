"""Rows of a CSV, TSV or JSONL file with the path of an image and a caption in each."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from .pair import LeftOut, Pair, Place

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".jsonl", ".ndjson")
# A row's first one of these counts: open_clip's names first.
IMAGE_COLUMNS = ("filepath", "path", "image", "file_name", "filename", "file")
CAPTION_COLUMNS = ("title", "caption", "text")
NO_IMAGE, NO_CAPTION, NO_OBJECT = "no path of an image", "no caption", "no JSON object"
MORE_CELLS, ROWS_INSIDE = "more cells than the header", "rows inside a quoted cell"
LONGEST_FIELD = 1 << 24
WHOLE_ROWS = 3  # lines of a quoted cell that are all rows, by which a forgotten quote is known


def read_table(
    path: Path, left_out: LeftOut, image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Pair]:  # fmt: skip
    """Yields the rows of a table. Relative paths are relative to the table's folder.

    A caption in JSONL may be a list of captions. Absolute paths outside of the table's folder are
    named from their common folder on, so that data may move.

    Raises:
        ValueError: no row has such columns, the table is not UTF-8, or its quotes are wrong.
    """
    folder = os.path.abspath(path.parent)
    elsewhere: list[Pair] = []
    for pair in _pairs(path, folder, left_out, image_column, caption_column):
        if os.path.isabs(pair.name):
            elsewhere.append(pair)
        else:
            yield pair
    if elsewhere:
        common = os.path.commonpath([os.path.dirname(pair.place.file) for pair in elsewhere])
        for pair in elsewhere:
            yield replace(pair, name=_slashes(os.path.relpath(pair.place.file, common)))


def _pairs(
    path: Path, folder: str, left_out: LeftOut, image_column: str | None,
    caption_column: str | None,
) -> Iterator[Pair]:  # fmt: skip
    """Yields the rows, named relative to the table, or absolutely if they are written so and are
    outside of its folder."""
    wanted = {
        "image paths": ((image_column,) if image_column else IMAGE_COLUMNS, "--image-column"),
        "captions": ((caption_column,) if caption_column else CAPTION_COLUMNS, "--caption-column"),
    }
    missing, columns = set(wanted), {}
    try:
        for number, row in _rows(path, left_out):
            columns |= row
            missing -= {what for what in missing if any(name in row for name in wanted[what][0])}
            image, captions = (_first(row, names) for names, _ in wanted.values())
            image = image.strip() if isinstance(image, str) else ""
            texts = captions if isinstance(captions, list) else [captions]
            texts = tuple(t.strip() for t in texts if isinstance(t, str) and t.strip())
            origin = f"line {number} {image}".rstrip()
            if not image or not texts:
                left_out.add(NO_CAPTION if image else NO_IMAGE, origin)
                continue
            file = os.path.abspath(os.path.join(folder, image))
            name = os.path.relpath(file, folder)
            if os.path.isabs(image) and name.startswith(os.pardir + os.sep):
                name = file
            yield Pair(_slashes(name), Place(file), texts, origin)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a table in UTF-8: {error}") from None
    for what in wanted if columns else ():
        names, option = wanted[what]
        if what in missing:
            raise ValueError(
                f"{path} must have a column of {what} named {' or '.join(names)}, got "
                f"{', '.join(str(name) for name in columns)}; {option} names another"
            )


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _slashes(path: str) -> str:
    return path.replace(os.sep, "/")


def _rows(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row with the number of its last line."""
    # A BOM, as spreadsheets write it, is no part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() in DELIMITERS:
            yield from _rows_of_cells(file, path, left_out)
        else:
            yield from _rows_of_json(file, left_out)


def _rows_of_cells(
    file: TextIO, path: Path, left_out: LeftOut
) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = DELIMITERS[path.suffix.lower()]
    csv.field_size_limit(LONGEST_FIELD)
    # TSV has no quoting: a caption may begin with a quote, which would else swallow what follows.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    table = csv.DictReader(file, delimiter=delimiter, quoting=quoting, strict=True)
    first = 1
    try:
        first = table.line_num + 1 if table.fieldnames else 1
        for row in table:
            origin = f"line {table.line_num}"
            if any(cell.strip() for cell in row.pop(None, ())):
                left_out.add(MORE_CELLS, origin)
            elif any(_holds_rows(cell, delimiter, len(row)) for cell in row.values() if cell):
                left_out.add(ROWS_INSIDE, f"lines {first} to {table.line_num}")
            else:
                yield table.line_num, row
            first = table.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path} must be a table whose quotes are closed, and doubled inside of a quoted cell; "
            f"the row from line {first} on is not: {error}"
        ) from None


def _holds_rows(cell: str, delimiter: str, columns: int) -> bool:
    """Returns whether the lines between the first and the last one of a cell are rows."""
    lines = cell.splitlines()[1:-1]
    return len(lines) >= WHOLE_ROWS and all(
        line.count(delimiter) >= max(1, columns - 1) for line in lines
    )


def _rows_of_json(file: TextIO, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        else:
            left_out.add(NO_OBJECT, f"line {number}")
