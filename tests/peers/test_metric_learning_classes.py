"""Our classes of pytorch-metric-learning: their values and gradients with any reducer, and calls
that the host's own code serves."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from support.peers import assert_same, peer
from torch import Tensor

from fastclip.integrations import metric_learning as ours

NAMES = ("NTXentLoss", "SupConLoss")
N, M, D = 30, 20, 8


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("pytorch_metric_learning.losses")


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons of calls that the host's code serves."""
    found: list[str] = []
    monkeypatch.setattr(type(ours.HOST), "falls_back", lambda host, reason: found.append(reason))
    return found


def options(number: int) -> dict[str, Any]:
    reducers = peer("pytorch_metric_learning.reducers")
    distances = peer("pytorch_metric_learning.distances")
    return [
        {}, {"reducer": reducers.MeanReducer()}, {"reducer": reducers.ThresholdReducer(low=0.5)},
        {"reducer": reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())},
        {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
        {"embedding_regularizer": peer("pytorch_metric_learning.regularizers").LpRegularizer()},
    ][number]  # fmt: skip


def labels(classes: int, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(classes)
    return [torch.randint(classes, (size,), generator=generator) for size in sizes]


def leaves(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in sizes]


def assert_equal(
    name: str, theirs: ModuleType, given: Sequence[Any], inputs: Sequence[Tensor], **how: Any
) -> None:
    """Asserts that both classes give one value and gradients; given: all but the embeddings."""

    def loss(of: ModuleType, *features: Tensor) -> Tensor:
        made = getattr(of, name)(temperature=0.2, **how)
        return made(features[0], *given, *features[1:])

    assert_same(lambda *f: loss(ours, *f), lambda *f: loss(theirs, *f), inputs)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("classes", [7, 15])
@pytest.mark.parametrize("name", NAMES)
def test_one_set(
    name: str, classes: int, number: int, theirs: ModuleType, fallbacks: list[str]
) -> None:
    assert_equal(name, theirs, labels(classes, N), leaves(N), **options(number))
    assert not fallbacks


@pytest.mark.parametrize("number", [0, 2, 4])
@pytest.mark.parametrize("classes", [7, 25])
@pytest.mark.parametrize("name", NAMES)
def test_two_sets(
    name: str, classes: int, number: int, theirs: ModuleType, fallbacks: list[str]
) -> None:
    mine, others = labels(classes, N, M)

    def loss(of: ModuleType, x: Tensor, y: Tensor) -> Tensor:
        return getattr(of, name)(temperature=0.2, **options(number))(x, mine, None, y, others)

    assert_same(lambda *f: loss(ours, *f), lambda *f: loss(theirs, *f), leaves(N, M))
    assert not fallbacks


@pytest.mark.parametrize("given", [[1], [0, 0, 0], [1, 2, 3], [4, 4, 5]])
@pytest.mark.parametrize("name", NAMES)
def test_few_pairs(name: str, given: list[int], theirs: ModuleType) -> None:
    assert_equal(name, theirs, [torch.tensor(given)], leaves(len(given)))


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_the_host(
    name: str, theirs: ModuleType, fallbacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine,), x = labels(5, N), leaves(N)
    triplets = tuple(torch.randint(N, (9,)) for _ in range(3))
    distance = peer("pytorch_metric_learning.distances").LpDistance()
    assert_equal(name, theirs, [mine, triplets], x)
    assert_equal(name, theirs, [mine], x, distance=distance)
    assert_equal(name, theirs, [mine.double()], x)
    if name == "NTXentLoss":
        assert_equal(name, theirs, [labels(2, N)[0]], x)
    assert len(set(fallbacks)) == len(fallbacks) == 3 + (name == "NTXentLoss")
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    assert_equal(name, theirs, [mine], x)
    assert len(fallbacks) == 3 + (name == "NTXentLoss")


@pytest.mark.parametrize("name", NAMES)
def test_labels_of_two_dtypes(name: str, theirs: ModuleType, fallbacks: list[str]) -> None:
    """Converted to the narrower one, different labels would be equal."""
    mine, others = labels(4, N, M)
    x, y = leaves(N, M)
    for narrow, wide in (
        (mine.to(torch.uint8), others * 256), (mine.to(torch.int32), others + (1 << 32))
    ):  # fmt: skip
        for first, second in ((narrow, wide), (wide[:N], narrow[:M])):
            features = [x[: len(first)].detach().requires_grad_(), y.detach().requires_grad_()]

            def loss(
                of: ModuleType, x: Tensor, y: Tensor, a: Tensor = first, b: Tensor = second
            ) -> Tensor:
                return getattr(of, name)(temperature=0.2)(x, a, ref_emb=y, ref_labels=b)

            assert_same(lambda *f: loss(ours, *f), lambda *f: loss(theirs, *f), features)
    assert not fallbacks


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_only_the_host_takes(
    name: str, theirs: ModuleType, fallbacks: list[str]
) -> None:
    (mine,), (x, y) = labels(2, N), leaves(N, N)
    assert_equal(name, theirs, [mine.bool()], [x])
    without, empty = (
        [call(getattr(of, name)()) for of in (ours, theirs)]
        for call in (lambda loss: loss(x, mine, ref_emb=y), lambda loss: loss(x[:0], mine[:0]))
    )
    assert without[0] == without[1] != 0 and empty == [0, 0]
    assert len(fallbacks) == 2


def test_patch(theirs: ModuleType) -> None:
    before = theirs.NTXentLoss
    ours.patch()
    try:
        assert theirs.NTXentLoss is ours.NTXentLoss is not before
        value = theirs.SelfSupervisedLoss(theirs.NTXentLoss())(*leaves(N, N))
        assert value > 0
    finally:
        ours.unpatch()
    assert theirs.NTXentLoss is before
