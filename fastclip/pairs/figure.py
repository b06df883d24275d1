"""The figure of a training on one's own pairs: curves, ranks, and images found for captions.

A fixed shuffle chooses the captions, independently of the answers.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from ..demo.contact_sheet import Found, contact_sheet
from ..demo.drawing import BLUE, GREEN, ORANGE, STYLE, plt, save, tidy_steps
from ..demo.rank_plots import Direction, histogram, recall
from ..retrieval import topk
from .chance import KS, recall_of_guessing
from .evaluate import HeldOut

ROWS, NEAREST = 6, 6
COLOURS = (BLUE, ORANGE, GREEN)  # of the KS
HEIGHTS = (6, 10)  # of the plots and of the images, in inches


def draw(
    path: Path, losses: Sequence[float], evaluations: Mapping[int, Mapping[str, float]],
    held_out: HeldOut | None, features: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Writes a PNG; without held-out pairs it has the loss alone."""
    scored = held_out is not None and features is not None
    with plt.rc_context(STYLE):
        if not scored:
            figure, curve = plt.subplots(figsize=(7, 3.5), dpi=120, layout="constrained")
            _loss(curve, losses)
        else:
            figure = plt.figure(figsize=(13, sum(HEIGHTS)), dpi=120, facecolor="white")
            top, bottom = figure.subfigures(2, 1, height_ratios=HEIGHTS)
            second = "recalls" if evaluations else "loss"
            axes = top.subplot_mosaic([["loss", second], ["histogram", "recall"]])
            top.subplots_adjust(
                left=0.06, right=0.975, bottom=0.1, top=0.93, wspace=0.18, hspace=0.45
            )
            _loss(axes["loss"], losses)
            if evaluations:
                _recalls(axes["recalls"], evaluations)
            _ranks(axes["histogram"], axes["recall"], held_out, features)
            _found(bottom, held_out, *features)
        save(figure, path)


def _loss(axes: Axes, losses: Sequence[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, lw=1.5)
    axes.set_ylabel("loss")
    tidy_steps(axes, "Training loss")


def _recalls(axes: Axes, evaluations: Mapping[int, Mapping[str, float]]) -> None:
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
    tidy_steps(axes, "Retrieval on held-out images while training")


def _ranks(left: Axes, right: Axes, held_out: HeldOut, features: tuple[Tensor, Tensor]) -> None:
    found = held_out.ranks(features)
    pairs, images, texts = held_out.owns, len(held_out.images.places), len(held_out.texts)
    directions = (
        Direction("image to text", found.rows, texts, recall_of_guessing(pairs)),
        Direction("text to image", found.columns, images, recall_of_guessing(pairs.flip(1))),
    )
    histogram(left, directions)
    recall(right, directions)


def _found(figure: SubFigure, held_out: HeldOut, images: Tensor, texts: Tensor) -> None:
    count = len(held_out.images.places)
    chosen = list(range(len(held_out.texts)))
    random.Random(0).shuffle(chosen)
    chosen = chosen[:ROWS]
    images, texts = (side.nan_to_num(0, 0, 0) for side in (images, texts))
    _, nearest = topk(texts[chosen], images, min(NEAREST, count))
    rows = [
        Found(
            held_out.texts[text], found,
            held_out.owns[held_out.owns[:, 1] == text, 0].tolist(),
        )
        for text, found in zip(chosen, nearest.tolist(), strict=True)
    ]  # fmt: skip
    title = f"Held-out captions, and the nearest of {count:,} held-out images"
    contact_sheet(
        figure, title, rows, lambda image: held_out.images[image, ""].permute(1, 2, 0).numpy()
    )
