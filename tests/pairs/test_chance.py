"""Chance, against all orders of the answers."""

import itertools
import statistics

import pytest
import torch

from fastclip.pairs.chance import chance
from fastclip.pairs.evaluate import HeldOut

# Image 0 has the texts 0 and 1, images 1 and 2 share text 2, image 3 has text 3.
OWNS = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 2], [3, 3]])


def test_a_model_that_has_diverged_has_the_scores_of_chance() -> None:
    images, texts = torch.full((4, 5), torch.nan), torch.full((4, 5), torch.inf)
    held_out = HeldOut(None, ("a", "b", "c", "d"), OWNS)
    # All scores tie, and the lower index comes first: texts 0, 2, 3 and images 0, 1, 3.
    scores = held_out.scores((images, texts))
    assert scores["image_to_text_mean_rank"] == (1 + 3 + 3 + 4) / 4
    assert scores["text_to_image_mean_rank"] == (1 + 1 + 2 + 4) / 4


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
