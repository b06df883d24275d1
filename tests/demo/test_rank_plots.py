"""The plots of ranks, on given ranks: bars, curves, and chance."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import torch

from fastclip.demo.drawing import plt
from fastclip.demo.rank_plots import Direction, histogram, recall

# Five queries: four of the ten answers come first, third, third, last; one is first, too.
ONE = Direction("text to image", torch.tensor([0, 2, 2, 9, 0]), 10, lambda k: k / 10)
# With several right answers to each query, guessing is better.
OTHER = Direction("image to text", torch.tensor([1, 1]), 4, lambda k: min(1, k / 2))


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_the_histogram_has_the_share_of_each_rank(axes) -> None:
    histogram(axes, (ONE, OTHER))
    (one, chance, other, other_chance) = [patch.get_data() for patch in axes.patches]
    share = dict(zip(one.edges.tolist(), one.values.tolist(), strict=False))
    assert one.edges[0] == 1 and one.edges[-1] == 11 and set(np.diff(one.edges)) == {1, 2}
    assert share[1] == 40 and share[3] == 40 and one.values[-1] == 20 and sum(share.values()) == 100
    assert chance.values == pytest.approx(10 * np.diff(chance.edges))
    assert other.edges.tolist() == [1, 2, 3, 4, 5] and other.values.tolist() == [0, 100, 0, 0]
    assert other_chance.values == pytest.approx([50, 50, 0, 0])
    labels = [text.get_text() for text in axes.get_legend().texts]
    assert labels == ["text to image, of 10", "chance", "image to text, of 4", "chance"]


def test_recall_adds_up_the_ranks(axes) -> None:
    recall(axes, (ONE, OTHER))
    one, chance, other, other_chance = [line.get_xydata().tolist() for line in axes.lines]
    values = [40, 40, *[80] * 6, 80, 100]
    assert one == [[k, pytest.approx(v)] for k, v in enumerate(values, 1)]
    assert chance == [[k, pytest.approx(10 * k)] for k in range(1, 11)]
    assert other == [[1, 0], [2, 100], [3, 100], [4, 100]]
    assert other_chance == [[1, 50], [2, 100], [3, 100], [4, 100]]
