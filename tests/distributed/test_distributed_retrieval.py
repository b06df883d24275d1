"""Ranks and metrics across ranks equal those of one process on all features."""

import pytest
import torch
from support.ranks import retrieval as ranks
from support.ranks.processes import Ranks
from support.ranks.retrieval import Spread

from fastclip import distributed, retrieval

EVERY = [
    Spread("random", (5, 5, 5, 5), (5, 5, 5, 5), None),
    Spread("integers", (4, 0, 9, 6), (4, 0, 9, 6), None),
    Spread("alike", (3, 2, 2, 2), (3, 2, 2, 2), None, "torch"),
    Spread("integers", (4, 3, 0, 6), (1, 9, 8, 0), (7, 5)),
    Spread("duplicates", (4, 4, 4, 4), (9, 9, 9, 9), (7, 5), "torch"),
]


def test_ranks_equal_one_process(four: Ranks) -> None:
    for spread, found in zip(EVERY, zip(*four.run(ranks.ranks, EVERY), strict=True), strict=True):
        x, y, ids = spread.whole()
        one = retrieval.ranks(x, y, ids=ids)
        assert torch.equal(torch.cat([rows for rows, _ in found]), one.rows)
        assert torch.equal(torch.cat([columns for _, columns in found]), one.columns)


@pytest.mark.parametrize("groups", [None, (6, 6)])
def test_metrics_equal_one_process_on_every_rank(
    groups: tuple[int, int] | None, four: Ranks
) -> None:
    spread = Spread("integers", (4, 0, 9, 6), (4, 0, 9, 6), groups)
    x, y, ids = spread.whole()
    assert four.run(ranks.metrics, spread) == [retrieval.metrics(x, y, ids=ids)] * 4


def test_an_image_without_a_text_is_an_error_on_all_ranks(two: Ranks) -> None:
    spread = Spread("random", (4, 4), (4, 4), (4, 3))
    for error in two.outcomes(ranks.metrics, spread):
        assert "every image must have a text of its own, got none for image 3" in str(error)


def test_a_process_without_a_group_is_a_world_of_one() -> None:
    x, y, ids = EVERY[3].whole()
    one, alone = retrieval.ranks(x, y, ids=ids), distributed.ranks(x, y, ids=ids)
    assert torch.equal(one.rows, alone.rows) and torch.equal(one.columns, alone.columns)


def test_a_mistake_on_one_rank_is_an_error_on_all(two: Ranks) -> None:
    for mistake, message in (
        ({"value": torch.nan}, "queries must be finite"),
        ({"y": (3, 3)}, "queries and keys of a rank must be pairs"),
        ({"ids": (torch.arange(4), torch.arange(4))}, "all ranks must have one ids, got"),
        ({"columns": False}, "all ranks must have one columns, got"),
        ({"x": (4, 2), "y": (4, 2)}, "width D"),
        ({"name": "metrics", "ids": (torch.arange(3), torch.arange(4))}, "x_ids"),
    ):
        name = {"name": mistake["name"]} if "name" in mistake else {}
        errors = two.run(ranks.error, [mistake, name])
        assert message in errors[0], errors
        assert errors[1] != "no error", errors
