"""Plots of ranks in retrieval: their histogram, and R@k against k, each beside chance."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from .drawing import BLUE, ORANGE, tidy

COLOURS = (BLUE, ORANGE)
BINS = 16  # at most, of equal width on a logarithmic axis
POINTS = 200  # of the curve of chance at most


class Direction(NamedTuple):
    """The ranks of a direction of retrieval, which count from 0.

    answers: how many there are to choose from.
    chance: returns R@k of guessing for a k from 0 to `answers`.
    """

    name: str
    ranks: Tensor
    answers: int
    chance: Callable[[int], float]

    @property
    def label(self) -> str:
        return f"{self.name}, of {self.answers:,}"


def histogram(axes: Axes, directions: Sequence[Direction]) -> None:
    """Draws how often each rank occurs."""
    for direction, colour in zip(directions, COLOURS, strict=False):
        edges = _spread(1, direction.answers + 1, BINS + 1)
        found, _ = np.histogram(direction.ranks.cpu().numpy() + 1, edges)
        share = 100 * found / len(direction.ranks)
        axes.stairs(share, edges, label=direction.label, color=colour, fill=True, alpha=0.45)
        chance = 100 * np.diff([direction.chance(edge - 1) for edge in edges.tolist()])
        axes.stairs(chance, edges, label="chance", color=colour, ls=":")
    axes.set_ylabel("% of queries")
    _finish(axes, "Rank of the best right answer", "rank", "upper right")


def recall(axes: Axes, directions: Sequence[Direction]) -> None:
    """Draws R@k against k."""
    for direction, colour in zip(directions, COLOURS, strict=False):
        answers = direction.answers
        found = torch.bincount(direction.ranks.cpu(), minlength=answers).cumsum(0)
        share = 100 * found / len(direction.ranks)
        axes.plot(range(1, answers + 1), share, label=direction.label, color=colour, lw=1.5)
        ks = _spread(1, answers, POINTS).tolist()
        chance = [100 * direction.chance(k) for k in ks]
        axes.plot(ks, chance, label="chance", color=colour, ls=":")
    axes.set_ylim(0, 102)
    axes.set_ylabel("%")
    _finish(axes, "R@k", "k", "lower right")


def _spread(first: int, last: int, count: int) -> np.ndarray:
    """Returns at most `count` whole numbers, evenly on a logarithmic axis."""
    return np.unique(np.round(np.geomspace(first, last, count)).astype(int))


def _finish(axes: Axes, title: str, xlabel: str, legend: str) -> None:
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=7, loc=legend)
    tidy(axes, title, xlabel)
