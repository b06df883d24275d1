"""Time, speed-up and memory against the batch size, from the rows of a CSV, as a PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..losses import LOSSES
from .results import Row

# One colour for each family of methods: strong for fastclip, grey for dense losses.
STYLES: dict[str, tuple[str, str]] = {
    "open_clip": ("#d1495b", "-"),
    "dense": ("#8d99ae", "-"),
    "compiled": ("#8d99ae", "--"),
    "checkpoint": ("#edae49", "-"),
    "fastclip": ("#00798c", "-"),
    "fastclip budget=0": ("#5fb3bf", "--"),
    "fastclip torch": ("#30638e", ":"),
    "inf_cl": ("#9b5de5", "-"),
    "memeff": ("#9b5de5", "--"),
    "siglip_kernel": ("#9b5de5", ":"),
}
# The methods of the README's picture.
SUMMARY = ("open_clip", "compiled", "fastclip", "fastclip budget=0")
INK, GRID = "#2b2d42", "#dfe3ea"
TEXT = {
    "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": "#b8bfca",
}  # fmt: skip


def draw(rows: list[Row], path: Path) -> Path | None:
    """Writes three panels for each loss and returns the path; None if there are fewer than two
    sizes."""
    chosen = _plotted(rows)
    if len({row.n for row in chosen}) < 2:
        return None
    size = (5.25 * len(LOSSES), 11.5)
    with _figure(rows[-1], 3, len(LOSSES), size) as (figure, axes):
        for column, (loss, known) in enumerate(LOSSES.items()):
            own = [row for row in chosen if row.loss == loss]
            _panel(axes[0, column], own, "ms", "time, forward and backward")
            _panel(axes[1, column], own, "over_open_clip", "times faster than open_clip")
            _panel(axes[2, column], own, "peak_mib", "peak memory beyond the inputs")
            axes[0, column].set_title(known.label, fontsize=13, fontweight="bold", loc="left")
            axes[2, column].set_xlabel("batch size N")
        # Ratios span less than a decade, in which a logarithmic axis would label a single number.
        low, high = axes[1, 0].get_ylim()
        marks = [mark for mark in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50) if low <= mark <= high]
        axes[1, 0].set_yticks(marks)
        _legend(figure, axes, bottom=0.035, top=0.985)
        figure.savefig(path, dpi=140)
    return path


def draw_summary(rows: list[Row], path: Path) -> Path | None:
    """Writes two panels, time and memory of CLIP, and returns the path; None if there are fewer
    than two sizes."""
    chosen = [row for row in _plotted(rows) if row.loss == "clip" and row.method in SUMMARY]
    if len({row.n for row in chosen}) < 2:
        return None
    with _figure(rows[-1], 1, 2, (10.5, 4.4), title="CLIP, ") as (figure, axes):
        _panel(axes[0, 0], chosen, "ms", "time, forward and backward")
        _panel(axes[0, 1], chosen, "peak_mib", "peak memory beyond the inputs")
        for axis in axes.flat:
            axis.set_xlabel("batch size N")
        _legend(figure, axes, bottom=0.07, top=1.02)
        figure.savefig(path, dpi=140)
    return path


def _plotted(rows: list[Row]) -> list[Row]:
    """Square batches in float32 at D = 512 and scale 14.3, of methods that have a style."""
    return [
        row
        for row in rows
        if (row.m, row.d, row.dtype, row.data, row.mode)
        == (row.n, 512, "float32", "random", "both")
        and row.scale == 14.3
        and row.method in STYLES
        and row.n % 32 == 0  # 8191 and 8193 would lie on top of 8192
    ]


@contextmanager
def _figure(
    row: Row, panels: int, columns: int, size: tuple[float, float], title: str = ""
) -> Iterator[tuple[Any, Any]]:
    """A figure of rows of panels, with the machine of `row` above, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shared = "row" if panels > 1 else "none"
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            panels, columns, figsize=size, squeeze=False, sharex=shared, sharey=shared,
        )  # fmt: skip
        figure.suptitle(
            f"{title}float32, D = 512, scale 14.3  ·  {row.cpu}, {row.threads} threads  ·  "
            f"torch {row.torch}",
            x=0.1, y=0.99, ha="left", fontsize=10,
        )  # fmt: skip
        yield figure, axes
        plt.close(figure)


def _legend(figure: Any, axes: Any, bottom: float, top: float) -> None:
    """Adds one legend for all panels below them, which take the height from bottom to top."""
    handles = {}
    for axis in axes.flat:
        handles.update(dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)))
    ordered = [name for name in STYLES if name in handles]
    figure.legend(
        [handles[name] for name in ordered], ordered, loc="lower center", ncols=len(ordered),
        frameon=False, fontsize=9.5, handlelength=2.4, columnspacing=1.4,
    )  # fmt: skip
    figure.tight_layout(rect=(0, bottom, 1, top))


def _panel(axis: Any, rows: list[Row], column: str, title: str) -> None:
    for method, (colour, dashes) in STYLES.items():
        points = sorted(
            (row.n, getattr(row, column)) for row in rows
            if row.method == method and getattr(row, column) is not None
        )  # fmt: skip
        if points:
            ours = method.startswith("fastclip")
            axis.plot(
                *zip(*points, strict=True), dashes, color=colour, label=method, marker="o",
                markersize=4.5 if ours else 3.5, linewidth=2.2 if ours else 1.5,
                zorder=3 if ours else 2,
            )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", color=GRID, linewidth=0.8)
    axis.tick_params(which="both", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    sizes = sorted({row.n for row in rows if getattr(row, column) is not None})
    if sizes:
        axis.set_xticks(sizes, [str(n) for n in sizes], fontsize=9)
        axis.minorticks_off()
    axis.set_ylabel(title)
    axis.yaxis.set_major_formatter(TICKS[column])


def _duration(ms: float, _: int) -> str:
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms" if ms >= 1 else f"{ms * 1e3:g} us"


# Durations, ratios and sizes, which ticks have instead of powers of ten.
TICKS: dict[str, Callable[[float, int], str]] = {
    "ms": _duration,
    "over_open_clip": lambda value, _: f"{value:g}x",
    "peak_mib": lambda value, _: f"{value:g} MiB",
}
