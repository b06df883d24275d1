"""Evaluates a matching head on the emoji of `evaluate.py`: does a name match a drawing, and does a
search improve when the head orders its nearest results anew? Each score comes with chance level.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...clip.matching import MatchingHead
from ...clip.model import CLIP
from ...clip.views import WithViews
from . import VENDORS, Emoji
from .evaluate import Encode, Score, other_vendor, pictures
from .split import Split

TOP = 16  # results that the head orders anew


@torch.no_grad()
def evaluate_matching(
    head: MatchingHead, model: CLIP, emoji: Emoji, split: Split, encode: Encode, seed: int = 0
) -> dict[str, dict[str, Score]]:
    """Returns the scores of a matching head, by test set and by name.

    Accuracy is over the right pairs and as many wrong ones. A hard negative is a wrong name that
    the model finds near the drawing, a random one is drawn by `seed`. Each name is once right and
    once wrong: an answer from the drawing or from the name alone gets chance.
    """
    model.eval()
    head.eval()
    views = WithViews(model, head.fusion)
    generator = torch.Generator().manual_seed(seed)
    held = tuple(split.members[group][0] for group in split.held_out)
    concepts, vendors = other_vendor(split)
    sets = {
        "other vendor": (concepts, [vendors]),
        "held out": (held, [[vendor] * len(held) for vendor in range(len(VENDORS))]),
    }
    scores = {}
    for test, (concepts, drawings) in sets.items():
        tokens = encode([emoji.concepts[c].name for c in concepts])
        texts = views.text(tokens)
        found = [
            pair_scores(
                head, views.image(pictures(model, emoji, concepts, v)), texts, tokens, generator
            )
            for v in drawings
        ]
        scores[test] = {name: _mean([f[name] for f in found]) for name in found[0]}
    return scores


def pair_scores(
    head: Callable[..., Tensor], images: tuple[Tensor, Tensor], texts: tuple[Tensor, Tensor],
    tokens: Tensor, generator: torch.Generator,
) -> dict[str, Score]:  # fmt: skip
    """Returns the scores of N pairs, given features and views of both sides."""
    (x, image_view), (y, text_view), count = images, texts, len(tokens)

    def logits(images: Tensor, texts: Tensor) -> Tensor:
        return head(image_view[images], text_view[texts], tokens[texts])

    similarity, own = x @ y.T, torch.arange(count, device=tokens.device)
    order = torch.randperm(count, generator=generator).to(own.device)
    scores = {}
    for kind, wrong in (
        ("random", torch.empty_like(own).scatter(0, order, order.roll(1))),
        ("hard", hard_negatives(similarity)),
    ):
        right = torch.cat((logits(own, own) > 0, logits(own, wrong) <= 0))
        scores[f"match, {kind} negative"] = Score(right.float().mean().item(), 0.5, count)
    for direction, side, by_head in (
        ("image to text", similarity, logits),
        ("text to image", similarity.T, lambda texts, images: logits(images, texts)),
    ):
        value = hits(ordered_anew(side, by_head), 1)
        scores[f"{direction} R@1, top {TOP} anew"] = Score(value, 1 / count, count)
    return scores


def hits(similarity: Tensor, k: int) -> float:
    """Returns how often an entry of the diagonal is among the k largest of its row."""
    # Ties and NaN count against the model: one that gives all inputs the same must not score.
    better = (~(similarity < similarity.diagonal()[:, None])).sum(dim=1) - 1
    return (better < k).float().mean().item()


def _mean(scores: Sequence[Score]) -> Score:
    value = sum(score.value for score in scores) / len(scores)
    return Score(value, scores[0].chance, sum(score.queries for score in scores))


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
