"""The CSV of a machine as Markdown: all rows for a terminal, the main tables for a page.

Every figure comes from the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from ..cases import CONTRAST, DTYPES, PEERS, SCALES
from ..losses import LOSSES, loss_of
from ..methods.registry import METHODS
from . import goals, results
from .markdown import duration, error, markdown, mebibytes, percent, three, times
from .results import Row

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
DTYPE_NAMES = {
    "float32": "float32",
    "bfloat16": "bfloat16 features",
    "autocast": "bfloat16 autocast",
}
PAGE_SIZE = (8192, 512)  # N, D of the first table
GPU_SIZES = ((32768, 768), (65536, 768))  # N, D of the tables of GPUs
PAGE_METHODS = (
    "open_clip", "compiled", "checkpoint", *PEERS, "fastclip", "fastclip triton", "fastclip cuda",
)  # fmt: skip


def committed() -> list[Path]:
    """The CSVs of rows in bench/results, without the other files of `make gpu`."""
    found = sorted(results.RESULTS.glob("*.csv"))
    return [path for path in found if not path.name.startswith("gpu-")]


def spread(row: Row) -> str:
    """Half the distance between the quartiles, in percent of the median."""
    return "" if row.ms is None else f"{50 * (row.high_ms - row.low_ms) / row.ms:.0f} %"


def provenance(rows: list[Row]) -> str:
    """The machine, software and days of the rows, in one sentence."""
    row = rows[-1]
    days = sorted({one.when[:10] for one in rows if one.when})
    day = days[0] if len(days) < 2 else f"{days[0]} to {days[-1]}"
    threads = f"{row.threads} threads, " if row.threads else ""
    return (
        f"{row.cpu}, {threads}{row.capability}; torch {row.torch}, "
        f"Python {row.python}; extension built with {row.compiler}; {day}."
    )


def report(rows: list[Row]) -> str:
    """All rows, in one table for each loss, shape, dtype and direction."""
    if not rows:
        return "Nothing was measured."
    parts = [f"# {rows[-1].machine}", provenance(rows)]
    if met := goals.table_of(rows):
        parts += ["## Goals", met]
    if met := goals.table_of_family(rows):
        parts += ["## Goals of the family", met]
    measured = [row for row in rows if row.mode != "skipped"]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in measured:
        key = (row.loss, row.m, row.n, row.d, row.dtype, row.data, row.mode)
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        parts += [f"## {_title(group[0])}", _group(group)]
    return "\n\n".join(parts + _skipped(rows))


def _title(row: Row) -> str:
    shape = f"{row.m} x {row.n}" if row.m != row.n else f"N = {row.n}"
    mode = "forward and backward" if row.mode == "both" else "forward"
    data = "" if row.data == "random" else f", {row.data} pairs"
    label = loss_of(row.loss).label
    return f"{label}, {shape}, D = {row.d}, {DTYPE_NAMES[row.dtype]}{data}: {mode}"


def _group(rows: list[Row]) -> str:
    header = ["scale", "method", "time", "+-", "x dense", "x open_clip", "x compiled", "passes"]
    header += ["GFLOP/s", "of limit", "MiB", "rest MiB", "loss", "dx", "dy", "dscale", "note"]
    table_rows = [
        [
            f"{row.scale:g}", row.method, duration(row.ms), spread(row), times(row.over_dense),
            times(row.over_open_clip), times(row.over_compiled), f"{row.passes:.3g}",
            "" if row.gflops is None else three(row.gflops), percent(row.fraction),
            mebibytes(row.peak_mib), mebibytes(row.rest_mib), error(row.err_loss),
            error(row.err_dx), error(row.err_dy), error(row.err_dscale), row.note,
        ]
        for row in rows
    ]  # fmt: skip
    filled = [k for k in range(len(header)) if any(cells[k] for cells in table_rows)]
    return markdown(
        [header[k] for k in filled], [[cells[k] for k in filled] for cells in table_rows]
    )


def _skipped(rows: list[Row]) -> list[str]:
    reasons = [f"{row.method} ({row.note})" for row in rows if row.mode == "skipped"]
    return [f"Not measured here: {'; '.join(reasons)}."] if reasons else []


def into_page(page: Path, paths: Iterable[Path]) -> None:
    """Replaces what stands between the markers by the tables of `paths`."""
    body = "\n\n".join(essentials(results.read(path), path) for path in paths)
    page.write_text(between(page, BEGIN, END, body))


def between(page: Path, begin: str, end: str, body: str) -> str:
    """The file's text, with `body` between the two markers.

    Raises:
        SystemExit: if the file does not hold the two markers in their order.
    """
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page}: expected the markers {begin} and {end}, one after the other")
    return f"{before}{begin}\n{body}\n{end}{after}"


def essentials(rows: list[Row], path: Path) -> str:
    """The tables for the page: one large batch, all sizes, errors, goals."""
    skipped = _skipped(rows)
    rows = results.of_losses(rows, LOSSES)
    parts = [f"**{rows[-1].machine}**: {provenance(rows)}"]
    columns = (
        ', at scale 14.3 and at 100. MiB are beyond the inputs, gradients included. "Of limit" is '
        "the time of the required matrix products, at this run's rate, over the measured time:"
    )
    for n, d in (PAGE_SIZE, *GPU_SIZES):
        if large := _large_batch(rows, n, d):
            parts += [f"Forward and backward, N = {n}, D = {d}{columns}", large]
            columns = ":"
    if own := _on_contrast(rows):
        parts += [
            "The same losses written on `contrast`, also with ids and with a margin for false "
            "negatives that leave no pair out; forward and backward, in the same rounds (in "
            "brackets: times fastclip's time):",
            own,
        ]
    for loss in LOSSES:
        if sizes := _sizes(rows, loss):
            parts += [
                f"{loss_of(loss).label} against the batch size, float32, D = 512, scale 14.3, "
                "forward and backward (in brackets: speed-up over open_clip):",
                sizes,
            ]
    if errors := _errors(rows):
        parts += ["Relative error of the image gradient and of dscale against float64:", errors]
    if met := goals.table_of(rows):
        parts += ["Goals, and what this machine reaches:", met]
    picture = path.with_suffix(".png")
    if picture.exists():
        parts.append(f"![Time and memory against N](../bench/results/{picture.name})")
    parts += skipped
    parts.append(f"All rows, with quartiles: `bench/results/{path.name}`; `make bench ARGS=table`.")
    return "\n\n".join(parts)


def _pick(rows: list[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def _one(rows: list[Row], **wanted: object) -> Row:
    found = _pick(rows, **wanted)
    return found[0] if found else Row()


def _large_batch(rows: list[Row], n: int, d: int) -> str:
    table_rows = []
    for loss in LOSSES:
        for dtype in DTYPES:
            for method in PAGE_METHODS:
                case = dict(loss=loss, m=n, n=n, d=d, dtype=dtype, data="random", mode="both")
                low = _one(rows, **case, scale=14.3, method=method)
                high = _one(rows, **case, scale=100.0, method=method)
                if low.ms is None and high.ms is None:
                    continue
                table_rows.append(
                    [
                        f"{loss_of(loss).label}, {dtype}", method, duration(low.ms),
                        duration(high.ms), times(low.over_open_clip), times(high.over_open_clip),
                        times(low.over_compiled), percent(low.fraction), percent(high.fraction),
                        mebibytes(low.peak_mib),
                    ]
                )  # fmt: skip
    header = ["loss", "method", "14.3", "100", "x open_clip", "at 100", "x compiled", "of limit"]
    return markdown([*header, "at 100", "MiB"], table_rows) if table_rows else ""


def _on_contrast(rows: list[Row]) -> str:
    n, d = PAGE_SIZE
    methods = ("fastclip", *CONTRAST)
    table_rows = []
    for loss, dtype, scale in itertools.product(LOSSES, DTYPES, SCALES):
        case = dict(loss=loss, m=n, n=n, d=d, dtype=dtype, data="random", scale=scale, mode="both")
        own, *others = (_one(rows, **case, method=method) for method in methods)
        if own.ms is None or all(row.ms is None for row in others):
            continue
        cells = [
            "" if row.ms is None else f"{duration(row.ms)} ({times(row.ms / own.ms)})"
            for row in others
        ]
        label = f"{loss_of(loss).label}, {dtype}, scale {scale:g}"
        table_rows.append([label, duration(own.ms), *cells])
    return markdown([f"N = {n}, D = {d}", *methods], table_rows) if table_rows else ""


def _sizes(rows: list[Row], loss: str) -> str:
    case = dict(loss=loss, d=512, dtype="float32", data="random", scale=14.3, mode="both")
    square = [row for row in _pick(rows, **case) if row.m == row.n and row.ms is not None]
    # Leaves out 8191 and 8193, whose figures are those of 8192.
    square = [row for row in square if row.n % 32 == 0]
    sizes = sorted({row.n for row in square})
    table_rows = []
    # Methods that only `make gpu` adds come last.
    for method in dict.fromkeys([*METHODS, *(row.method for row in square)]):
        if method in CONTRAST:  # these have a table of their own
            continue
        own = {row.n: row for row in square if row.method == method}
        if not own:
            continue
        cells = [own.get(n, Row()) for n in sizes]
        table_rows.append([method, *(_time_and_ratio(row) for row in cells)])
    return markdown(["method", *map(str, sizes)], table_rows) if table_rows else ""


def _time_and_ratio(row: Row) -> str:
    if row.over_open_clip is None or row.method == "open_clip":
        return duration(row.ms)
    return f"{duration(row.ms)} ({times(row.over_open_clip)})"


def _errors(rows: list[Row]) -> str:
    methods = ("open_clip", "dense", "fastclip")
    table_rows = []
    for loss in LOSSES:
        for data, dtype, scale in (
            ("random", "float32", 14.3),
            ("random", "float32", 100.0),
            ("separated", "float32", 14.3),
            ("random", "bfloat16", 14.3),
            ("random", "autocast", 14.3),
            ("random", "autocast", 100.0),
        ):
            case = dict(loss=loss, m=2048, n=2048, d=512, dtype=dtype, data=data, scale=scale)
            found = [_one(rows, **case, mode="both", method=method) for method in methods]
            if all(row.err_dx is None for row in found):
                continue
            label = f"{loss_of(loss).label}, {dtype}, {data}, scale {scale:g}"
            cells = [error(row.err_dx) for row in found] + [error(row.err_dscale) for row in found]
            table_rows.append([label, *cells])
    header = ["N = 2048, D = 512", *(f"dx {name}" for name in methods)]
    return (
        markdown([*header, *(f"dscale {name}" for name in methods)], table_rows)
        if table_rows
        else ""
    )
