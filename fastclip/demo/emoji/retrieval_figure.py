"""The demo's second figure: ranks of held-out emoji, and drawings found for held-out names.

A fixed shuffle chooses the names, independently of the answers.
"""

import random
from pathlib import Path

import numpy as np
import torch

from ...retrieval import ranks, topk
from ..contact_sheet import Found, contact_sheet
from ..drawing import STYLE, plt, save
from ..rank_plots import Direction, histogram, recall
from . import VENDORS, Emoji
from .batches import on_white
from .evaluate import HeldOut

ROWS, NEAREST = 8, 8


def draw(path: Path, emoji: Emoji, held: HeldOut) -> None:
    """Writes a PNG: the histogram of ranks and R@k, then drawings of all vendors for some names."""
    # A model that has diverged gives all inputs the same features.
    names, *of_vendors = (side.nan_to_num(0, 0, 0) for side in (held.texts, *held.images))
    images = torch.cat(of_vendors)
    count = len(names)
    both = {"image to text": [], "text to image": []}
    for of_vendor in of_vendors:
        found = ranks(of_vendor, names)
        both["image to text"].append(found.rows)
        both["text to image"].append(found.columns)
    directions = [
        Direction(name, torch.cat(parts), count, lambda k: k / count)
        for name, parts in both.items()
    ]
    chosen = random.Random(0).sample(range(count), min(ROWS, count))
    _, nearest = topk(names[chosen], images, min(NEAREST, len(images)))
    rows = [
        Found(
            emoji.concepts[held.concepts[place]].name, found,
            [place + count * vendor for vendor in range(len(VENDORS))],
        )
        for place, found in zip(chosen, nearest.tolist(), strict=True)
    ]  # fmt: skip

    def image(number: int) -> np.ndarray:
        vendor, place = divmod(number, count)
        drawing = on_white(emoji.drawings[held.concepts[place], vendor][None])[0]
        return ((drawing.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()

    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 13), dpi=120, facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=(3, 10))
        left, right = top.subplots(1, 2)
        top.subplots_adjust(left=0.06, right=0.975, bottom=0.2, top=0.86, wspace=0.18)
        histogram(left, directions)
        recall(right, directions)
        title = f"Names never trained on, and the nearest of {len(images)} drawings"
        contact_sheet(bottom, f"{title} never trained on", rows, image)
        save(figure, path)
