"""The figure of a training on one's own pairs: the loss, R@k, and images found for captions.

A fixed shuffle chooses the captions, independently of the answers.
"""

import random
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from ..demo.emoji.figure import BLUE, GREEN, GREY, INK, ORANGE, STYLE, plt, tidy
from .chance import KS
from .evaluate import HeldOut

ROWS, NEAREST = 6, 6
COLOURS = (BLUE, ORANGE, GREEN)  # of the KS
LONGEST = 120  # characters of a caption at most
HEIGHTS = (3, 10)  # of the curves and of the images, in inches


def draw(
    path: Path, losses: Sequence[float], evaluations: Mapping[int, Mapping[str, float]],
    held_out: HeldOut | None, features: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Writes a PNG; without held-out pairs it has the loss alone."""
    heights = HEIGHTS if held_out else HEIGHTS[:1]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, sum(heights)), dpi=120, facecolor="white")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        curve, recalls = parts[0].subplots(1, 2)
        parts[0].subplots_adjust(left=0.06, right=0.975, bottom=0.2, top=0.86, wspace=0.18)
        curve.plot(range(1, len(losses) + 1), losses, color=BLUE, lw=1.5)
        curve.set_ylabel("loss")
        tidy(curve, "Training loss")
        _recalls(recalls, evaluations, held_out)
        if held_out and features:
            _found(parts[1], held_out, *features)
        figure.savefig(path)
        plt.close(figure)


def _recalls(
    axes: Axes, evaluations: Mapping[int, Mapping[str, float]], held_out: HeldOut | None
) -> None:
    if not (evaluations and held_out):
        axes.axis("off")
        return
    steps = sorted(evaluations)
    for k, colour in zip(KS, COLOURS, strict=True):
        for direction, line in (("text to image", "-"), ("image to text", "--")):
            name = f"{direction.replace(' ', '_')}_R@{k}"
            values = [100 * evaluations[step][name] for step in steps]
            style = {"color": colour, "ls": line, "marker": ".", "lw": 1.2}
            axes.plot(steps, values, label=f"R@{k} {direction}", **style)
    axes.set_ylabel("%")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    tidy(axes, "Retrieval on held-out images")


def _found(figure: SubFigure, held_out: HeldOut, images: Tensor, texts: Tensor) -> None:
    count = len(held_out.images.places)
    figure.text(
        0.02, 0.985, f"Held-out captions, and the nearest of {count:,} held-out images",
        fontsize=11, fontweight="bold", va="top",
    )  # fmt: skip
    figure.text(
        0.02, 0.96, "Captions chosen at random. A right image has a green frame; if none is right, "
        "the right one follows in grey.", color=GREY, va="top",
    )  # fmt: skip
    order = list(range(len(held_out.texts)))
    random.Random(0).shuffle(order)
    grid = figure.subplots(ROWS, NEAREST + 2, squeeze=False)
    figure.subplots_adjust(left=0.02, right=0.985, bottom=0.02, top=0.93, hspace=0.12, wspace=0.06)
    for axes in grid.flat:
        axes.axis("off")
    for row, text in zip(grid, order, strict=False):
        right = held_out.owns[held_out.owns[:, 1] == text, 0].tolist()
        nearest = (images @ texts[text]).topk(min(NEAREST, count)).indices.tolist()
        caption = textwrap.shorten(held_out.texts[text], LONGEST, placeholder=" …")
        caption = "\n".join(textwrap.wrap(caption, 20))
        # A "$" would begin a formula.
        row[0].text(0, 0.5, caption, va="center", transform=row[0].transAxes, parse_math=False)
        for axes, image in zip(row[1:], nearest, strict=False):
            _show(axes, held_out, image, GREEN if image in right else None)
        if not set(nearest) & set(right):
            _show(row[-1], held_out, right[0], GREY)


def _show(axes: Axes, held_out: HeldOut, image: int, frame: str | None) -> None:
    axes.imshow(held_out.images[image, ""].permute(1, 2, 0).numpy())
    axes.axis("on")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame or INK, linewidth=3)
