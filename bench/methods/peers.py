"""Published losses of other projects, if their packages are installed.

    inf_cl 1.2.1         arXiv 2410.17243: a one-way softmax, called once for each direction
    liger_kernel 0.8.5   its fused linear layer and cross-entropy, called once for each direction
    memeff 0.3.1         a two-way softmax; its temperature is a number and gets no gradient
    siglip_kernel 0.1.2  SigLIP
    lightly 1.6.0, pytorch-metric-learning 2.9.0, sentence-transformers 6.2.0
                         dense losses, on any device; their temperatures are numbers, too

Nothing is installed here; `make bench-peers` makes .venv-peers, which has the last line's packages.
They run with their defaults, except that memeff is asked for the gradient of its loss
(`stable=False`) instead of a multiple of it, and that features are not normalised again, which
lightly always does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..case import Case
from . import open_clip

LossFunction = Callable[..., Tensor]


class Missing(Exception):
    """Raised, with the reason, if a peer cannot run."""


class Library(NamedTuple):
    """A package with losses that may be peers of ours, and the module that has them."""

    text: str
    module: str
    on_cpus: bool = False


class Peer(NamedTuple):
    """A library's loss. `make` takes the library's module; `forward` and `both` are the matmul
    passes of its kernels, without and with a backward. It can take `most` rows. If it `normalises`
    features, gradients are those of the features before, and have no truth."""

    make: Callable[[ModuleType, Case, str], LossFunction]
    forward: float
    both: float
    most: int | None = None
    normalises: bool = False


LIBRARIES: dict[str, Library] = {
    "inf_cl": Library("Inf-CL, both directions", "inf_cl.flash"),
    "liger": Library(
        "Liger's linear cross-entropy, both ways", "liger_kernel.transformers.functional"
    ),
    "memeff": Library("MemoryEfficientCLIPLoss", "memeff"),
    "siglip_kernel": Library("fused_siglip_loss", "siglip_kernel"),
    "sentence_transformers": Library(
        "MultipleNegativesRankingLoss", "sentence_transformers.sentence_transformer.losses", True
    ),
    "lightly": Library("lightly's NTXentLoss", "lightly.loss", True),
    "metric_learning": Library(
        "pytorch-metric-learning's losses", "pytorch_metric_learning.losses", True
    ),
}


def make(name: str, peer: Peer | None, case: Case, device: str) -> LossFunction:
    """The loss of a library for a case; `peer` is the entry of the case's loss, if it has one.

    Raises:
        Missing: with the reason.
    """
    library = LIBRARIES[name]
    if device != "cuda" and not library.on_cpus:
        raise Missing(
            "needs a CUDA device: --device cuda"
            if torch.cuda.is_available()
            else "needs a CUDA device: none here"
        )
    if importlib.util.find_spec(library.module.partition(".")[0]) is None:
        raise Missing("is not installed")
    if peer is None:
        raise Missing(f"has no {case.loss} loss")
    if not case.square:
        raise Missing("takes square blocks only")
    if peer.most is not None and case.m > peer.most:
        raise Missing(f"takes too much memory beyond N = {peer.most}")
    try:
        if library.on_cpus:  # these import torchvision, as open_clip does
            module = open_clip.import_module(library.module, needs=("torchvision",))
        else:
            module = importlib.import_module(library.module)
    except Exception as error:  # some probe the GPU on import, and fail with errors of any type
        raise Missing(f"does not import: {error}") from error
    return peer.make(module, case, device)


def inf_cl(flash: ModuleType, case: Case, device: str) -> LossFunction:
    # Its kernels cut D into heads; their width must divide D and be a power of two.
    head = next((width for width in (256, 128, 64, 32, 16) if case.d % width == 0), None)
    if head is None:
        raise Missing(f"has no head width for D = {case.d}")

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows = flash.cal_flash_loss(x, y, scale=scale, head_dim=head).mean()
        return (rows + flash.cal_flash_loss(y, x, scale=scale, head_dim=head).mean()) / 2

    return loss


def liger(functional: ModuleType, case: Case, device: str) -> LossFunction:
    labels = torch.arange(case.m, device=device)
    one_way = functional.liger_fused_linear_cross_entropy

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # The scale has a gradient only as a factor of the features, in their dtype.
        factor = scale.to(x.dtype)
        return (one_way(factor * x, y, labels) + one_way(factor * y, x, labels)) / 2

    return loss


def memeff(package: ModuleType, case: Case, device: str) -> LossFunction:
    module = package.MemoryEfficientCLIPLoss(
        temperature=1 / case.scale, normalized_inputs=True, stable=False
    )
    return lambda x, y, scale, bias: module(x, y)


def siglip_kernel(package: ModuleType, case: Case, device: str) -> LossFunction:
    return lambda x, y, scale, bias: package.fused_siglip_loss(x, y, scale.log(), bias)


def multiple_negatives(losses: ModuleType, case: Case, device: str) -> LossFunction:
    util = importlib.import_module("sentence_transformers.util")
    loss = losses.MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=case.scale, similarity_fct=util.dot_score
    )
    return lambda x, y, scale: loss.compute_loss_from_embeddings([x, y], None)


def lightly(losses: ModuleType, case: Case, device: str) -> LossFunction:
    loss = losses.NTXentLoss(temperature=1 / case.scale)
    return lambda x, y, scale: loss(x, y)


def metric_learning_supcon(losses: ModuleType, case: Case, device: str) -> LossFunction:
    loss = losses.SupConLoss(temperature=1 / case.scale, distance=_dot_products())
    return lambda x, labels, scale: loss(x, labels)


def metric_learning_nt_xent(losses: ModuleType, case: Case, device: str) -> LossFunction:
    loss = losses.NTXentLoss(temperature=1 / case.scale, distance=_dot_products())
    loss = losses.SelfSupervisedLoss(loss)
    return lambda x, y, scale: loss(x, y)


def _dot_products() -> object:
    distances = importlib.import_module("pytorch_metric_learning.distances")
    return distances.DotProductSimilarity(normalize_embeddings=False)
