"""Ranks of right answers in retrieval between images and texts, and those of guessing."""

import bisect
import math
from collections import Counter

import torch
from torch import Tensor

KS = (1, 5, 10)
ROWS = 1024  # of the similarity matrix at once


def metrics(image_features: Tensor, text_features: Tensor, owns: Tensor) -> dict[str, float]:
    """Returns R@1, R@5, R@10, the mean and the median rank in both directions.

    A query's rank is that of its best right answer. Ties count against the model: one that gives
    all inputs the same features must not score.

    Args:
        image_features, text_features: (M, D) and (N, D), normalised.
        owns: (P, 2) int64; each row is an image and a text that belong together. Each image and
            each text is in a row.
    """
    both = {
        "image_to_text": _ranks(image_features, text_features, owns),
        "text_to_image": _ranks(text_features, image_features, owns.flip(1)),
    }
    scores = {}
    for direction, ranks in both.items():
        for k in KS:
            scores[f"{direction}_R@{k}"] = (ranks <= k).double().mean().item()
        scores[f"{direction}_mean_rank"] = ranks.double().mean().item()
        scores[f"{direction}_median_rank"] = float(ranks.median())
    return scores


def _ranks(queries: Tensor, answers: Tensor, owns: Tensor) -> Tensor:
    ranks = []
    for start in range(0, len(queries), ROWS):
        similarity = queries[start : start + ROWS] @ answers.T
        here = owns[(owns[:, 0] >= start) & (owns[:, 0] < start + ROWS)].to(similarity.device)
        right = torch.zeros_like(similarity, dtype=torch.bool)
        right[here[:, 0] - start, here[:, 1]] = True
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        # NaN is not below anything: a model that diverged has the last rank.
        ranks.append(1 + (~(similarity < best) & ~right).sum(dim=1))
    return torch.cat(ranks).cpu()


def chance(owns: Tensor) -> dict[str, float]:
    """Returns what guessing gets for each of `metrics`, by the same names."""
    scores = {}
    for direction, pairs in (("image_to_text", owns), ("text_to_image", owns.flip(1))):
        answers = int(pairs[:, 1].max()) + 1
        # How many queries have how many right answers.
        rights = Counter(torch.bincount(pairs[:, 0]).tolist())
        queries = sum(rights.values())

        def recall(k: int, rights=rights, answers=answers, queries=queries) -> float:
            return sum(n * _one_of(k, c, answers) for c, n in rights.items()) / queries

        for k in KS:
            scores[f"{direction}_R@{k}"] = recall(k)
        scores[f"{direction}_mean_rank"] = (
            sum(n * (answers + 1) / (c + 1) for c, n in rights.items()) / queries
        )
        places = range(1, answers + 1)
        median = places[bisect.bisect_left(places, 0.5 - 1e-9, key=recall)]
        scores[f"{direction}_median_rank"] = float(median)
    return scores


def _one_of(k: int, right: int, answers: int) -> float:
    """Returns how often k random answers have one of the right ones among them."""
    if k > answers - right:
        return 1.0
    none = math.lgamma(answers - right + 1) - math.lgamma(answers - right - k + 1)
    none -= math.lgamma(answers + 1) - math.lgamma(answers - k + 1)
    return -math.expm1(none)
