"""Our ranking losses are sentence-transformers': our classes with each of their options, and the
public functions with the options that they share."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from support.embedded import Embedded
from support.peers import Case, assert_same, peer
from torch import Tensor

from fastclip.integrations import sentence_transformers as ours
from fastclip.loss import InfoNCELoss, info_nce

DIRECTIONS = (
    ("query_to_doc",),
    ("query_to_doc", "doc_to_query"),
    ("query_to_doc", "query_to_query"),
    ("query_to_doc", "doc_to_doc"),
    ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),  # GTE
)
BOTH = {"directions": DIRECTIONS[1], "partition_mode": "per_direction"}
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("sentence_transformers.sentence_transformer.losses")


def ranking(of: ModuleType, columns: Sequence[Tensor], scale: Any, **options: Any) -> Tensor:
    """The loss of queries, positives and hard negatives by the class of a module."""
    loss = of.MultipleNegativesRankingLoss(Embedded(), scale=scale, **options)
    return loss.compute_loss_from_embeddings(list(columns), None)


def assert_equal(theirs: ModuleType, leaves: Sequence[Tensor], **options: Any) -> None:
    """Asserts that both classes give one value and gradients; the last leaf is the scale."""
    assert_same(
        lambda *given: ranking(ours, given[:-1], given[-1], **options),
        lambda *given: ranking(theirs, given[:-1], given[-1], **options),
        leaves,
    )


@pytest.fixture(autouse=True)
def nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ours.HOST), "falls_back", lambda host, reason: pytest.fail(reason))


@pytest.mark.parametrize("hard", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, BOTH], ids=["one way", "both ways"])
def test_ranking(options: dict[str, Any], hard: int, case: Case, theirs: ModuleType) -> None:
    assert_equal(theirs, case.leaves(2 + hard), **options)


def test_ranking_of_dot_products(case: Case, theirs: ModuleType) -> None:
    from sentence_transformers.util import dot_score

    assert_equal(theirs, case.leaves(3), similarity_fct=dot_score)


@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("mode", [None, "all_negatives"])
@pytest.mark.parametrize("directions", DIRECTIONS[1:], ids="+".join)
def test_directions_in_one_softmax(
    directions: tuple[str, ...], mode: str | None, hard: int, case: Case, theirs: ModuleType
) -> None:
    # Their gradient of a scale is NaN, since the similarity of an own pair is -inf.
    options = {"directions": directions, "hardness_mode": mode, "hardness_strength": 3.0}
    assert_same(
        lambda *columns: ranking(ours, columns, case.scale, **options),
        lambda *columns: ranking(theirs, columns, case.scale, **options),
        case.features(2 + hard),
    )


@pytest.mark.parametrize("strength", [0.0, 9.0])
@pytest.mark.parametrize("mode", HARDNESS)
@pytest.mark.parametrize("hard", [0, 1, 2])
def test_hardness(hard: int, mode: str, strength: float, case: Case, theirs: ModuleType) -> None:
    options = {"hardness_mode": mode, "hardness_strength": strength}
    assert_equal(theirs, case.leaves(2 + hard), **options)
    if hard == 1:
        assert_equal(theirs, case.leaves(2 + hard), **options, **BOTH)


def test_the_classes_in_float32(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda *columns: ranking(ours, columns, 20.0),
        lambda *columns: ranking(theirs, columns, 20.0),
        case.features(3, dtype=torch.float32), rtol=2e-4, atol=5e-5,
    )  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "options", [{"hardness_mode": "all_negatives", "hardness_strength": 5.0}, BOTH]
)
def test_the_cached_loss(
    options: dict[str, Any], backward: bool, case: Case, theirs: ModuleType
) -> None:
    columns, found = case.features(3), []
    for of in (ours, theirs):
        loss = of.CachedMultipleNegativesRankingLoss(Embedded(), mini_batch_size=5, **options)
        leaves = [
            [part.detach().requires_grad_() for part in column.split(5)] for column in columns
        ]
        value = loss.calculate_loss(leaves, None, with_backward=backward)
        assert value.requires_grad != backward
        if not backward:
            value.backward()
        found.append([value.detach(), *(leaf.grad for column in leaves for leaf in column)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_public_functions(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda q, p, n, t: info_nce(q, torch.cat((p, n)), t, normalize=True),
        lambda *given: ranking(theirs, given[:-1], given[-1]),
        case.leaves(3),
    )
    assert_same(
        lambda q, p, t: info_nce(q, p, t, symmetric=True, normalize=True),
        lambda *given: ranking(theirs, given[:-1], given[-1], **BOTH),
        case.leaves(2),
    )
    assert_same(
        lambda q, p, n, t: info_nce(q, torch.cat((p, n)), t, hardness=5.0, normalize=True),
        lambda *given: ranking(
            theirs, given[:-1], given[-1], hardness_mode=HARDNESS[2], hardness_strength=5.0
        ),
        case.leaves(3),
    )
    assert_same(
        lambda q, p, n: InfoNCELoss(normalize=True)(q, torch.cat((p, n)), 20.0),
        lambda *given: ranking(theirs, given, 20.0),
        case.features(3, dtype=torch.float32), rtol=2e-4, atol=5e-5,
    )  # fmt: skip


def test_a_query_without_negatives_has_a_gradient_without_nan(theirs: ModuleType) -> None:
    columns = Case(1, 4, 20.0, "random").features(2)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        value = ranking(ours, columns, 20.0, directions=DIRECTIONS[2])
        assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, columns))
