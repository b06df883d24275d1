"""The means of each line's logits: over its positives, and over all its pairs. O((M + N) D).

They are linear in the logits, so a mean over a group of columns is a product with the group's sum
of features (`group_sums.py`). Own pairs enter through their logits, which a sweep returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import pairs
from .block import Block
from .feature_gradient import FeatureGradient
from .group_sums import Chunk, Groups, chunks


class LineGroups(NamedTuple):
    """The groups of a block's lines."""

    every: Groups | None = None  # all lines in one
    by_id: Groups | None = None  # lines of equal ids, without own pairs
    labelled: Groups | None = None  # a column, and the rows whose label it is

    @property
    def given(self) -> list[Groups]:
        return [groups for groups in self if groups is not None]


class _Set(NamedTuple):
    """A set of pairs of each line, as a sum of sets with signs."""

    signs: tuple[int, ...]  # of the pairs within each kind of groups, in the order of `LineGroups`
    own: Tensor | float  # (M + N): of own pairs
    number: Tensor | float = 0.0  # (M + N): pairs in the set


class MeanFactors(NamedTuple):
    """The derivatives of a loss with respect to logits, as far as it depends on means."""

    by_group: list[Tensor]  # (M + N) for each kind of groups: those of a line's group
    own: Tensor  # (M): of own pairs, beside the above
    of_bias: Tensor | float  # with respect to a common bias, without that through own pairs


class LineMeans:
    """The means of a block's lines and their gradients. Across ranks the block is that of a rank's
    own rows and own columns; its means are over all ranks' pairs.

    one_set: y is x, and no pair of a feature with itself counts.
    lines: the numbers of rows, columns and groups, added (`group_sums.chunks`).
    """

    def __init__(
        self, block: Block, groups: LineGroups, dtype: torch.dtype, means: bool, one_set: bool,
        lines: int,
    ) -> None:  # fmt: skip
        self.block, self.groups, self.dtype, self.one_set = block, groups, dtype, one_set
        self.lines = lines
        m, n = block.sizes()
        self.alive = None if block.key_bias is None else (block.key_bias != -torch.inf)[:, None]
        alive = torch.ones(n, dtype=dtype, device=block.x.features.device)
        if self.alive is not None:
            alive = self.alive[:, 0].to(dtype)
        self.own = pairs.at_rows(alive, m, block.offset, 0)  # (M): 1 for own pairs that count
        own = self._at_lines(self.own)
        self.sets = list(self._sets(own, means))
        for place, kind in enumerate(groups):
            if kind is not None:
                numbers = self._numbers(kind, alive)
                self.sets = [s._replace(number=s.number + s.signs[place] * numbers)
                             for s in self.sets]  # fmt: skip
        self.sets = [s._replace(number=s.number + s.own) for s in self.sets]

    def _sets(self, own: Tensor, means: bool) -> Iterator[_Set]:
        """The sets whose means are wanted: a line's pairs, its positives, its labelled pair."""
        _, by_id, labelled = self.groups
        is_positive = self.block.same_id_positive
        # Groups of equal ids leave out own pairs, but not labelled ones.
        if means:
            left_out = 0 if by_id is None or is_positive else -1
            counts = int(labelled is not None and left_out != 0)
            yield _Set((1, left_out, counts), -own if self.one_set else 0.0)
        if means and is_positive:
            # An own pair counts with its own logit: if it is the only positive, the terms of its
            # weight cancel exactly.
            yield _Set((0, 1, 0), 0.0 if self.one_set else own)
        if labelled is not None:
            yield _Set((0, 0, 1), 0.0)

    def _at_lines(self, values: Tensor) -> Tensor:
        """Values of rows, then those of the columns that have the rows' own positives."""
        _, n = self.block.sizes()
        return torch.cat((values, pairs.at_columns(values, n, self.block.offset, 0)))

    def _numbers(self, groups: Groups, alive: Tensor) -> Tensor:
        rows = groups.of_every_row(alive[:, None])[:, 0]
        ones = alive.new_ones((self.block.sizes()[0], 1))
        return torch.cat((rows, alive * groups.of_every_column(ones)[:, 0]))

    def _chunks(self) -> Iterator[Chunk]:
        return chunks(self.block, self.alive, self.lines, self.dtype, self.one_set)

    def _signs(self, one: _Set) -> list[int]:
        """The signs of the given groups."""
        both = zip(one.signs, self.groups, strict=True)
        return [sign for sign, groups in both if groups is not None]

    def _masked(self, y: Tensor) -> Tensor:
        return y if self.alive is None else torch.where(self.alive, y, 0)

    def labelled_logits(self, means: Tensor) -> Tensor:
        """The logits of labelled pairs (M), from the means of their set: -inf for a key that
        key_bias takes out."""
        m, _ = self.block.sizes()
        return torch.where(self.sets[-1].number[:m] > 0, means[:m], -torch.inf)

    def values(self, positives: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Returns the means (M + N) over each set, NaN for a line without pairs. positives (M): the
        own positives' logits."""
        m, n = self.block.sizes()
        totals = [positives.new_zeros(m + n, dtype=self.dtype) for _ in self.groups.given]
        for chunk in self._chunks():
            y = self._masked(chunk.y)
            for place, groups in enumerate(self.groups.given):
                of_columns = of_rows = (chunk.x * groups.of_every_row(y)).sum(1)
                if not self.one_set:
                    of_columns = (chunk.y * groups.of_every_column(chunk.x)).sum(1)
                totals[place] = totals[place] + torch.cat((of_rows, of_columns)) * chunk.scale
        common = 0.0 if bias is None else bias.reshape(()).to(self.dtype)
        own = self._at_lines(torch.where(self.own > 0, positives - common, 0))
        found = []
        for one in self.sets:
            terms = zip(self._signs(one), totals, strict=True)
            total = sum((sign * total for sign, total in terms if sign), one.own * own)
            found.append(torch.where(one.number > 0, total / one.number + common, torch.nan))
        return found

    def factors(self, upstream: Sequence[Tensor | None]) -> MeanFactors | None:
        """The derivatives with respect to logits, for upstream gradients (M + N) of the means."""
        if all(g is None for g in upstream):
            return None
        m, _ = self.block.sizes()
        own, of_bias = torch.zeros_like(self.sets[0].number), 0.0
        by_group = [torch.zeros_like(own) for _ in self.groups.given]
        for one, g in zip(self.sets, upstream, strict=True):
            if g is None:
                continue
            some = one.number > 0
            g = torch.where(some, g.to(self.dtype), 0)
            each = g / torch.where(some, one.number, 1)
            terms = zip(self._signs(one), by_group, strict=True)
            by_group = [factor + sign * each for sign, factor in terms]
            own = own + one.own * each
            of_bias = of_bias + g.sum() - (one.own * each).sum()
        own = own[:m] + pairs.at_rows(own[m:], m, self.block.offset, 0)
        # With one set of features only dx is computed, and the logit of a feature with itself
        # depends on it twice.
        return MeanFactors(by_group, own * 2 if self.one_set else own, of_bias)

    def add_gradients(
        self, factors: MeanFactors, dx: Tensor | None, dy: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of the means, without those of own pairs, to dx and dy. Returns those
        of scale, and of key_bias (N), zeros without one."""
        m, n = self.block.sizes()
        sides = self.block.x, self.block.y
        both = zip(sides, (dx, dx if self.one_set else dy), strict=True)
        added = [None if d is None else FeatureGradient(side, d, self.dtype) for side, d in both]
        dscale, dkey_bias = factors.own.new_zeros(()), factors.own.new_zeros(n)
        for chunk in self._chunks():
            y = self._masked(chunk.y)
            of_x, of_y = 0.0, 0.0
            for groups, factor in zip(self.groups.given, factors.by_group, strict=True):
                rows, columns = factor[:m, None], factor[m:, None]
                by_row = rows * groups.of_every_row(y)
                of_x = of_x + by_row
                of_y = of_y + self._masked(groups.of_every_column(rows * chunk.x))
                if chunk.place is not None:
                    dscale = dscale + (chunk.x * by_row).sum()
                if self.one_set:  # columns are not returned: their factors are 0
                    continue
                by_column = columns * groups.of_every_column(chunk.x)
                of_x = of_x + groups.of_every_row(columns * chunk.y)
                of_y = of_y + by_column
                if chunk.place is not None:
                    dscale = dscale + (chunk.y * by_column).sum()
            if chunk.place is None:
                dkey_bias = of_y[:, 0]
                continue
            for gradient, new, unit in zip(added, (of_x, of_y), chunk[:2], strict=True):
                if gradient is not None:
                    gradient.add(new * chunk.scale, unit, chunk.place)
        if self.block.x.factor is not None:
            for chunk in self._chunks():
                for gradient, unit in zip(added, chunk[:2], strict=True):
                    if gradient is not None and chunk.place is not None:
                        gradient.project(unit, chunk.place)
        return dscale, dkey_bias


def unchanged(sums: Tensor) -> Tensor:
    """The sum over one rank."""
    return sums


def local_groups(block: Block, labels: Tensor | None, means: bool) -> LineGroups:
    """The groups of lines of one process. labels (M): columns, or None."""
    m, n = block.sizes()
    device = block.x.features.device
    every = by_id = labelled = None
    if means:
        every = one_group(m, n, device)
        if block.x.ids is not None:
            by_id = Groups(block.x.ids.long(), block.y.ids.long(), m + n, unchanged)
            by_id = by_id.without_own(block.offset)
    if labels is not None:
        labelled = by_label(labels, n)
    return LineGroups(every, by_id, labelled)


def one_group(
    m: int, n: int, device: torch.device, over_ranks: Callable[[Tensor], Tensor] = unchanged
) -> Groups:
    """All lines in one group."""
    rows, columns = (torch.zeros(k, dtype=torch.int64, device=device) for k in (m, n))
    return Groups(rows, columns, 1, over_ranks, is_one=True)


def by_label(labels: Tensor, n: int) -> Groups:
    """Each column in a group with the rows whose label it is."""
    return Groups(labels.long(), torch.arange(n, device=labels.device), n, unchanged)
