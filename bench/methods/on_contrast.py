"""The losses written on `fastclip.contrast`, with ids or a margin in some of the methods.

All ids differ, and the margin exceeds any difference of similarities. No pair is left out and the
loss stays the same, so that the time shows the cost of the options alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..case import Case
from ..cases import CONTRAST
from ..losses import loss_of


def _nothing(case: Case, device: str) -> dict[str, Any]:
    return {}


def _ids(case: Case, device: str) -> dict[str, Any]:
    ids = torch.randperm(case.n, generator=torch.Generator().manual_seed(0)).to(device)
    return {"ids": (ids[: case.m], ids)}


def _margin(case: Case, device: str) -> dict[str, Any]:
    return {"false_negative_margin": 2.0}


_OPTIONS: dict[str, Callable[[Case, str], dict[str, Any]]] = dict(
    zip(CONTRAST, (_nothing, _ids, _margin), strict=True)
)


def make(case: Case, method: str, device: str, engine: str | None) -> Callable[..., Tensor]:
    """The loss function of (x, y, scale, bias) for a method of CONTRAST."""
    from fastclip import contrast

    loss, options = loss_of(case.loss), _OPTIONS[method](case, device)
    statistics = partial(contrast, kind=loss.kind, backend=engine, **options)
    return lambda x, y, scale, bias: loss.on_lines(statistics(x, y, scale, bias))
