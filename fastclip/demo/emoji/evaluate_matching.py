"""Evaluates a matching head on held-out emoji: does a pair match, and does the head rank better?

Both tests are on the held-out concepts in every vendor's drawing. Each score comes with chance
level.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...clip.matching import MatchingHead
from ...clip.model import CLIP
from ...clip.views import WithViews
from . import VENDORS, Emoji
from .evaluate import Encode, Score, hits, pictures
from .split import Split

TOP = 16  # candidates that the head orders anew
TITLES = {
    "matching": "held-out drawings: does a name match? Half of the pairs do, the others have the "
    "name of another concept",
    "re-ranking": f"held-out drawings and names: the {TOP} nearest, ordered anew by the head",
}


@torch.no_grad()
def evaluate_matching(
    head: MatchingHead, model: CLIP, emoji: Emoji, split: Split, encode: Encode, seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Returns the scores of a matching head, by test and by name.

    Accuracy is over the right pairs and as many wrong ones. A hard negative is a wrong name that
    the model finds near the drawing, a random one is drawn by `seed`. Each name is once right and
    once wrong: an answer from the drawing or from the name alone gets chance.
    """
    model.eval()
    head.eval()
    concepts = [split.members[group][0] for group in split.held_out]
    tokens = encode([emoji.concepts[c].name for c in concepts])
    views = WithViews(model, head.fusion)
    y, text_view = views.text(tokens)
    count = len(concepts)
    own = torch.arange(count, device=tokens.device)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for vendor in range(len(VENDORS)):
        x, image_view = views.image(pictures(model, emoji, concepts, [vendor] * count))

        def logits(images: Tensor, texts: Tensor, view: Tensor = image_view) -> Tensor:
            return head(view[images], text_view[texts], tokens[texts])

        similarity = x @ y.T
        order = torch.randperm(count, generator=generator).to(own.device)
        for kind, wrong in (
            ("random negative", torch.empty_like(own).scatter(0, order, order.roll(1))),
            ("hard negative", hard_negatives(similarity)),
        ):
            right = torch.cat((logits(own, own) > 0, logits(own, wrong) <= 0))
            found.setdefault(kind, []).append(right.float().mean().item())
        for direction, side, by_head in (
            ("image to text", similarity, logits),
            ("text to image", similarity.T, lambda texts, images: logits(images, texts)),
        ):
            found.setdefault(f"{direction} R@1", []).append(hits(side, 1))
            anew = ordered_anew(side, by_head)
            found.setdefault(f"{direction} R@1, ordered anew", []).append(hits(anew, 1))
    scores = {}
    for name, values in found.items():
        test, chance = ("re-ranking", 1 / count) if "R@1" in name else ("matching", 0.5)
        score = Score(sum(values) / len(values), chance, count * len(VENDORS))
        scores.setdefault(test, {})[name] = score
    return scores


def hard_negatives(similarity: Tensor) -> Tensor:
    """Returns a wrong column for each row, similar ones first, and no column twice.

    The largest entries off the diagonal are taken in turn. The last row may be left with its own
    column; it then swaps with the first row.
    """
    count, columns = len(similarity), {}
    taken = set()
    for place in similarity.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, count)
        if row != column and row not in columns and column not in taken:
            columns[row] = column
            taken.add(column)
    for row in set(range(count)) - set(columns):
        other = next(iter(columns))
        columns[row], columns[other] = columns[other], row
    return torch.tensor([columns[row] for row in range(count)], device=similarity.device)


def ordered_anew(similarity: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Returns a matrix with the logits of each row's `TOP` largest entries, -inf elsewhere.

    Args:
        logits: returns the logits of pairs, given rows (P) and columns (P).
    """
    nearest = similarity.topk(min(TOP, similarity.shape[1]), dim=1).indices
    rows = torch.arange(len(nearest), device=nearest.device)[:, None].expand_as(nearest)
    values = logits(rows.flatten(), nearest.flatten()).view_as(nearest)
    return torch.full_like(similarity, -torch.inf).scatter(1, nearest, values)
