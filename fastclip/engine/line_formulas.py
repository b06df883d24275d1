"""The formulas of lines, O(M + N) in plain PyTorch: statistics from a sweep's states, and the
factors of pairs' weights from the statistics' upstream gradients.

The weight of a pair is its activation times the coefficients of its lines. For a kind with a shift
a coefficient is the upstream gradient of the line divided by the line's sum, for others the
upstream gradient itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kinds import Kind, LineStatistics, kind_of
from . import pairs
from .block import Block, Upstream
from .line_means import LineMeans, MeanFactors


class Request(NamedTuple):
    """The statistics that a call of `contrast` asks for."""

    rows: bool
    columns: bool
    same_id_positive: bool
    means: bool
    teaches: bool  # there are targets: expectations of the logits
    # y is x: pairs of a feature with itself do not count, and the columns are the rows.
    one_set: bool


def names_of(request: Request) -> tuple[str, ...]:
    """The fields of `LineStatistics` that are computed, in the order of their tensors. This is a
    function: Dynamo of torch 2.10 cannot read properties of a named tuple."""
    names = ("rows", "columns", "positives")
    if request.same_id_positive:
        names += ("row_positives", "column_positives")
    if request.means:
        names += ("row_means", "column_means")
    if request.means and request.same_id_positive:
        names += ("row_positive_means", "column_positive_means")
    if request.teaches:
        names += ("row_expectations", "column_expectations")
    return names


def wanted_statistics(found: Sequence[Tensor], request: Request) -> LineStatistics:
    """Names the results of `statistics_from_states`; None for those of an unwanted side."""
    every = as_line_statistics(found, request)
    unwanted = [
        name
        for name in names_of(request)
        if (name.startswith("row") and not request.rows)
        or (name.startswith("column") and not request.columns)
        or (name == "positives" and request.one_set)
    ]
    return every._replace(**dict.fromkeys(unwanted))


def as_line_statistics(found: Sequence[Tensor], request: Request) -> LineStatistics:
    """Names the results of `statistics_from_states`, and drops those that may follow in `found`."""
    none = dict.fromkeys(LineStatistics._fields)
    return LineStatistics(**{**none, **dict(zip(names_of(request), found, strict=False))})


class States(NamedTuple):
    """The states of lines for one set of pairs: negatives, or positives by id."""

    shift: Tensor  # (L), in log2 units
    sums: Tensor  # (L)


class Taught(NamedTuple):
    """The state of lines for a teacher's weights of all pairs."""

    shift: Tensor  # (L), in log2 units
    sums: Tensor  # (L): of the weights
    sums_t: Tensor  # (L): of the weights times t


def states_of(state: Tensor) -> list[States]:
    """Splits a state into that of negatives and, if it has one, that of positives by id."""
    sets = state[: len(state) - 3 * (len(state) % 2)]
    return [States(*one) for one in sets.unflatten(0, (-1, 2))]


def statistic(kind: type[Kind], states: States) -> Tensor:
    """Returns the statistic of each line (L)."""
    shift, sums = states
    # In a graph whose numbers are all dynamic a constant of a module would be an input, which two
    # autograd Functions cannot share. This file therefore has no such constants.
    return (torch.log2(sums) + shift) * math.log(2.0) if kind.has_shift else sums


def statistics_from_states(
    block: Block, state: Tensor, positive: Tensor, bias: Tensor | None, request: Request,
    line_means: LineMeans | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Returns the fields of `LineStatistics` that `names_of` names. A side may be empty."""
    kind, (m, _) = kind_of(block.kind), block.sizes()
    dtype = state.dtype
    common = 0.0 if bias is None else bias.reshape(()).to(dtype)
    moved = common if kind.has_shift else 0.0
    of_negatives, *of_by_id = states_of(state)
    negatives = statistic(kind, of_negatives) + moved
    positives = positive * block.scale.reshape(()).to(dtype) + common
    if block.key_bias is not None:
        positives = positives + pairs.at_rows(block.key_bias.to(dtype), m, block.offset, 0)
    found = [negatives[:m], negatives[m:], positives]
    if of_by_id:
        by_id = statistic(kind, *of_by_id) + moved
        own = _Own(block, positives, request.one_set)
        if kind.has_shift:
            by_id = torch.logaddexp(by_id, torch.where(own.exists, own.logits, -torch.inf))
        else:
            by_id = by_id + torch.where(own.exists, kind.fold(own.log2, own.log2 * 0), 0)
        found += [by_id[:m], by_id[m:]]
    if line_means is not None:
        means = line_means.values(positives, bias)
        if line_means.groups.labelled is not None:
            found[2] = line_means.labelled_logits(means.pop())
        for of_lines in means:
            found += [of_lines[:m], of_lines[m:]]
    if request.teaches:
        _, sums, sums_t = Taught(*state[-3:])
        expected = block.scale.reshape(()).to(dtype) * (sums_t / sums) + common
        found += [expected[:m], expected[m:]]
    return tuple(found)


def means_upstream(
    block: Block, found: LineStatistics, state: Tensor, upstream: LineStatistics, labelled: bool
) -> list[Tensor | None]:
    """The upstream gradients (M + N) of the means that were found, in the order of
    `LineMeans.values`; None for those without one."""
    if labelled and kind_of(block.kind).has_levels and upstream.rows is not None:
        # The levels of rows follow the labelled pairs' logits, which are means.
        share = of_levels(upstream.rows, state[:, : block.sizes()[0]])
        own = upstream.positives
        upstream = upstream._replace(positives=share if own is None else own + share)
    pairs_of = [("row_means", "column_means"), ("row_positive_means", "column_positive_means")]
    pairs_of += [("positives", None)] if labelled else []
    gradients: list[Tensor | None] = []
    for of_rows, of_columns in pairs_of:
        if getattr(found, of_rows) is None:
            continue
        # Gradients of the labelled pairs' logits belong to rows alone.
        values = getattr(found, of_rows), getattr(found, of_columns or "columns")
        given = [
            None if name is None else getattr(upstream, name) for name in (of_rows, of_columns)
        ]
        gradients.append(
            None if given[0] is None and given[1] is None
            else torch.cat([torch.zeros_like(v) if g is None else g
                            for v, g in zip(values, given, strict=True)])
        )  # fmt: skip
    return gradients


def with_levels(state: Tensor, levels: Tensor | None) -> Tensor:
    """The state that the second sweep takes."""
    return state if levels is None else torch.stack((levels, state[1]))


def of_levels(of_lines: Tensor, state: Tensor) -> Tensor:
    """The gradient of each line's level, for upstream gradients of the line's statistic."""
    # The first row of the state says how many pairs are above the level.
    return -of_lines * state[0]


class _Own:
    """The own positives of each row, then of each column; none if y is x."""

    def __init__(self, block: Block, positives: Tensor, one_set: bool) -> None:
        m, n = block.sizes()
        _, inside = pairs.partners(m, n, block.offset, positives.device)

        def of_lines(values: Tensor, absent: Any) -> Tensor:
            return torch.cat((values, pairs.at_columns(values, n, block.offset, absent)))

        self.exists = of_lines(inside & (not one_set), False)
        self.logits = of_lines(positives, torch.nan)
        self.sign = -1 if kind_of(block.kind).negates_positives else 1
        # In log2 units, with the sign that the kind gives to positives.
        self.log2 = self.logits * (self.sign * math.log2(math.e))


def upstream_of(
    block: Block, bias: Tensor | None, found: LineStatistics, state: Tensor,
    upstream: LineStatistics, request: Request, of_means: MeanFactors | None,
) -> tuple[Upstream, Tensor | None]:  # fmt: skip
    """Returns the factors of pairs' weights for the upstream gradients of the statistics, and the
    gradient of a bias that the engine does not get. A side may be empty."""
    kind, (m, n) = kind_of(block.kind), block.sizes()
    given = LineStatistics(*(
        t if t is None else torch.zeros_like(t) if g is None else g.to(state.dtype)
        for t, g in zip(found, upstream, strict=True)
    ))  # fmt: skip
    if request.one_set:
        # A pair's logit is in the row of each of its two features.
        given = given._replace(columns=given.rows, column_positives=given.row_positives)
    negatives, *positives = states_of(state)
    _, inside = pairs.partners(m, n, block.offset, state.device)
    of_own = torch.where(inside & (not request.one_set), given.positives, 0)
    of_lines = torch.cat((given.rows, given.columns))
    nothing = negatives.sums == 0
    if kind.has_shift:
        # A line without pairs has no gradient. Upstream may be NaN, from two such lines added.
        of_lines = of_lines.masked_fill(nothing, 0)
    every = [of_lines]
    coefficients = [of_lines]
    # The gradient of a bias that is common to all logits.
    total = of_lines.sum() + of_own.sum()
    if kind.has_shift:
        coefficients = [torch.where(nothing, 0, of_lines / negatives.sums)]
    if kind.has_levels:
        own = _Own(block, found.positives, request.one_set)
        share = torch.where(own.exists, of_levels(of_lines, state), 0)
        of_own = of_own + share[:m] + pairs.at_rows(share[m:], m, block.offset, 0)
    for states in positives:
        of_lines = torch.cat((given.row_positives, given.column_positives))
        every.append(of_lines)
        by_id = torch.cat((found.row_positives, found.column_positives))
        own = _Own(block, found.positives, request.one_set)
        # The gradient of each line with respect to its own positive's logit.
        share = of_lines * own.sign
        if kind.has_shift:
            nothing = by_id == -torch.inf
            of_lines = of_lines.masked_fill(nothing, 0)
            total = total + of_lines.sum()
            # This division is done in logarithms: an own positive may exceed the shift of the
            # other positives by far.
            common = 0.0 if bias is None else bias.reshape(()).to(state.dtype)
            beside = torch.exp2(states.shift - (by_id - common) * math.log2(math.e))
            # The own positive of a column that key_bias takes out is -inf.
            share = of_lines * torch.exp(own.logits - by_id.masked_fill(nothing, 0))
            of_lines = torch.where(states.sums == 0, 0, of_lines * beside)
        else:
            share = share * kind.activation(own.log2, own.log2 * 0)
        coefficients.append(of_lines)
        share = torch.where(own.exists, share, 0)
        of_own = of_own + share[:m] + pairs.at_rows(share[m:], m, block.offset, 0)
    if request.teaches:
        of_lines = torch.cat((given.row_expectations, given.column_expectations))
        every.append(of_lines)
        coefficients.append(of_lines / Taught(*state[-3:]).sums)
        total = total + of_lines.sum()
    if of_means is not None:
        of_own = of_own + of_means.own
        total = total + of_means.own.sum()
    if request.one_set:
        total = total / 2
    if of_means is not None:
        total = total + of_means.of_bias
    # The largest upstream gradient goes into the gain, so that weights are of order 1.
    largest = torch.cat([of_own, *every, of_own.new_zeros(1)]).abs().amax()
    divisor = torch.where(largest > 0, largest, 1)
    stacked = torch.stack(coefficients) if len(coefficients) > 1 else coefficients[0]
    return Upstream(stacked / divisor, of_own / divisor, largest), total if kind.has_shift else None
