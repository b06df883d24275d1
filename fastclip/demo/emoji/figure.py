"""The demo's figure: both loss curves, and held-out drawings with the names the model gives them.

A fixed shuffle chooses the drawings, independently of the answers.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from ..drawing import BLUE, GREEN, GREY, INK, ORANGE, STYLE, plt, save, tidy_steps
from . import VENDORS, Emoji
from .batches import on_white
from .evaluate import HeldOut

ROWS, COLUMNS = 4, 6
LONGEST = 26  # characters of a caption at most


def draw(path: Path, losses: Mapping[str, Sequence[float]], emoji: Emoji, held: HeldOut) -> None:
    """Writes a PNG: `losses` by implementation, then ROWS x COLUMNS held-out drawings."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 11), dpi=120, facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=(3, 8))
        curve, gap = top.subplots(1, 2, width_ratios=(2, 1))
        top.subplots_adjust(left=0.06, right=0.975, bottom=0.2, top=0.86, wspace=0.22)
        _curves(curve, losses)
        _gap(gap, losses)
        _answers(bottom, emoji, held)
        save(figure, path)


def _curves(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    styles = ({"color": BLUE, "lw": 2.5, "alpha": 0.55}, {"color": ORANGE, "lw": 1.2, "ls": "--"})
    for (name, values), style in zip(losses.items(), styles, strict=False):
        label = f"{name} loss, {len(values)} steps"
        axes.plot(range(1, len(values) + 1), values, label=label, **style)
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    tidy_steps(axes, "Training loss, same seed")


def _gap(axes: Axes, losses: Mapping[str, Sequence[float]]) -> None:
    if len(losses) < 2:
        axes.axis("off")
        return
    one, other = losses.values()
    both = min(len(one), len(other))
    # A logarithmic axis cannot show a difference of zero.
    gap = np.maximum(np.abs(np.subtract(one[:both], other[:both])), 1e-8)
    axes.semilogy(range(1, both + 1), gap, color=INK, lw=1)
    axes.set_ylim(5e-9, max(1e-3, 2 * gap.max()))
    axes.set_ylabel("|fused - dense|")
    tidy_steps(axes, "Difference of the two losses")


def _answers(figure: SubFigure, emoji: Emoji, held: HeldOut) -> None:
    figure.text(
        0.02, 0.975, "Concepts never trained on, and the three nearest of "
        f"{len(held.concepts)} names never trained on", fontsize=11, fontweight="bold", va="top",
    )  # fmt: skip
    figure.text(
        0.02, 0.945, "Drawings chosen at random. A right name is green; if none is right, the "
        "right one follows in grey.", fontsize=9, color=GREY, va="top",
    )  # fmt: skip
    grid = figure.subplots(ROWS, COLUMNS)
    figure.subplots_adjust(left=0.015, right=0.985, bottom=0.095, top=0.91, hspace=0.85, wspace=0.1)
    order = list(range(len(held.concepts)))
    random.Random(0).shuffle(order)
    for place, (axes, index) in enumerate(zip(grid.flat, order, strict=False)):
        vendor = place % len(VENDORS)
        _answer(axes, emoji, held, index, vendor)
    for axes in grid.flat[len(order) :]:
        axes.axis("off")


def _answer(axes: Axes, emoji: Emoji, held: HeldOut, index: int, vendor: int) -> None:
    concept = held.concepts[index]
    image = on_white(emoji.drawings[concept, vendor][None])[0].permute(1, 2, 0)
    axes.imshow(((image + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
    axes.axis("off")
    nearest = (held.texts @ held.images[vendor][index]).topk(min(3, len(held.concepts))).indices
    answers = [(emoji.concepts[held.concepts[i]].name, i == index) for i in nearest.tolist()]
    for place, (name, right) in enumerate(answers):
        axes.text(
            0.5, -0.06 - 0.17 * place, _short(name), transform=axes.transAxes, ha="center",
            va="top", fontsize=9, color=GREEN if right else INK,
            fontweight="bold" if right else "normal",
        )  # fmt: skip
    if not any(right for _, right in answers):
        axes.text(
            0.5, -0.06 - 0.17 * len(answers), _short(emoji.concepts[concept].name),
            transform=axes.transAxes, ha="center", va="top", fontsize=8, color=GREY, style="italic",
        )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1].rstrip() + "…"
