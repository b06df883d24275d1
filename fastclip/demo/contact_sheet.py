"""A contact sheet: captions, and the images that retrieval finds for each."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from .drawing import GREEN, GREY, INK

LONGEST = 120  # characters of a caption at most


class Found(NamedTuple):
    """A caption with the numbers of the nearest images, and of the right ones."""

    caption: str
    nearest: list[int]
    right: list[int]


def contact_sheet(
    figure: SubFigure, title: str, rows: Sequence[Found], image: Callable[[int], np.ndarray]
) -> None:
    """Draws a row for each caption, which all have as many nearest images.

    image: returns an image (H, W, 3) by its number.
    """
    figure.text(0.02, 0.985, title, fontsize=11, fontweight="bold", va="top")
    figure.text(
        0.02, 0.96, "Captions chosen at random. A right image has a green frame; if none is right, "
        "a right one follows in grey.", color=GREY, va="top",
    )  # fmt: skip
    most = max((len(found.nearest) for found in rows), default=0)
    grid = figure.subplots(max(1, len(rows)), most + 2, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.985, bottom=0.02, top=0.93, hspace=0.12, wspace=0.06)
    for axes in grid.flat:
        axes.axis("off")
    for row, found in zip(grid, rows, strict=False):
        caption = "\n".join(textwrap.wrap(_short(found.caption), 20))
        # A "$" would begin a formula.
        row[0].text(0, 0.5, caption, va="center", transform=row[0].transAxes, parse_math=False)
        for axes, number in zip(row[1:], found.nearest, strict=False):
            _show(axes, image(number), GREEN if number in found.right else None)
        if not set(found.nearest) & set(found.right):
            _show(row[-1], image(found.right[0]), GREY)


def _short(caption: str) -> str:
    """Cuts by characters: Chinese and Japanese have no spaces between words."""
    caption = " ".join(caption.split())
    return caption if len(caption) <= LONGEST else caption[: LONGEST - 1].rstrip() + "…"


def _show(axes: Axes, image: np.ndarray, frame: str | None) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.axis("on")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame or INK, linewidth=3)
