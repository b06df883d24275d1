"""Published losses of other projects. Each needs a CUDA device and its package.

    inf_cl 1.2.1         arXiv 2410.17243: a one-way softmax, called once for each direction
    liger_kernel 0.8.5   its fused linear layer and cross-entropy, called once for each direction
    memeff 0.3.1         a two-way softmax; its temperature is a number and gets no gradient
    siglip_kernel 0.1.2  SigLIP

Nothing is installed here. The packages run with their defaults, except that memeff is asked for the
gradient of its loss (`stable=False`) instead of a multiple of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..cases import Case

LossFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Missing(Exception):
    """Raised, with the reason, if a peer cannot run."""


@dataclass(frozen=True)
class Peer:
    """A peer; `forward` and `both` are the matmul passes of its kernels, without and with a
    backward."""

    text: str
    make: Callable[[Case, str], LossFunction]
    forward: float
    both: float


def _module(name: str, case: Case, device: str, loss: str) -> ModuleType:
    if device != "cuda":
        raise Missing(
            "needs a CUDA device: --device cuda"
            if torch.cuda.is_available()
            else "needs a CUDA device: none here"
        )
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Missing("is not installed")
    if case.loss != loss:
        raise Missing(f"has no {case.loss} loss")
    if not case.square:
        raise Missing("takes square blocks only")
    try:
        return importlib.import_module(name)
    except Exception as error:  # some probe the GPU on import, and fail with errors of any type
        raise Missing(f"does not import: {error}") from error


def _inf_cl(case: Case, device: str) -> LossFunction:
    flash = _module("inf_cl.flash", case, device, "clip")
    # Its kernels cut D into heads; their width must divide D and be a power of two.
    head = next((width for width in (256, 128, 64, 32, 16) if case.d % width == 0), None)
    if head is None:
        raise Missing(f"has no head width for D = {case.d}")

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        rows = flash.cal_flash_loss(x, y, scale=scale, head_dim=head).mean()
        return (rows + flash.cal_flash_loss(y, x, scale=scale, head_dim=head).mean()) / 2

    return loss


def _liger(case: Case, device: str) -> LossFunction:
    functional = _module("liger_kernel.transformers.functional", case, device, "clip")
    labels = torch.arange(case.m, device=device)
    one_way = functional.liger_fused_linear_cross_entropy

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # The scale has a gradient only as a factor of the features, in their dtype.
        factor = scale.to(x.dtype)
        return (one_way(factor * x, y, labels) + one_way(factor * y, x, labels)) / 2

    return loss


def _memeff(case: Case, device: str) -> LossFunction:
    package = _module("memeff", case, device, "clip")
    module = package.MemoryEfficientCLIPLoss(
        temperature=1 / case.scale, normalized_inputs=True, stable=False
    )
    return lambda x, y, scale, bias: module(x, y)


def _siglip_kernel(case: Case, device: str) -> LossFunction:
    package = _module("siglip_kernel", case, device, "siglip")
    return lambda x, y, scale, bias: package.fused_siglip_loss(x, y, scale.log(), bias)


PEERS: dict[str, Peer] = {
    "inf_cl": Peer("Inf-CL, both directions", _inf_cl, 2, 10),
    "liger": Peer("Liger's linear cross-entropy, both ways", _liger, 2, 6),
    "memeff": Peer("MemoryEfficientCLIPLoss", _memeff, 1, 5),
    "siglip_kernel": Peer("fused_siglip_loss", _siglip_kernel, 3, 3),
}
