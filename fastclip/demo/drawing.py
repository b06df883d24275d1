"""The looks that all figures share."""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to a file without a window

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GREY, GREEN, BLUE, ORANGE = "#1f2933", "#7b8794", "#1a7f37", "#2563eb", "#f59e0b"
STYLE = {"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY}

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "STYLE", "plt", "save", "tidy", "tidy_steps"]


def tidy(axes: Axes, title: str, xlabel: str) -> None:
    """Sets the title and the looks of a plot."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def tidy_steps(axes: Axes, title: str) -> None:
    """Sets the title and the looks of a curve over steps."""
    tidy(axes, title, "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save(figure: Figure, path: Path) -> None:
    """Writes and closes a figure. Characters that the font lacks are boxes, without a warning for
    each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path)
    plt.close(figure)
