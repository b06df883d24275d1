"""The metrics of retrieval that guessing gets."""

import bisect
import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

KS = (1, 5, 10)


def chance(owns: Tensor) -> dict[str, float]:
    """Returns what guessing gets for each of `fastclip.retrieval.metrics`, by the same names.

    owns: (P, 2) int64; each row is an image and a text that belong together. Each image and each
    text is in a row.
    """
    scores = {}
    for direction, pairs in (("image_to_text", owns), ("text_to_image", owns.flip(1))):
        answers = int(pairs[:, 1].max()) + 1
        rights = _numbers_of_right_answers(pairs)
        queries = sum(rights.values())
        recall = recall_of_guessing(pairs)
        for k in KS:
            scores[f"{direction}_R@{k}"] = recall(k)
        scores[f"{direction}_mean_rank"] = (
            sum(n * (answers + 1) / (c + 1) for c, n in rights.items()) / queries
        )
        places = range(1, answers + 1)
        median = places[bisect.bisect_left(places, 0.5 - 1e-9, key=recall)]
        scores[f"{direction}_median_rank"] = float(median)
    return scores


def recall_of_guessing(pairs: Tensor) -> Callable[[int], float]:
    """Returns R@k of guessing as a function of k.

    pairs: (P, 2) int64; each row is a query and an answer that is right for it.
    """
    answers = int(pairs[:, 1].max()) + 1
    rights = _numbers_of_right_answers(pairs)
    queries = sum(rights.values())
    return lambda k: sum(n * _one_of(k, c, answers) for c, n in rights.items()) / queries


def _numbers_of_right_answers(pairs: Tensor) -> Counter[int]:
    """Returns how many queries have how many right answers."""
    return Counter(torch.bincount(pairs[:, 0]).tolist())


def _one_of(k: int, right: int, answers: int) -> float:
    """Returns how often k random answers have one of the right ones among them."""
    if k > answers - right:
        return 1.0
    none = math.lgamma(answers - right + 1) - math.lgamma(answers - right - k + 1)
    none -= math.lgamma(answers + 1) - math.lgamma(answers - k + 1)
    return -math.expm1(none)
