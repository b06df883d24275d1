"""The cases: a host's class with its options, on embeddings of random numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..methods.open_clip import import_module
from .embedded import Embedded

METHODS = ("host", "fastclip")
Step = Callable[[], object]


@dataclass(frozen=True)
class Host:
    """The module with a host's losses, and ours."""

    losses: str
    integration: str

    def of(self, method: str) -> ModuleType:
        """The module whose classes a method uses."""
        host = import_module(self.losses, needs=("torchvision",))
        if method == "host":
            return host
        return importlib.import_module(f"fastclip.integrations.{self.integration}")


HOSTS = {
    "sentence-transformers": Host(
        "sentence_transformers.sentence_transformer.losses", "sentence_transformers"
    ),
    "lightly": Host("lightly.loss", "lightly"),
    "pytorch-metric-learning": Host("pytorch_metric_learning.losses", "metric_learning"),
}


@dataclass(frozen=True)
class Case:
    """A class of a host, `columns` matrices (n, d) of embeddings, and the call that is measured."""

    host: str
    text: str
    cls: str
    call: Callable[[Any, list[Tensor]], Tensor]
    n: int = 4096
    columns: int = 2
    d: int = 384
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = METHODS
    memory: bool = True

    @property
    def name(self) -> str:
        """The name that `--only` is matched against."""
        return f"{self.host} {self.text} {self.n}"


def make_step(case: Case, method: str) -> Step:
    """Returns a step: forward, and backward to all embeddings."""
    of = HOSTS[case.host].of(method)
    guide = {"guide": Embedded("guide")} if "GIST" in case.cls else {}
    model = (Embedded(),) if case.host == "sentence-transformers" else ()
    loss = getattr(of, case.cls)(*model, **guide, **case.options)
    generator = torch.Generator().manual_seed(case.n)
    leaves = [
        torch.randn(case.n, case.d, generator=generator).requires_grad_()
        for _ in range(case.columns)
    ]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.call(loss, leaves), leaves)

    return step


def _ranking(loss: Any, leaves: list[Tensor]) -> Tensor:
    return loss.compute_loss_from_embeddings(leaves, None)


def _cached(loss: Any, leaves: list[Tensor]) -> Tensor:
    return loss.calculate_loss([list(leaf.split(loss.mini_batch_size)) for leaf in leaves])


def _gist(loss: Any, leaves: list[Tensor]) -> Tensor:
    return loss([{"embedding": leaf, "guide": leaf.detach().roll(1, 1)} for leaf in leaves], None)


def _cached_gist(loss: Any, leaves: list[Tensor]) -> Tensor:
    reps = [list(leaf.split(loss.mini_batch_size)) for leaf in leaves]
    return loss.calculate_loss(reps, [[part.detach().roll(1, 1) for part in c] for c in reps])


def _views(loss: Any, leaves: list[Tensor]) -> Tensor:
    return loss(*leaves)


def _labelled(loss: Any, leaves: list[Tensor]) -> Tensor:
    return loss(torch.cat(leaves), torch.arange(len(leaves[0])).repeat(len(leaves)))


MNRL = "MultipleNegativesRankingLoss"
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
GTE = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}


def _of_size(n: int) -> list[Case]:
    st, memory = "sentence-transformers", n == 4096
    # The host's products for the similarities of GIST take 4 N^2 D bytes, 26 GB at N = 4096.
    gist = ("fastclip",) if n > 1024 else METHODS
    # The host's NT-Xent takes 4 P K bytes for P positive and K negative pairs, 34 GB at N = 1024.
    pairs = ("fastclip",) if n > 256 else METHODS
    return [
        Case(st, "MNRL", MNRL, _ranking, n, memory=memory),
        Case(st, "MNRL, both ways", MNRL, _ranking, n, options=BOTH, memory=memory),
        Case(st, "MNRL, a hard negative", MNRL, _ranking, n, 3, memory=memory),
        Case(st, "MNRL, four directions (GTE)", MNRL, _ranking, n, options=GTE, memory=memory),
        Case(st, "cached MNRL", f"Cached{MNRL}", _cached, n, memory=memory),
        Case(st, "GIST", "GISTEmbedLoss", _gist, n, methods=gist, memory=n >= 1024),
        Case(st, "cached GIST", "CachedGISTEmbedLoss", _cached_gist, n, methods=gist,
             memory=memory),
        Case("lightly", "NTXentLoss", "NTXentLoss", _views, n, memory=memory),
        Case("lightly", "DCLLoss", "DCLLoss", _views, n, memory=memory),
        Case("pytorch-metric-learning", "NTXentLoss, two views", "NTXentLoss", _labelled, n,
             methods=pairs, memory=n >= 256),
        Case("pytorch-metric-learning", "SupConLoss, two views", "SupConLoss", _labelled, n,
             memory=memory),
    ]  # fmt: skip


def standard() -> list[Case]:
    """Batches of fine-tuning, and a large one: half an hour on two cores."""
    return [case for n in (64, 256, 1024, 4096) for case in _of_size(n)]


def quick() -> list[Case]:
    """A plan of two minutes, to check the benchmark itself."""
    return [case for case in _of_size(256) if case.host != "lightly"]
