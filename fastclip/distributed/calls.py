"""The beginning of a call across ranks: checks of this rank's arguments, then the ranks' agreement.

A mistake on one rank is an error on all of them: a rank that is about to raise informs the others
first, if the group can exchange through CPU memory (`agreement.announce_failure`). Eager calls and
the operators of compiled ones (`compiled/`) begin here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.autograd import refuse_forward_mode
from ..engine.backends import choose
from ..engine.beside import Given
from ..engine.block import NO_POSITIVES
from ..engine.checks import budget_of, check_features, check_live, scalar
from ..engine.contrast_checks import check_contrast
from ..engine.dtypes import product_dtype
from ..engine.fused_loss import LossInputs, LossOptions
from ..engine.line_formulas import Request
from ..engine.statistics_call import StatisticsInputs, StatisticsOptions
from ..kinds import KINDS, kind_of
from .agreement import Call, agree, agree_on_sides, announced, check_world, ranks_of
from .gradient_mode import GradientMode
from .shard import Shard
from .sharded_loss import LossTask
from .sharded_statistics import StatisticsTask


class LossCall(NamedTuple):
    """The options of a loss, as the caller passed them."""

    kind: str
    mode: GradientMode
    uneven: bool
    normalize: bool
    backend: str | None
    memory_budget: int | None
    live: tuple[int, int] | None
    world: tuple[str, int, int] | None  # a module's name, rank and world size
    loss: str  # the loss that calls, with its options: the same on all ranks
    dtype: torch.dtype | None = None  # of the products; None: `product_dtype` of the features


class ContrastCall(NamedTuple):
    """The options of `distributed.contrast`, as the caller passed them."""

    offset: int | None = 0
    same_id: str = "ignore"
    rows: bool = True
    columns: bool = True
    means: bool = False
    teaches: bool = False  # targets are given
    guided: bool = False  # a guide is given
    one_set: bool = False  # y is x
    kind: str = "softmax"
    above: float | None = None
    normalize: bool = False
    ring: bool = False
    uneven: bool = False
    backend: str | None = None
    memory_budget: int | None = None
    loss: str = "contrast()"  # the loss that calls, with its options: the same on all ranks
    dtype: torch.dtype | None = None


def contrast_call(
    x: Tensor, y: Tensor | None, logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None, *, labels: Tensor | None = None, ids: Any = None,
    false_negative_margin: Tensor | float | None = None, key_bias: Tensor | None = None,
    targets: Any = None, guide: Any = None, limits: Tensor | None = None, **options: Any,
) -> tuple[tuple[Any, ...], ContrastCall]:  # fmt: skip
    """The tensors of a call of `contrast`, as `begin_contrast` takes them, and its options.
    options: further fields of `ContrastCall`."""
    others = Given(ids, false_negative_margin, labels, targets, guide, limits)
    call = ContrastCall(
        **options, teaches=targets is not None, guided=guide is not None, one_set=y is None
    )
    return (x, y, logit_scale, logit_bias, key_bias, others), call


class CheckedLoss(NamedTuple):
    inputs: LossInputs
    options: LossOptions
    live: tuple[int, int] | None
    must_match: dict[str, int | float | torch.dtype]  # what ranks must have in common


class CheckedContrast(NamedTuple):
    inputs: StatisticsInputs
    task: StatisticsTask  # without a shard
    must_match: dict[str, int | float | torch.dtype]


def begin_loss(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: LossCall
) -> tuple[LossInputs, LossTask]:
    """Checks the arguments of a loss and agrees with the other ranks. given: x, y, scale, bias."""
    checked = announced(process_group, lambda: checked_loss(given, process_group, call))
    inputs, options, live, must_match = checked
    compared = Call(call.loss, _wants(*inputs), call.uneven, must_match, _scalars(given))
    shard = agree(process_group, *inputs[:2], compared, live)
    return inputs, LossTask(options, shard, call.mode)


def begin_contrast(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> tuple[StatisticsInputs, StatisticsTask]:
    """Checks the arguments of `contrast` and agrees with the other ranks.

    given: x, y, scale, bias, key_bias, and a `Given`.
    """
    inputs, task, must_match = announced(
        process_group, lambda: checked_contrast(given, process_group, call)
    )
    compared = Call(call.loss, _wants(*inputs), call.uneven, must_match, _scalars(given))
    shard = agree_on_sides(process_group, inputs.x, inputs.y, inputs.key_bias, compared)
    return inputs, task._replace(shard=shard)


def _scalars(given: Sequence[Any]) -> dict[str, Tensor | float | None]:
    return {"logit_scale": given[2], "logit_bias": given[3]}


def _wants(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def checked_loss(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: LossCall
) -> CheckedLoss:
    """Checks a rank's arguments of a loss, as `begin_loss` takes them."""
    x, y, logit_scale, logit_bias = given
    if call.world is not None:
        check_world(*call.world, process_group)
    check_features(x, y, may_be_empty=call.uneven)
    live = check_live(call.live, x.shape[0])
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    refuse_forward_mode(x, y, scale, bias)
    # The ranks compare this dtype, since autocast may be on for only some of them.
    dtype = call.dtype or product_dtype(x, y)
    must_match = {
        "kind": _index(call.kind), "normalize": int(call.normalize),
        "logit_bias": int(bias is not None),
        **{name: int(value) for name, value in call.mode._asdict().items()},
        "dtype of products": dtype,
    }  # fmt: skip
    engine = engine_of(call.backend, x, y, ranks_of(process_group), dtype, call.kind)
    budget = budget_of(call.memory_budget, x.device)
    options = LossOptions(call.kind, engine, dtype, call.normalize, "mean", budget)
    return CheckedLoss((x, y, scale, bias), options, live, must_match)


def checked_contrast(
    given: Sequence[Any], process_group: dist.ProcessGroup | None, call: ContrastCall
) -> CheckedContrast:
    """Checks a rank's arguments of `contrast`, as `begin_contrast` takes them."""
    x, y, logit_scale, logit_bias, key_bias, others = given
    y, scale, bias, beside = check_contrast(
        x, None if call.one_set else y, logit_scale, logit_bias, key_bias, others,
        offset=call.offset, same_id=call.same_id, rows=call.rows, columns=call.columns,
        kind=call.kind, above=call.above, may_be_empty=call.uneven,
    )  # fmt: skip
    refuse_forward_mode(x, y, scale, bias, key_bias)
    dtype = call.dtype or product_dtype(x, y, *beside.targets())
    request = request_of(call)
    must_match: dict[str, int | float | torch.dtype] = {
        "kind": _index(call.kind), "normalize": int(call.normalize), "ring": int(call.ring),
        **{name: int(getattr(beside, field) is not None) for name, field in _OPTIONAL.items()},
        "guide": int(beside.guided), "offset=None": int(call.offset is None),
        "y=None": int(request.one_set), "rows": int(request.rows),
        "columns": int(request.columns), "means": int(request.means),
        "same_id": int(request.same_id_positive), "logit_bias": int(bias is not None),
        "dtype of products": dtype,
        "above": float("nan" if call.above is None else call.above),
        "width of targets": 0 if beside.target_x is None else beside.target_x.shape[1],
    }  # fmt: skip
    engine = engine_of(call.backend, x, y, ranks_of(process_group), dtype, call.kind)
    budget = budget_of(call.memory_budget, x.device)
    options = StatisticsOptions(engine, dtype, call.normalize, budget, call.above, request)
    offset = NO_POSITIVES if call.offset is None else call.offset
    task = StatisticsTask(options, beside, offset, call.kind, PLACEHOLDER_SHARD, call.ring)
    return CheckedContrast(StatisticsInputs(x, y, scale, bias, key_bias), task, must_match)


def request_of(call: ContrastCall) -> Request:
    """The statistics that a call asks for."""
    columns = bool(call.columns) and not call.one_set
    positive = call.same_id == "positive"
    return Request(bool(call.rows), columns, positive, bool(call.means), call.teaches, call.one_set)


# Ranks must agree on which of these are given.
_OPTIONAL = {
    "ids": "ids", "labels": "labels", "false_negative_margin": "margin", "limits": "limits",
    "targets": "target_scale",
}  # fmt: skip


# Stands in a task for the shard until the ranks have agreed.
PLACEHOLDER_SHARD = Shard(None, 0, (0,), (0,), (slice(0, 0),), False, False)


def engine_of(
    backend: str | None, x: Tensor, y: Tensor, ranks: int, dtype: torch.dtype, kind: str
) -> str:
    """The engine for this rank's rows by all ranks' columns, assuming ranks of one size."""
    logits = x.shape[0] * y.shape[0] * ranks
    engine = choose(backend, x.device, dtype, logits, x.shape[1], kind)
    if engine == "reference":
        raise ValueError("backend must be an engine across ranks, got the dense 'reference'")
    return engine


def _index(kind: str) -> int:
    return list(KINDS).index(kind_of(kind).name)
