"""Rows of a CSV, TSV or JSONL file with the path of an image and a caption in each."""

import csv
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .pair import LeftOut, Pair, Place

DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*DELIMITERS, ".jsonl", ".ndjson")
# A row's first one of these counts: open_clip's names first.
IMAGE_COLUMNS = ("filepath", "path", "image", "file_name", "filename", "file")
CAPTION_COLUMNS = ("title", "caption", "text")
NO_IMAGE, NO_CAPTION, NO_OBJECT = "no path of an image", "no caption", "no JSON object"
LONGEST_FIELD = 1 << 24


def read_table(
    path: Path, left_out: LeftOut, image_column: str | None = None,
    caption_column: str | None = None,
) -> Iterator[Pair]:  # fmt: skip
    """Yields the rows of a table. Relative paths are relative to the table's folder.

    A caption in JSONL may be a list of captions.

    Raises:
        ValueError: no row has such columns, or the table is not UTF-8.
    """
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
            name = posixpath.normpath(image.replace(os.sep, "/"))
            yield Pair(name, Place(os.path.normpath(path.parent / image)), texts, origin)
    except (UnicodeDecodeError, csv.Error) as error:
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


def _rows(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each row with the number of its last line."""
    delimiter = DELIMITERS.get(path.suffix.lower())
    # A BOM, as spreadsheets write it, is no part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if delimiter is not None:
            csv.field_size_limit(LONGEST_FIELD)
            table = csv.DictReader(file, delimiter=delimiter)
            for row in table:
                yield table.line_num, row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                left_out.add(NO_OBJECT, f"line {number}")
