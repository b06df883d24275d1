"""A sum over ranks, as an operator that a graph can hold."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.namespace import OPS
from ..agreement import group_named, group_of
from .rank_operator import define


def _total(x: Tensor, group: str) -> list[Tensor]:
    out, of = x.clone(), group_of(group_named(group))
    if of is not None:
        dist.all_reduce(out, group=of)
    return [out]


def _fake(x: Tensor, group: str) -> list[Tensor]:
    return [torch.empty_like(x)]


define("rank_total", "(Tensor x, str group) -> Tensor[]", _total, _fake)


def total(process_group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """Returns the sum over the ranks of a group; it has no gradient."""
    group = "" if process_group is None else process_group.group_name
    return OPS.rank_total(x.detach(), group)[0]
