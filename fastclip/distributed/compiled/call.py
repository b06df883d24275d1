"""Turns a call of a loss across ranks into a call of its operator. Dynamo traces this code."""

from __future__ import annotations

import functools
import hashlib
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.checks import scalar
from ...engine.compile_marks import constant_in_graphs
from ...engine.dtypes import product_dtype
from ...engine.line_formulas import wanted_statistics
from ...engine.namespace import OPS
from ...kinds import LineStatistics
from ..agreement import group_named, ranks_of
from ..calls import ContrastCall, LossCall, engine_of, request_of
from . import contrast as _contrast  # noqa: F401 -- defines the operators
from .loss import TracedOptions
from .rank_operator import Trace


def _is_plain_tensor(value: Any, optional: bool = True) -> bool:
    if value is None:
        return optional
    return isinstance(value, Tensor) and type(value).__name__ != "DTensor"


def _is_scalar(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number or _is_plain_tensor(value)


def _is_int(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_group(process_group: Any) -> bool:
    return process_group is None or isinstance(process_group, dist.ProcessGroup)


def takes_loss(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: LossCall
) -> bool:
    """False for arguments that a schema or a graph cannot hold; the graph then breaks. Wrong values
    of the right types are accepted, and raise on every rank when the graph runs."""
    x, y, scale, bias = given
    live = () if call.live is None else call.live
    return (
        not call.uneven
        and _is_plain_tensor(x, False) and _is_plain_tensor(y, False)
        and scale is not None and _is_scalar(scale) and _is_scalar(bias)
        and _is_group(process_group)
        and isinstance(live, (tuple, list)) and len(live) in (0, 2)
        and (call.live is None or len(live) == 2) and all(_is_int(t) for t in live)
        and _is_int(call.memory_budget) and isinstance(call.backend, (str, type(None)))
    )  # fmt: skip


def takes_contrast(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> bool:
    """As `takes_loss`, for the arguments of `contrast`."""
    x, y, scale, bias, key_bias, (ids, margin, labels, targets, guide, limits) = given
    guide = (guide, guide) if isinstance(guide, Tensor) else guide
    beside = (*(targets or ()), *(guide or ()), limits)
    pair = () if ids is None else (ids, ids) if isinstance(ids, Tensor) else ids
    return (
        not call.uneven
        and _is_plain_tensor(x, False) and _is_plain_tensor(y, call.one_set)
        and _is_plain_tensor(key_bias) and _is_plain_tensor(labels)
        and all(isinstance(t, (tuple, list, type(None))) for t in (targets, guide))
        and len(targets or (0,) * 3) == 3 and len(guide or (0,) * 2) == 2
        and all(_is_scalar(t) for t in beside)
        and scale is not None and _is_scalar(scale) and _is_scalar(bias) and _is_scalar(margin)
        and _is_group(process_group)
        and isinstance(pair, (tuple, list)) and len(pair) in (0, 2)
        and (ids is None or len(pair) == 2) and all(_is_plain_tensor(t, False) for t in pair)
        and _is_int(call.offset) and isinstance(call.same_id, str) and isinstance(call.kind, str)
        and _is_int(call.memory_budget) and isinstance(call.backend, (str, type(None)))
    )  # fmt: skip


# The size of a named group never changes.
@constant_in_graphs
def _ranks_of(group: str) -> int:
    return ranks_of(group_named(group))


@functools.cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[2].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@constant_in_graphs
def _source_digest() -> str:
    """A digest of this library's text: compilers keep graphs on disk, which must not outlive it."""
    return _digest()


def _trace(
    inputs: Sequence[Tensor | None], process_group: dist.ProcessGroup | None,
    call: LossCall | ContrastCall, dtype: torch.dtype,
) -> Trace:  # fmt: skip
    x, y = inputs[:2]
    group = "" if process_group is None else process_group.group_name
    ranks = _ranks_of(group)
    engine = ""
    if x.dim() == y.dim() == 2:
        try:
            engine = engine_of(call.backend, x, y, ranks, dtype, call.kind)
        except (TypeError, ValueError):
            engine = ""
    needs = [t is not None and t.requires_grad for t in inputs]
    saves = torch.is_grad_enabled() and any(needs)
    return Trace(group, ranks, engine, needs, saves, _source_digest())


def _tensor(name: str, value: Any, x: Tensor) -> Tensor | None:
    """A scalar on x's device; one that does not fit raises when the graph runs."""
    if value is None:
        return None
    try:
        return scalar(name, value, x)
    except (TypeError, ValueError):
        return value


def traced_loss(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: LossCall
) -> Tensor:
    """`distributed_loss`, as an operator."""
    x, y, scale, bias = given
    scale, bias = _tensor("logit_scale", scale, x), _tensor("logit_bias", bias, x)
    dtype = product_dtype(x, y)
    inputs = x, y, scale, bias
    trace = _trace(inputs, process_group, call, dtype)
    return OPS.rank_loss(*inputs, *TracedOptions.of(call, dtype), *trace)[0]


def traced_contrast(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> LineStatistics:
    """`distributed.contrast`, as an operator."""
    x, y, scale, bias, key_bias, (ids, margin, labels, targets, guide, limits) = given
    y = x.detach() if call.one_set else y
    ids = (ids, ids.clone()) if isinstance(ids, Tensor) else ids
    scale, bias = _tensor("logit_scale", scale, x), _tensor("logit_bias", bias, x)
    margin = _tensor("false_negative_margin", margin, x)
    margin = None if margin is None else margin.detach()
    x_ids, y_ids = (None, None) if ids is None else ids
    beside: tuple[Tensor | None, ...] = (None, None, None)
    if targets is not None:
        beside = (*(t.detach() for t in targets[:2]), _tensor("targets: scale'", targets[2], x))
    elif guide is not None:
        guide = (guide, guide.clone()) if isinstance(guide, Tensor) else guide
        beside = (*(t.detach() for t in guide), None)
    dtype = product_dtype(x, y, *(t for t in beside[:2] if t is not None))
    inputs = x, y, scale, bias, key_bias
    options = call._replace(
        rows=bool(call.rows), columns=bool(call.columns), means=bool(call.means),
        normalize=bool(call.normalize), ring=bool(call.ring), dtype=dtype,
    )  # fmt: skip
    trace = _trace(inputs, process_group, call, dtype)
    found = OPS.rank_contrast(
        *inputs, x_ids, y_ids, margin, *beside, limits, labels, *options, *trace
    )
    return wanted_statistics(found, request_of(options))
