"""Our losses are sentence-transformers' losses: ranking with in-batch and hard negatives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from support.peers import Case, assert_same, peer
from torch import Tensor, nn

from fastclip import contrast
from fastclip.loss import InfoNCELoss, info_nce

DIRECTIONS = (
    ("query_to_doc",),
    ("query_to_doc", "doc_to_query"),
    ("query_to_doc", "query_to_query"),
    ("query_to_doc", "doc_to_doc"),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),  # GTE
)


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("sentence_transformers.sentence_transformer.losses")


class Embedded(nn.Module):
    """A model whose features are already embedded."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"]}

    def __getitem__(self, index: int) -> Embedded:
        return self


def ranking(
    theirs: ModuleType, columns: Sequence[Tensor], scale: Tensor | float, **options
) -> Tensor:
    """Returns sentence-transformers' loss of queries, positives and hard negatives."""
    loss = theirs.MultipleNegativesRankingLoss(Embedded(), scale=scale, **options)
    return loss.compute_loss_from_embeddings(list(columns), None)


def blocks(columns: Sequence[Tensor], scale: Tensor | float) -> dict[str, list[Tensor]]:
    """Returns each direction's log-sum-exps of each line, block by block, the positive's first."""
    queries, positives, *negatives = columns
    own = functools.partial(contrast, logit_scale=scale, normalize=True)
    c = own(queries, positives)
    hard = [own(queries, n, offset=None, columns=False).rows for n in negatives]
    return {
        "query_to_doc": [c.positives, c.rows, *hard],
        "query_to_query": [own(queries, None).rows],
        "doc_to_query": [c.positives, c.columns],
        # A query's hard negatives are no negatives of its positive.
        "doc_to_doc": [own(positives, None).rows]
        + [own(positives, n, columns=False).rows for n in negatives],
    }


def folded(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.logaddexp, parts)


@pytest.mark.parametrize("hard", [0, 1, 2])
def test_ranking(hard: int, case: Case, theirs: ModuleType) -> None:
    leaves = case.leaves(2 + hard)
    assert_same(
        lambda q, *rest: info_nce(q, torch.cat(rest[:-1]), rest[-1], normalize=True),
        lambda *given: ranking(theirs, given[:-1], given[-1]),
        leaves,
    )


def test_ranking_of_dot_products(case: Case, theirs: ModuleType) -> None:
    from sentence_transformers.util import dot_score

    assert_same(
        lambda q, p, n, t: info_nce(q, torch.cat((p, n)), t),
        lambda *given: ranking(theirs, given[:-1], given[-1], similarity_fct=dot_score),
        case.leaves(3),
    )


def test_the_module_in_float32(case: Case, theirs: ModuleType) -> None:
    leaves = case.features(3, dtype=torch.float32)
    assert_same(
        lambda q, p, n: InfoNCELoss(normalize=True)(q, torch.cat((p, n)), 20.0),
        lambda *given: ranking(theirs, given, 20.0),
        leaves, rtol=2e-4, atol=5e-5,
    )  # fmt: skip


def test_ranking_in_both_directions(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda q, p, t: info_nce(q, p, t, symmetric=True, normalize=True),
        lambda *given: ranking(
            theirs, given[:-1], given[-1], directions=DIRECTIONS[1], partition_mode="per_direction"
        ),
        case.leaves(2),
    )


@pytest.mark.parametrize("hard", [1, 2])
def test_only_queries_have_hard_negatives(hard: int, case: Case, theirs: ModuleType) -> None:
    def ours(*given: Tensor) -> Tensor:
        found = blocks(given[:-1], given[-1])
        rows, columns = folded(found["query_to_doc"]), folded(found["doc_to_query"])
        return ((rows + columns) / 2 - found["query_to_doc"][0]).mean()

    assert_same(
        ours,
        lambda *given: ranking(
            theirs, given[:-1], given[-1], directions=DIRECTIONS[1], partition_mode="per_direction"
        ),
        case.leaves(2 + hard),
    )


@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_directions_in_one_softmax(
    directions: tuple[str, ...], hard: int, case: Case,
    theirs: ModuleType,
) -> None:  # fmt: skip
    def ours(*columns: Tensor) -> Tensor:
        found = blocks(columns, case.scale)
        # With "doc_to_query" the positive counts twice, as it does in their loss.
        parts = [part for direction in directions for part in found[direction]]
        return (folded(parts) - found["query_to_doc"][0]).mean()

    # Their gradient of a scale is NaN, since the similarity of an own pair is -inf.
    assert_same(
        ours,
        lambda *columns: ranking(theirs, columns, case.scale, directions=directions),
        case.features(2 + hard),
    )


@pytest.mark.parametrize("strength", [0.0, 0.7, 9.0])
@pytest.mark.parametrize("hard", [0, 1, 2])
def test_hardness_of_all_negatives(
    hard: int, strength: float, case: Case, theirs: ModuleType
) -> None:
    assert_same(
        lambda q, *rest: info_nce(
            q, torch.cat(rest[:-1]), rest[-1], hardness=strength, normalize=True
        ),
        lambda *given: ranking(
            theirs, given[:-1], given[-1], hardness_mode="all_negatives", hardness_strength=strength
        ),
        case.leaves(2 + hard),
    )


def test_hardness_of_negatives_in_the_batch(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda q, p, t: info_nce(q, p, t, hardness=5.0, normalize=True),
        lambda *given: ranking(
            theirs, given[:-1], given[-1], hardness_mode="in_batch_negatives", hardness_strength=5.0
        ),
        case.leaves(2),
    )


@pytest.mark.parametrize("hard", [0, 1, 2])
def test_hardness_of_hard_negatives(hard: int, case: Case, theirs: ModuleType) -> None:
    strength = 5.0

    def ours(q: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
        *negatives, t = rest
        c = contrast(q, p, t, columns=False, normalize=True)
        parts = [c.positives, c.rows]
        for n in negatives:
            # The own hard negative of each query is its block's own pair.
            block = contrast(q, n, t, columns=False, normalize=True)
            similarity = (block.positives / t).detach()
            parts += [block.rows, block.positives + strength * similarity]
        return (folded(parts) - c.positives).mean()

    assert_same(
        ours,
        lambda *given: ranking(
            theirs, given[:-1], given[-1], hardness_mode="hard_negatives",
            hardness_strength=strength,
        ),
        case.leaves(2 + hard),
    )  # fmt: skip


def test_the_cached_loss_has_the_same_value_and_gradients(case: Case, theirs: ModuleType) -> None:
    loss = theirs.CachedMultipleNegativesRankingLoss(
        Embedded(), mini_batch_size=5, hardness_mode="all_negatives", hardness_strength=5.0
    )
    assert_same(
        lambda q, p, n: info_nce(q, torch.cat((p, n)), 20.0, hardness=5.0, normalize=True),
        lambda *columns: loss.calculate_loss([list(c.split(5)) for c in columns]),
        case.features(3),
    )
