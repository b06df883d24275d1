"""Statistics of lines across ranks, and the same statistics of one process.

Smaller worlds are groups within one pool, since starting a process takes longer than a case.
"""

import functools
import itertools
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from support.oracle import TRUTHS
from support.ranks.failures import error_of
from torch import Tensor
from torch.autograd import forward_ad

from bench.measure.traffic import Traffic
from fastclip import distributed, reference
from fastclip.engine import group_sums
from fastclip.kinds import LineStatistics

WIDTH = 12
NAMES = LineStatistics._fields
INPUTS = ("dx", "dy", "dscale", "dbias", "dkey_bias")


class Case(NamedTuple):
    """A batch, how it is spread over ranks, and the arguments of `contrast`."""

    rows: tuple[int, ...]  # of each rank
    columns: tuple[int, ...]
    kind: str = "softmax"
    ring: bool = False
    uneven: bool = True
    offsets: tuple[int, ...] | None = ()  # of each rank; (): 0
    ids: int = 0  # the number of different ids; 0: no ids
    same_id: str = "ignore"
    margin: float | None = None
    key_bias: bool = False
    wanted: tuple[bool, bool] = (True, True)
    normalize: bool = False
    scale: float = 4.0
    upstreams: tuple[float, ...] = ()  # each rank's factor
    unused: tuple[str, ...] = ()  # statistics that the loss does not use
    frozen: tuple[tuple[int, str], ...] = ()  # on single ranks
    dtype: torch.dtype = torch.float64
    backend: str | None = None
    labels: bool = False  # the own positives, in place of offsets
    means: bool = False
    one_set: bool = False  # the columns are the rows

    @property
    def world_size(self) -> int:
        return len(self.rows)

    def part(self, name: str, rank: int) -> slice:
        sizes = self.columns if name == "y" or name.startswith("column") else self.rows
        return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    @property
    def options(self) -> dict[str, Any]:
        rows, columns = self.wanted
        return {
            "same_id": self.same_id, "false_negative_margin": self.margin, "rows": rows,
            "columns": columns, "means": self.means, "kind": self.kind,
            "normalize": self.normalize,
        }  # fmt: skip

    def leaves(self) -> dict[str, Tensor]:
        """The whole batch's inputs, by name."""
        generator = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        m, n = sum(self.rows), sum(self.columns)
        y = random(n, WIDTH)
        # Rows are half their positive: positives stand out, but some negatives exceed them.
        x = 0.5 * random(m, WIDTH) + 0.5 * y[torch.arange(m) % n]
        key_bias = random(n)
        key_bias[n // 2] = -torch.inf
        return {
            "x": x.to(self.dtype) / WIDTH**0.5, "y": y.to(self.dtype) / WIDTH**0.5,
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "bias": torch.tensor(-0.7, dtype=torch.float64), "key_bias": key_bias,
        }  # fmt: skip

    def all_ids(self) -> tuple[Tensor, Tensor] | None:
        if not self.ids:
            return None
        generator = torch.Generator().manual_seed(5)
        of_rows, of_columns = (
            torch.randint(self.ids, (sum(sizes),), generator=generator) - 2
            for sizes in (self.rows, self.columns)
        )
        if self.one_set:
            of_rows = of_columns
        elif self.labels:
            of_rows = of_columns[self.all_labels()]
        return of_rows, of_columns

    def all_labels(self) -> Tensor | None:
        """The columns of the rows' own positives, numbered in the whole batch."""
        if not self.labels:
            return None
        generator = torch.Generator().manual_seed(6)
        found = [
            torch.randint(n, (m,), generator=generator) + self.part("y", rank).start
            for rank, (m, n) in enumerate(zip(self.rows, self.columns, strict=True))
            if m
        ]
        return torch.cat(found)

    def offset(self, rank: int) -> int | None:
        return None if self.offsets is None else (self.offsets or (0,) * self.world_size)[rank]

    def partners(self) -> Tensor | None:
        """(M, 1): the number of each row's own positive, minus the row's number."""
        if self.offsets is None:
            return None
        found = []
        for rank in range(self.world_size):
            rows, columns = self.part("x", rank), self.part("y", rank)
            for i in range(rows.stop - rows.start):
                column = columns.start + i + self.offset(rank)
                inside = columns.start <= column < columns.stop
                found.append(column - (rows.start + i) if inside else 1 << 40)
        return torch.tensor(found)[:, None]

    def upstream(self, name: str) -> Tensor:
        """The whole batch's upstream gradients of a statistic, of any sign."""
        sizes = self.columns if name.startswith("column") else self.rows
        generator = torch.Generator().manual_seed(11 + NAMES.index(name))
        every = torch.randn(sum(sizes), generator=generator, dtype=torch.float64)
        every = every * (name not in self.unused)
        if self.upstreams:
            every = every * torch.tensor(self.upstreams).double().repeat_interleave(
                torch.tensor(sizes)
            )
        return every


def _backward(case: Case, statistics: LineStatistics, rank: int | None) -> None:
    """Runs the backward with the case's upstream gradients; rank None: the whole batch's."""
    used = []
    for name, t in zip(NAMES, statistics, strict=True):
        if t is None or name in case.unused:
            continue
        g = case.upstream(name)[slice(None) if rank is None else case.part(name, rank)]
        if case.labels:  # the dense form differentiates a logit of -inf
            g = torch.where(t.detach().isfinite(), g, 0)
        used.append((t, g))
    torch.autograd.backward(*zip(*used, strict=True))


def _leaves(case: Case, rank: int | None) -> list[Tensor]:
    found = []
    for name, t in case.leaves().items():
        own = t.detach().clone()
        if rank is not None and name in ("x", "y", "key_bias"):
            own = own[case.part("x" if name == "x" else "y", rank)].clone()
        elif rank is None and own.dim() == 2:
            own = own.double()
        found.append(own.requires_grad_((rank, name) not in case.frozen))
    return found


def results_of_one_process(case: Case) -> dict[str, Tensor | None]:
    """The results of one process on the whole batch, dense and in float64."""
    x, y, scale, bias, key_bias = leaves = _leaves(case, None)
    # The dense form compares row number + offset with column numbers, so it accepts an offset for
    # each row.
    ids, plain = case.all_ids(), not (case.labels or case.one_set)
    statistics = reference.contrast(
        x, None if case.one_set else y, scale, bias, offset=case.partners() if plain else 0,
        labels=case.all_labels(), ids=ids[0] if case.one_set and ids else ids,
        key_bias=key_bias if case.key_bias else None, **case.options,
    )  # fmt: skip
    _backward(case, statistics, None)
    found = {n: None if t is None else t.detach() for n, t in statistics._asdict().items()}
    return {**found, **{n: t.grad for n, t in zip(INPUTS, leaves, strict=True)}}


def results_of_rank(case: Case, rank: int, group: Any) -> dict[str, Tensor | None]:
    """This rank's statistics and gradients of its inputs, before any sum over ranks."""
    x, y, scale, bias, key_bias = leaves = _leaves(case, rank)
    ids = case.all_ids()
    if ids is not None:
        ids = ids[0][case.part("x", rank)], ids[1][case.part("y", rank)]
    labels = case.all_labels()
    if labels is not None:
        labels = labels[case.part("x", rank)] - case.part("y", rank).start
    statistics = distributed.contrast(
        x, None if case.one_set else y, scale, bias, offset=case.offset(rank), labels=labels,
        ids=ids[0] if case.one_set and ids else ids,
        key_bias=key_bias if case.key_bias else None, process_group=group, ring=case.ring,
        uneven=case.uneven, backend=case.backend, **case.options,
    )  # fmt: skip
    _backward(case, statistics, rank)
    found = {n: None if t is None else t.detach() for n, t in statistics._asdict().items()}
    return {**found, **{n: t.grad for n, t in zip(INPUTS, leaves, strict=True)}}


@functools.cache
def group_of(world_size: int) -> dist.ProcessGroup:
    return dist.new_group(list(range(world_size)))


def results_of_cases(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any] | None]:
    """This rank's results of each case; None for a case without this rank."""
    found: list[dict[str, Any] | None] = []
    for case in cases:
        group = group_of(case.world_size)  # all ranks must make it, even those outside it
        found.append(results_of_rank(case, rank, group) if rank < case.world_size else None)
    return found


def results_in_chunks(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any] | None]:
    """The results of means in chunks of one to three features."""
    with mock.patch.object(group_sums, "CHUNK", 1 << 10):
        return results_of_cases(rank, world_size, cases)


def joined(case: Case, found: list[dict[str, Any]]) -> dict[str, Tensor | None]:
    """The ranks' results, put together as one process's."""
    results: dict[str, Tensor | None] = {}
    for name in (*NAMES, *INPUTS):
        parts = [one[name] for one in found]
        if any(t is None for t in parts):
            results[name] = None
        elif parts[0].dim() == 0:
            results[name] = sum(t.double() for t in parts)
        else:
            results[name] = torch.cat(parts).double()
    return results


def losses_beside_an_empty_rank(
    rank: int, world_size: int, sizes: tuple[int, ...]
) -> dict[str, tuple[float, list[Tensor], list[Tensor]]]:
    """For each loss, exchange and frozen tower: the value, the gradients after the mean over ranks,
    and those of one process."""
    found = {}
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for loss, ring, frozen in itertools.product(TRUTHS, (False, True), ("", "x", "y")):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, sum(sizes), WIDTH, generator=generator, dtype=torch.float64).unbind()
        scale = torch.tensor(2.0, dtype=torch.float64)
        every = [x, y, scale]
        own = [x[part].clone(), y[part].clone(), scale.clone()]
        for leaves in (every, own):
            for name, leaf in zip(("x", "y", "scale"), leaves, strict=True):
                leaf.requires_grad_(name != frozen)
        getattr(reference, f"{loss}_loss")(*every, -1.0).backward()
        value = getattr(distributed, f"{loss}_loss")(*own, -1.0, ring=ring, uneven=True)
        value.backward()
        dscale = own[2].grad.clone()
        dist.all_reduce(dscale)
        gradients = [None if t.grad is None else t.grad / world_size for t in own[:2]]
        exact = [None if t.grad is None else t.grad[part] for t in every[:2]]
        found[f"{loss} {ring=} {frozen=}"] = (
            value.item(), [*gradients, dscale / world_size], [*exact, every[2].grad],
        )  # fmt: skip
    return found


def call(rank: int, world_size: int, by_rank: list[dict[str, Any]]) -> str:
    """The error of `contrast` with this rank's arguments."""
    own = dict(by_rank[rank])
    m, n, width = own.pop("m", 3), own.pop("n", 4), own.pop("width", 6)
    dtype, grad = own.pop("dtype", torch.float32), own.pop("grad", True)
    x, y = (torch.ones(k, width, dtype=dtype, requires_grad=grad) for k in (m, n))
    y = None if own.pop("one_set", False) else y
    if own.pop("has_ids", False):
        own["ids"] = torch.zeros(m, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    if (of := own.pop("key_bias_dtype", None)) is not None:
        own["key_bias"] = torch.zeros(n, dtype=of)
    with forward_ad.dual_level():
        if own.pop("dual", False):
            x = forward_ad.make_dual(x, torch.ones_like(x))
        return error_of(distributed.contrast, x, y, 2.0, **own)


def double_backward(rank: int, world_size: int) -> str:
    x, y = torch.ones(3, 6, requires_grad=True), torch.ones(3, 6)
    rows = distributed.contrast(x, y, 2.0).rows
    (gradient,) = torch.autograd.grad(rows.sum(), x, create_graph=True)
    return error_of(gradient.sum().backward)


def bytes_sent(
    rank: int, world_size: int, m: int, n: int, d: int, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, int]:
    """The bytes that this rank sends in a forward and a backward, by kind of exchange. Without m,
    the n features are contrasted with themselves."""
    x, y = (torch.randn(k or n, d).to(dtype).requires_grad_() for k in (m, n))
    if "ids" in options:
        options["ids"] = tuple(torch.arange(k) % options["ids"] for k in (m, n))
    if not m:
        y = None
        options["ids"] = options["ids"][1]
    with Traffic() as traffic:
        found = distributed.contrast(x, y, 5.0, normalize=True, **options)
        sum(t.nan_to_num(0, 0, 0).sum() for t in found if t is not None).backward()
    return dict(traffic.sent)
