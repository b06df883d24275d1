"""Evaluates a matching head on held-out emoji: does a pair match, and does the head rank better?

Both tests are on the held-out concepts in every vendor's drawing. Each score comes with chance
level.
"""

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

    A drawing's hard negative is the wrong name that the model finds nearest, its random negative is
    drawn by `seed`. Half of the pairs of an accuracy match, so that a constant answer gets chance.
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
        matches = logits(own, own) > 0
        away = torch.randint(1, count, (count,), generator=generator).to(own.device)
        for kind, other in (
            ("random negative", (own + away) % count),
            ("hard negative", similarity.masked_fill(_diagonal(similarity), -2).argmax(dim=1)),
        ):
            right = torch.cat((matches, logits(own, other) <= 0))
            found.setdefault(kind, []).append(right.float().mean().item())
        for direction in ("image to text", "text to image"):
            flipped = direction == "text to image"
            side = similarity.T if flipped else similarity
            nearest = side.topk(min(TOP, count), dim=1).indices
            pairs = own[:, None].expand_as(nearest).flatten(), nearest.flatten()
            by_head = logits(*(pairs[::-1] if flipped else pairs)).view_as(nearest)
            anew = torch.full_like(side, -torch.inf).scatter(1, nearest, by_head)
            found.setdefault(f"{direction} R@1", []).append(hits(side, 1))
            found.setdefault(f"{direction} R@1, ordered anew", []).append(hits(anew, 1))
    scores = {}
    for name, values in found.items():
        test, chance = ("re-ranking", 1 / count) if "R@1" in name else ("matching", 0.5)
        score = Score(sum(values) / len(values), chance, count * len(VENDORS))
        scores.setdefault(test, {})[name] = score
    return scores


def _diagonal(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
