"""Our losses of sentence-transformers across ranks: each rank's value and DDP's gradient are those
of its own, and those of one process on the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peers import find
from support.ranks import sentence_transformers as steps
from support.ranks.processes import Ranks

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARD = {"hardness_strength": 3.0, "hardness_mode": "in_batch_negatives"}
CACHED = {"mini_batch_size": 2}
RANKING = [
    ("MultipleNegativesRankingLoss", 2, {}),
    ("MultipleNegativesRankingLoss", 3, {"directions": GTE}),
    ("CachedMultipleNegativesRankingLoss", 3, {**HARD, **CACHED}),
    ("CachedMultipleNegativesRankingLoss", 2,
     {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", **CACHED}),
]  # fmt: skip
GIST = [("GISTEmbedLoss", 3, {"margin": 0.1}), ("CachedGISTEmbedLoss", 4, CACHED)]


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "columns", "options"), RANKING + GIST)
def test_two_ranks(name: str, columns: int, options: dict[str, Any], two: Ranks) -> None:
    find("sentence_transformers")
    ours, theirs = (two.run(steps.step, who, name, columns, options) for who in steps.MODULES)
    for found, expected in zip(ours, theirs, strict=True):
        assert_close(found, expected)
    if "GIST" in name and options.get("contrast_anchors", True):
        return  # anchors are contrasted with those of their rank alone
    value, gradient = steps.step(0, 1, "theirs", name, columns, options)
    assert_close([sum(v for v, _ in ours) / len(ours), ours[0][1]], [value, gradient])


@pytest.mark.parametrize("name", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_gist_of_documents_alone_is_that_of_one_process(name: str, two: Ranks) -> None:
    test_two_ranks(name, 3, {"contrast_anchors": False}, two)
