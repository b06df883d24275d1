"""The README's three small tables: one large batch, time and memory against N, and a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..losses import LOSSES, loss_of
from . import results
from .markdown import duration, markdown, mebibytes, times
from .results import Row
from .table import between, provenance

BEGIN, END = "<!-- summary:begin -->", "<!-- summary:end -->"
METHODS = ("open_clip", "compiled", "fastclip")
LARGE = (8192, 512)  # N, D
GPU_SIZES = ((32768, 768), (65536, 768))


def into_readme(readme: Path, paths: Iterable[Path]) -> None:
    """Replaces the text between the markers by the tables of the CSVs."""
    files = [results.of_losses(results.read(path), LOSSES) for path in paths]
    on_gpu = [rows for rows in files if any(row.on_gpu for row in rows)]
    parts = [cpu(rows) for rows in files if rows not in on_gpu] + [gpu(rows) for rows in on_gpu]
    readme.write_text(between(readme, BEGIN, END, "\n\n".join(parts)))


def cpu(rows: list[Row]) -> str:
    """Two tables of a CPU: one large batch, and CLIP against N."""
    n, d = LARGE
    machine = f"`{rows[-1].machine}`: {provenance(rows)}"
    return "\n\n".join([
        f"{machine} Forward and backward at scale 14.3; MiB beyond the inputs, gradients included.",
        f"N = {n}, D = {d}:",
        _batch(rows, METHODS, [LARGE], ("float32", "bfloat16")),
        "CLIP, float32, D = 512, against N:",
        _sizes(rows),
    ])  # fmt: skip


def gpu(rows: list[Row]) -> str:
    """One table of a GPU: its large batches."""
    machine = f"`{rows[-1].machine}`: {provenance(rows)}"
    return "\n\n".join([
        f"{machine} Forward and backward at scale 14.3; MiB beyond the inputs, gradients included.",
        _batch(rows, METHODS, GPU_SIZES, ("bfloat16",)),
    ])  # fmt: skip


def _batch(
    rows: list[Row], methods: tuple[str, ...], sizes: Iterable[tuple[int, int]],
    dtypes: tuple[str, ...],
) -> str:  # fmt: skip
    table_rows = []
    several = len(list(sizes)) > 1
    for n, d in sizes:
        for loss in LOSSES:
            for dtype in dtypes:
                case = dict(loss=loss, m=n, n=n, d=d, dtype=dtype)
                name = f"{loss_of(loss).label}, {dtype}" + (
                    f", N = {n}, D = {d}" if several else ""
                )
                table_rows += [[name, *_cells(row)] for row in _rows(rows, methods, **case)]
    return markdown(["loss", "method", "time", "x open_clip", "MiB"], table_rows)


def _cells(row: Row) -> list[str]:
    return [row.method, duration(row.ms), times(row.over_open_clip), mebibytes(row.peak_mib)]


def _sizes(rows: list[Row]) -> str:
    case = dict(loss="clip", d=512, dtype="float32")
    sizes = sorted({row.n for row in rows if row.m == row.n and row.n % 128 == 0})
    table_rows = []
    for method in METHODS:
        cells = []
        for n in sizes:
            found = _rows(rows, (method,), m=n, n=n, **case)
            figures = (duration(found[0].ms), mebibytes(found[0].peak_mib)) if found else ()
            cells.append(", ".join(filter(None, figures)))
        table_rows.append([method, *cells])
    kept = [k for k in range(len(sizes)) if any(cells[k + 1] for cells in table_rows)]
    header = ["time, MiB", *(str(sizes[k]) for k in kept)]
    return markdown(header, [[cells[0], *(cells[k + 1] for k in kept)] for cells in table_rows])


def _rows(rows: list[Row], methods: tuple[str, ...], **wanted: object) -> list[Row]:
    """The measured rows of a case at scale 14.3, in the order of the methods."""
    wanted = dict(data="random", mode="both", scale=14.3, **wanted)
    found = [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
    by_method = {row.method: row for row in found if row.ms is not None}
    return [by_method[method] for method in methods if method in by_method]
