"""Plots of ranks in retrieval: their histogram, and R@k against k, each beside chance."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from .drawing import BLUE, GREY, ORANGE, tidy

COLOURS = (BLUE, ORANGE)
BINS = 16  # at most, of equal width on a logarithmic axis


def histogram(axes: Axes, ranks: Mapping[str, Tensor], count: int) -> None:
    """Draws how often each rank occurs, by direction. Ranks count from 0, among `count` answers;
    guessing gives all equally often."""
    edges = np.unique(np.round(np.geomspace(1, count + 1, BINS + 1)).astype(int))
    for (name, of_queries), colour in zip(ranks.items(), COLOURS, strict=False):
        found, _ = np.histogram(of_queries.cpu().numpy() + 1, edges)
        axes.stairs(
            100 * found / len(of_queries), edges, label=name, color=colour, fill=True, alpha=0.45
        )
    axes.stairs(100 * np.diff(edges) / count, edges, label="chance", color=GREY, ls=":")
    axes.set_xscale("log")
    axes.set_ylabel("% of queries")
    axes.legend(frameon=False)
    tidy(axes, "Rank of the right answer", f"rank among {count:,}")


def recall(axes: Axes, ranks: Mapping[str, Tensor], count: int) -> None:
    """Draws R@k against k, by direction."""
    ks = torch.arange(1, count + 1)
    for (name, of_queries), colour in zip(ranks.items(), COLOURS, strict=False):
        found = torch.bincount(of_queries.cpu(), minlength=count).cumsum(0)[:count]
        axes.plot(ks, 100 * found / len(of_queries), label=name, color=colour, lw=1.5)
    axes.plot(ks, 100 * ks / count, label="chance", color=GREY, ls=":")
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    axes.set_ylabel("%")
    axes.legend(frameon=False)
    tidy(axes, "R@k", f"k of {count:,}")
