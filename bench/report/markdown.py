"""Markdown tables, and figures as text; an unknown figure is an empty cell.

This file knows nothing of what the figures mean.
"""

from __future__ import annotations

import math


def markdown(header: list[str], table_rows: list[list[str]]) -> str:
    """A Markdown table that is also aligned as plain text: words left, figures right."""
    widths = [max(len(cells[k]) for cells in [header, *table_rows]) for k in range(len(header))]
    right = [all(_is_figure(cells[k]) for cells in table_rows) for k in range(len(header))]

    def row(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if figure else cell.ljust(width)
            for cell, width, figure in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if figure else "-")
        for width, figure in zip(widths, right, strict=True)
    )
    return "\n".join([row(header), f"|{rule}|", *map(row, table_rows)])


def _is_figure(cell: str) -> bool:
    return cell == "" or cell[0].isdigit()


def duration(ms: float | None) -> str:
    """A time in three digits, with its unit."""
    if ms is None:
        return ""
    for size, unit in ((1e3, "s"), (1.0, "ms"), (1e-3, "us")):
        if ms >= size:
            return f"{three(ms / size)} {unit}"
    return f"{ms * 1e6:.0f} ns"


def three(value: float) -> str:
    """A number in three digits."""
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def times(value: float | None) -> str:
    """A ratio of times: `2.1x`."""
    return "" if value is None else f"{value:.2f}x" if value < 9.995 else f"{value:.0f}x"


def mebibytes(value: float | None) -> str:
    """A size in MiB, without the unit."""
    return "" if value is None else f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def error(value: float | None) -> str:
    """A relative error in two digits."""
    return "" if value is None else f"{value:.1e}"


def percent(value: float | None) -> str:
    """A fraction in whole percent, rounded down: 79.6 % has not reached 80."""
    return "" if value is None else f"{math.floor(100 * value + 1e-9)} %"
