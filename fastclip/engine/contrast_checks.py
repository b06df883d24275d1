"""Checks of the arguments of `contrast`, and the values that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kinds import kind_of
from .beside import Beside, Given
from .checks import (
    check_floating,
    check_ids,
    check_integers,
    check_key_bias,
    check_number,
    check_offset,
    check_sides,
    check_tensor,
    check_vector,
    is_readable,
    scalar,
)


def check_labels(
    labels: Tensor | None, ids: tuple[Tensor, Tensor] | None, offset: int | None, x: Tensor,
    y: Tensor,
) -> None:  # fmt: skip
    """Checks the columns of the rows' own positives. Values are checked on CPUs only: reading them
    elsewhere would wait for the device."""
    if labels is None:
        return
    check_tensor("labels", labels)
    check_integers("labels", labels)
    check_vector("labels", labels, "a column for each row of the features", x)
    if offset != 0:
        raise ValueError(f"labels take the place of offset, which must be 0, got {offset}")
    if not is_readable(labels) or labels.numel() == 0:
        return
    least, most = map(int, labels.aminmax())
    if least < 0 or most >= y.shape[0]:
        raise ValueError(
            f"labels must be columns, 0 <= label < {y.shape[0]}, got {least} to {most}"
        )
    if ids is not None and (wrong := (ids[0] != ids[1][labels.long()]).nonzero()).numel():
        row = int(wrong[0])
        raise ValueError(
            "a row and the key of its label must have one id, got "
            f"{int(ids[0][row])} and {int(ids[1][int(labels[row])])} in row {row}"
        )


def _check_ids_of_one_set(ids: tuple[Tensor, Tensor] | None) -> None:
    """Checks that both sides have the same ids; on CPUs only, as for labels."""
    if ids is None or ids[0] is ids[1] or not is_readable(ids[0]):
        return
    if not torch.equal(*ids):
        raise ValueError("without y ids must be one tensor, got two that differ")


def check_above(above: float | None, kind: str, same_id: str, one_set: bool) -> None:
    """Checks the distance of levels above own positives, which a kind with levels needs."""
    if not kind_of(kind).has_levels:
        if above is not None:
            raise ValueError(f"above must be None for kind {kind!r}, got {above!r}")
        return
    if above is None:
        raise ValueError(f"kind {kind!r} needs above, the distance of levels above own positives")
    check_number("above", above)
    if same_id == "positive" or one_set:
        raise ValueError(
            f"kind {kind!r} needs own positives alone: same_id must be 'ignore' and y be given"
        )


def _check_one_set(offset: int | None, given: Given, key_bias: Tensor | None, rows: bool) -> None:
    """Checks the options of a block of one set of features against itself."""
    absent = {
        "labels": given.labels, "false_negative_margin": given.margin, "targets": given.targets,
        "key_bias": key_bias,
    }  # fmt: skip
    for name, value in absent.items():
        if value is not None:
            raise ValueError(f"{name} must be None without y: no row has a positive of its own")
    if offset != 0 or not rows:
        raise ValueError(
            "without y the own pairs are left out and only rows are returned: offset must be 0 and "
            f"rows True, got {offset} and {rows}"
        )


def _check_pair(name: str, pair: Any, count: int, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    """Checks a second pair of features, beside x (M, D) and y (N, D)."""
    if not isinstance(pair, Sequence) or len(pair) != count:
        got = f"{len(pair)} of them" if isinstance(pair, Sequence) else type(pair).__name__
        rule = "(x', y', scale')" if count == 3 else "(x', y')"
        raise TypeError(f"{name} must be {rule}, got {got}")
    for side, own, other in zip(("x'", "y'"), (x, y), pair[:2], strict=True):
        check_tensor(f"{name}: {side}", other)
        check_floating(f"{name}: {side}", other)
        if other.dim() != 2 or other.shape[0] != own.shape[0] or other.device != own.device:
            raise ValueError(
                f"{name}: {side} must have {own.shape[0]} rows on {own.device}, got "
                f"{tuple(other.shape)} on {other.device}"
            )
    if pair[0].shape[1] != pair[1].shape[1] or pair[0].shape[1] == 0:
        raise ValueError(
            f"{name}: x' and y' must have one width, got {tuple(pair[0].shape)} and "
            f"{tuple(pair[1].shape)}"
        )
    return tuple(pair)


def _beside(
    given: Given, x: Tensor, y: Tensor, key_bias: Tensor | None, kind: str, one_set: bool,
    offset: int | None, same_id: str,
) -> Beside:  # fmt: skip
    ids, guide = given.ids, given.guide
    if one_set:
        ids = (ids, ids) if isinstance(ids, Tensor) else ids
        guide = (guide, guide) if isinstance(guide, Tensor) else guide
    ids = check_ids(ids, same_id, x, y)
    if one_set:
        _check_ids_of_one_set(ids)
    check_labels(given.labels, ids, offset, x, y)
    margin = given.margin
    if margin is not None:
        margin = scalar("false_negative_margin", margin, x).detach()
    if given.limits is not None:
        check_tensor("limits", given.limits)
        check_floating("limits", given.limits)
        check_vector("limits", given.limits, "the limit of each row", x)
        if margin is not None:
            raise ValueError("limits take the place of false_negative_margin, got both")
    found = Beside(ids, margin, given.labels, limits=given.limits)
    if guide is not None:
        if given.targets is not None:
            raise ValueError("targets and guide exclude each other, got both")
        if margin is None and given.limits is None:
            raise ValueError("guide needs false_negative_margin or limits, got neither")
        targets = _check_pair("guide", guide, 2, x, y)
        return found._replace(
            target_x=targets[0].detach(), target_y=targets[1].detach(), guided=True
        )
    if given.targets is None:
        return found
    *targets, scale = _check_pair("targets", given.targets, 3, x, y)
    if key_bias is not None or kind_of(kind).has_levels:
        raise ValueError(f"targets take no key_bias and no kind with levels, got kind {kind!r}")
    scale = scalar("targets: scale'", scale, x).detach()
    return found._replace(
        target_x=targets[0].detach(), target_y=targets[1].detach(), target_scale=scale
    )


def check_contrast(
    x: Tensor, y: Tensor | None, logit_scale: Tensor | float, logit_bias: Tensor | float | None,
    key_bias: Tensor | None, given: Given, *, offset: int | None, same_id: str, rows: bool,
    columns: bool, kind: str, above: float | None = None, may_be_empty: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Beside]:  # fmt: skip
    """Checks the arguments of `contrast`, except backend and memory_budget; returns y, scale, bias,
    and what stands beside the features."""
    one_set = y is None
    check_offset(offset)
    check_above(above, kind, same_id, one_set)
    if one_set:
        _check_one_set(offset, given, key_bias, rows)
        # An autograd Function needs distinct tensor objects; all of the gradient is x's.
        y = x.detach() if isinstance(x, Tensor) else x
    elif y is x:
        y = y.view_as(y)
    check_sides(x, y, may_be_empty)
    check_key_bias(key_bias, y)
    if not (rows or columns):
        raise ValueError("rows or columns must be wanted, got rows=False, columns=False")
    beside = _beside(given, x, y, key_bias, kind, one_set, offset, same_id)
    scale = scalar("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else scalar("logit_bias", logit_bias, x)
    return y, scale, bias, beside
