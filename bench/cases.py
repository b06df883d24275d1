"""The plans of the benchmark: each case is one loss on one shape, dtype, scale and mode.

Features are made here from a fixed seed. This file never runs a loss.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from .case import Case, Inputs
from .losses import FAMILY, LOSSES, loss_of

DTYPES = ("float32", "bfloat16", "autocast")
SCALES = (14.3, 100.0)  # an untrained CLIP's 1/0.07, and the scale of trained ones

DENSE = ("open_clip", "dense", "compiled")
STREAMED = ("fastclip", "fastclip budget=0", "fastclip torch")
CONTRAST = ("fastclip contrast", "fastclip contrast ids", "fastclip contrast margin")
PEERS = tuple(name for loss in LOSSES.values() for name in loss.peers)
METHODS = (*DENSE, "reference", "checkpoint", *STREAMED, *CONTRAST, *PEERS)
FAMILY_PEERS = tuple(dict.fromkeys(name for loss in FAMILY.values() for name in loss.peers))

C = TypeVar("C")

# The largest batch compared with float64: on a CPU a larger one takes minutes. A GPU needs seconds.
LARGEST_TRUTH = {"cpu": 16384, "cuda": 32768}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Normalised features from a fixed seed, rounded to the case's dtype.

    They are made on the device: a gigabyte of random numbers costs a CPU more than the loss costs
    a GPU. CPUs and GPUs therefore get different inputs.
    """
    generator = torch.Generator(device).manual_seed(case.m * 31 + case.n * 17 + case.d)
    x = torch.randn(case.m, case.d, generator=generator, device=device)
    y = torch.randn(case.n, case.d, generator=generator, device=device)
    if case.data == "separated":
        y[: case.m] = x + 0.05 * y[: case.m]
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    x, y = (F.normalize(side, dim=1).to(dtype) for side in (x, y))
    # logit_scale and the bias are float32 parameters for any dtype of the towers.
    scale = torch.tensor(case.scale, device=device)
    loss = loss_of(case.loss)
    inputs = Inputs(
        x, None if loss.one_side else y, scale if loss.scaled else None, loss.bias_on(device),
        loss.further(case.n, case.d, generator),
    )  # fmt: skip
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


def _square(n: int, d: int = 512, **changes: object) -> Iterator[Case]:
    for loss in LOSSES:
        for scale in SCALES:
            yield replace(Case(loss, n, n, d, "float32", scale), **changes)


def standard() -> list[Case]:
    """The plan of a plain run: about forty minutes on two cores."""
    cases: list[Case] = []
    everything = (*DENSE, "checkpoint", *STREAMED, *PEERS)
    few = (*DENSE, *STREAMED[:2], *PEERS)
    for n in (32, 128, 512):
        cases += _square(n, methods=everything)
    cases += _square(2048, methods=METHODS, memory=True)
    cases += _square(8192, methods=(*everything, *CONTRAST), memory=True)
    for n in (8191, 8193):
        cases += _square(n, methods=few)
    for n in (512, 2048, 8192):
        for dtype in ("bfloat16", "autocast"):
            taking_part = few if n == 512 else everything
            if (n, dtype) == (8192, "bfloat16"):
                taking_part = (*everything, *CONTRAST)
            cases += _square(n, dtype=dtype, methods=taking_part, memory=n >= 2048)
    for n in (32, 512, 8192):
        cases += _square(n, mode="forward", methods=few, memory=n == 8192)
    for d in (768, 1152):
        cases += _square(4096, d, methods=few)
        cases += _square(4096, d, dtype="bfloat16", methods=few)
    for dtype in ("float32", "autocast"):
        for loss in LOSSES:
            cases.append(Case(loss, 2048, 2048, 512, dtype, 14.3, "separated", methods=few))
    rectangle = ("dense", "compiled", *STREAMED)
    for dtype in ("float32", "bfloat16"):
        cases += [
            Case("clip", 256, 32768, 512, dtype, scale, methods=rectangle) for scale in SCALES
        ]
    return cases


def full() -> list[Case]:
    """`standard`, and sizes at which only a streaming loss fits in memory."""
    cases = standard()
    streaming = (*STREAMED[:2], *PEERS)
    for n in (16384, 65536):
        cases += _square(n, methods=streaming, memory=True)
        cases += _square(n, dtype="bfloat16", methods=streaming, memory=True)
    return cases


def family() -> list[Case]:
    """The other losses: with their peers, large, and at a size at which only memory is measured
    and a dense loss needs 17 GB and more."""
    cases: list[Case] = []
    for name, loss in FAMILY.items():
        few = ("dense", "compiled", *STREAMED[:2])
        few = ("open_clip", *few) if loss.module else few
        for n in (256, 2048):
            methods = (*few, STREAMED[2], *loss.peers)
            cases.append(Case(name, n, n, 512, "float32", SCALES[0], methods=methods, memory=True))
        large = Case(name, 8192, 8192, 512, "float32", SCALES[0], methods=few, memory=True)
        only_memory = {"methods": STREAMED[:1], "timed": False}
        cases += [large, replace(large, m=65536, n=65536, **only_memory)]
    return cases


def quick() -> list[Case]:
    """A plan of two minutes, to check the benchmark itself: its figures are rough."""
    few = ("open_clip", "dense", *STREAMED, *PEERS)
    cases: list[Case] = []
    for n in (32, 512, 2048):
        cases += _square(n, methods=few, memory=n == 2048)
    cases += _square(2048, dtype="bfloat16", methods=few)
    cases.append(Case("clip", 2048, 2048, 512, "float32", 14.3, data="separated", methods=few))
    cases.append(Case("clip", 128, 4096, 512, "float32", 14.3, methods=("dense", *STREAMED)))
    return [case for case in cases if case.scale == SCALES[0] or case.n == 2048]


def select(cases: Iterable[Case], patterns: list[str], methods: list[str]) -> list[Case]:
    """The cases whose name matches any pattern (`*` and `?` as in a shell, anywhere in the name),
    reduced to the methods named. An empty list of patterns or methods selects all."""
    chosen = []
    for case in matching(cases, patterns):
        taking_part = tuple(one for one in case.methods if not methods or one in methods)
        if taking_part:
            chosen.append(replace(case, methods=taking_part))
    return chosen


def matching(cases: Iterable[C], patterns: list[str]) -> list[C]:
    """The cases, of any class with a `name`, that match any pattern."""
    return [
        case for case in cases
        if not patterns or any(fnmatch.fnmatch(case.name, f"*{one}*") for one in patterns)
    ]  # fmt: skip
