"""Our classes in sentence-transformers: lazy, picklable, in its place, within its wrappers, and the
calls that its own code serves."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support.embedded import Embedded, Projected, guide
from support.peers import peer
from support.tensor_results import TensorResults
from torch import Tensor

from fastclip.engine import warn_once
from fastclip.integrations import sentence_transformers as ours

PLAIN = ("MultipleNegativesRankingLoss", "GISTEmbedLoss")
NAMES = (*PLAIN, *(f"Cached{name}" for name in PLAIN))
WIDTH = 6


@pytest.fixture
def theirs() -> ModuleType:
    return peer("sentence_transformers.sentence_transformer.losses")


@pytest.fixture
def patched(theirs: ModuleType) -> Iterator[ModuleType]:
    ours.patch()
    yield theirs
    ours.unpatch()


@pytest.fixture
def fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons of calls that the host's code serves."""
    found: list[str] = []
    monkeypatch.setattr(type(ours.HOST), "falls_back", lambda host, reason: found.append(reason))
    return found


def made(of: ModuleType, name: str, model: Embedded | None = None, **options: Any) -> Any:
    guides = (guide(),) if "GIST" in name else ()
    return getattr(of, name)(model or Projected(WIDTH, 8), *guides, **options)


def features(columns: int = 2, rows: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {key: torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
         for key in ("embedding", "guide")}
        for _ in range(columns)
    ]  # fmt: skip


def step(loss: Any) -> list[Tensor]:
    """The loss of a batch and the gradient of its model."""
    value = loss(features(), None)
    loss.model.zero_grad()
    value.backward()
    return [value.detach(), loss.model.linear.weight.grad]


def test_the_host_is_imported_when_a_class_is_used() -> None:
    script = (
        "import sys, fastclip\n"
        "from fastclip.integrations import sentence_transformers as s\n"
        "s.unpatch(); assert not any('transformers' == n.split('.')[0] for n in sys.modules)\n"
        "assert 'sentence_transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'TripletLoss'"):
        ours.TripletLoss  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_a_class_is_theirs(name: str, theirs: ModuleType) -> None:
    cls = getattr(ours, name)
    assert issubclass(cls, getattr(theirs, name)) and getattr(ours, name) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
    loss, expected = (made(of, name) for of in (ours, theirs))
    described = [one.get_config_dict() for one in (loss, expected)]
    assert [str({**of, "guide": None}) for of in described[:1]] == [
        str({**of, "guide": None}) for of in described[1:]
    ]
    assert loss.citation == expected.citation if hasattr(expected, "citation") else True
    for again in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(step(again), step(expected))


def names_of_host() -> dict[tuple[str, str], Any]:
    """Every class that a module of the host has, and its bases."""
    return {
        (module, name): (value, value.__bases__)
        for module, found in list(sys.modules.items())
        if module.partition(".")[0] == "sentence_transformers"
        for name, value in list(vars(found).items())
        if isinstance(value, type)
    }


def test_patch_and_unpatch(theirs: ModuleType) -> None:
    peer("sentence_transformers.sparse_encoder.losses")
    made(ours, NAMES[0])  # imports all
    before = names_of_host()
    ours.unpatch()
    assert names_of_host() == before
    ours.patch()
    after = names_of_host()
    ours.patch()
    assert names_of_host() == after
    from sentence_transformers.losses import MultipleNegativesRankingLoss as old_path
    from sentence_transformers.sentence_transformer.losses import gist_embed

    assert old_path is ours.MultipleNegativesRankingLoss is theirs.MultipleNegativesRankingLoss
    assert gist_embed.GISTEmbedLoss is ours.GISTEmbedLoss
    ours.unpatch()
    assert {k: v for k, v in names_of_host().items() if k in before} == before
    assert {key[1] for key in before if before[key] != after[key]} == {
        *NAMES, "SparseMultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss",
        "CachedMultipleNegativesSymmetricRankingLoss",
    }  # fmt: skip


def test_heirs_of_the_host(patched: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = peer("sentence_transformers.sparse_encoder.losses")
    symmetric = patched.MultipleNegativesSymmetricRankingLoss(Projected(WIDTH, 8))
    assert isinstance(symmetric, ours.MultipleNegativesRankingLoss)
    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    torch.testing.assert_close(step(symmetric), step(made(ours, NAMES[0], **options)))
    splade = sparse.SpladeLoss(
        Projected(WIDTH, 8), sparse.SparseMultipleNegativesRankingLoss(Projected(WIDTH, 8)),
        document_regularizer_weight=0.1, query_regularizer_weight=0.1,
    )  # fmt: skip
    found = splade(features(3), None)
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    torch.testing.assert_close(found, splade(features(3), None))


@pytest.mark.parametrize("name", NAMES)
def test_with_fastclip_disabled(
    name: str, theirs: ModuleType, monkeypatch: pytest.MonkeyPatch, fallbacks: list[str]
) -> None:
    loss = made(ours, name)
    losses = sys.modules[type(loss).__module__]
    for function in ("ranking_loss", "guided_loss"):
        monkeypatch.setattr(losses, function, lambda *given: pytest.fail("fastclip computes"))
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    ours.patch()
    assert getattr(theirs, name) is type(loss).__bases__[0]
    assert step(loss)[0] == step(made(theirs, name))[0] and not fallbacks


@pytest.mark.parametrize("name", NAMES)
def test_matryoshka(name: str, theirs: ModuleType, fallbacks: list[str]) -> None:
    found = []
    for of in (ours, theirs):
        loss = made(of, name)
        found.append(step(theirs.MatryoshkaLoss(loss.model, loss, [8, 4])))
    torch.testing.assert_close(*found)
    assert not fallbacks


def test_calls_of_the_host(theirs: ModuleType, fallbacks: list[str]) -> None:
    from sentence_transformers.util import euclidean_sim

    model = Projected(WIDTH, 8)
    options = [
        (NAMES[0], {"similarity_fct": euclidean_sim}),
        (NAMES[2], {"similarity_fct": euclidean_sim}),
        (NAMES[1], {"margin": -0.1}), (NAMES[3], {"margin": -0.1}),
    ]  # fmt: skip
    for name, given in options:
        losses = [made(of, name, model, **given) for of in (ours, theirs)]
        torch.testing.assert_close(*map(step, losses))
    for name in (NAMES[1], NAMES[3]):
        losses = [made(of, name, model) for of in (ours, theirs)]
        for loss in losses:
            loss.cross_entropy_loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        torch.testing.assert_close(*map(step, losses))
    sparse = [torch.eye(4, dtype=torch.float64).to_sparse() for _ in range(2)]
    for of in (ours, theirs):
        with pytest.raises(NotImplementedError):
            made(of, NAMES[0]).compute_loss_from_embeddings(sparse, None)
    assert len(fallbacks) == 7 and len(set(fallbacks)) == 4


def test_a_call_of_the_host_warns_once(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn_once, "_given", set())
    loss = made(ours, "GISTEmbedLoss", margin=-0.1)
    with pytest.warns(UserWarning, match="own code computes .*: the margin is negative") as found:
        step(loss)
        step(loss)
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean"])
def test_the_similarity_of_a_model(kind: str, theirs: ModuleType, fallbacks: list[str]) -> None:
    from sentence_transformers.util import SimilarityFunction

    class Model(Projected):
        similarity_fn_name = kind

        def similarity(self, a: Tensor, b: Tensor) -> Tensor:
            return SimilarityFunction.to_similarity_fn(kind)(a, b)

    model = Model(WIDTH, 8)
    losses = [made(of, NAMES[0], model, similarity_fct=model.similarity) for of in (ours, theirs)]
    torch.testing.assert_close(*map(step, losses))
    assert len(fallbacks) == (kind == "euclidean")


class Largest(TensorResults):
    """Records the most elements that a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def see(self, tensors: list[Tensor]) -> None:
        self.elements = max([self.elements, *(t.numel() for t in tensors)])


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_has_the_size_of_the_matrix(name: str, theirs: ModuleType) -> None:
    n = 300
    generator = torch.Generator().manual_seed(0)
    columns = [
        {key: torch.randn(n, WIDTH, generator=generator) for key in ("embedding", "guide")}
        for _ in range(3)
    ]
    loss = made(ours, name, Projected(WIDTH, 8).float())
    with Largest() as largest:
        loss(columns, None).backward()
    assert 0 < largest.elements < n * n / 4


@pytest.mark.parametrize("name", PLAIN)
def test_columns_that_do_not_fit(name: str, theirs: ModuleType, fallbacks: list[str]) -> None:
    """The host's errors."""
    loss = made(ours, name)
    with pytest.raises(ValueError, match="embeddings, got 1"):
        loss(features(1), None)
    if "GIST" in name:
        with pytest.raises(ValueError, match="2 or 3 embeddings, got 4"):
            loss(features(4), None)
    assert not fallbacks
