"""Ranks in retrieval, against a plain loop; chance, against all orders of the answers."""

import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F

from fastclip.pairs import retrieval
from fastclip.pairs.retrieval import chance, metrics

# Image 0 has the texts 0 and 1, images 1 and 2 share text 2, image 3 has text 3.
OWNS = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2], [3, 3]])


def plain(queries: torch.Tensor, answers: torch.Tensor, owns: list[list[int]]) -> list[int]:
    ranks = []
    for number, query in enumerate(queries):
        right = {b for a, b in owns if a == number}
        similarity = [float(query @ answer) for answer in answers]
        best = max(similarity[k] for k in right)
        ranks.append(1 + sum(s >= best for k, s in enumerate(similarity) if k not in right))
    return ranks


def test_ranks_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ROWS", 3)
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(4, 5).double(), dim=1) for _ in range(2))
    found = metrics(images, texts, OWNS)
    for direction, ranks in (
        ("image_to_text", plain(images, texts, OWNS.tolist())),
        ("text_to_image", plain(texts, images, OWNS.flip(1).tolist())),
    ):
        for k in (1, 5, 10):
            assert found[f"{direction}_R@{k}"] == sum(r <= k for r in ranks) / 4
        assert found[f"{direction}_mean_rank"] == statistics.mean(ranks)
        assert found[f"{direction}_median_rank"] == statistics.median_low(ranks)
    assert found["image_to_text_mean_rank"] > 1


def test_constant_and_diverged_features_do_not_score() -> None:
    for value in (1.0, torch.nan):
        same = torch.full((4, 5), value)
        assert metrics(same, same, OWNS)["image_to_text_R@1"] == 0
        assert metrics(same, same, OWNS)["text_to_image_R@1"] == 0
    eye = torch.eye(4)
    assert metrics(eye, eye, torch.tensor([[k, k] for k in range(4)]))["image_to_text_R@1"] == 1


def test_chance_is_the_mean_over_all_orders() -> None:
    found = chance(OWNS)
    for direction, owns in (("image_to_text", OWNS), ("text_to_image", OWNS.flip(1))):
        ranks = []
        for query in range(4):
            right = {b for a, b in owns.tolist() if a == query}
            for order in itertools.permutations(range(4)):
                ranks.append(1 + min(order.index(k) for k in right))
        assert found[f"{direction}_R@1"] == pytest.approx(sum(r == 1 for r in ranks) / len(ranks))
        assert found[f"{direction}_R@5"] == 1
        assert found[f"{direction}_mean_rank"] == pytest.approx(statistics.mean(ranks))
        assert found[f"{direction}_median_rank"] == statistics.median_low(ranks)
    many = chance(torch.arange(1000).repeat(2, 1).T)
    assert many["text_to_image_R@10"] == pytest.approx(0.01)
    assert many["text_to_image_median_rank"] == 500
