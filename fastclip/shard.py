"""One rank's part of a batch that is spread over a process group, and its exchanges with others.

`agree` comes first: every rank tells what it brings, so that what must be alike is checked where
all of them see it, and fails on all of them at once instead of leaving some to wait. Everything
after it is collectives on tensors of known sizes. Ranks here are ranks within the group.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .operands import FLOATING

_Told = dict[str, tuple[int, ...]]  # of each field what the ranks brought


class Shard(NamedTuple):
    """Of the batch a rank has `sizes[rank]` rows, from `starts[rank]` on."""

    group: dist.ProcessGroup | None  # None: one rank, that talks to nobody
    rank: int
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    # Of each rank's rows those that this step differentiates; the others are constants.
    live: tuple[slice, ...]
    # Whether any rank wants gradients of its x, of its y: then all take part in making them.
    needs_x: bool
    needs_y: bool

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    def rows_of(self, rank: int) -> slice:
        return slice(self.starts[rank], self.starts[rank] + self.sizes[rank])

    def at(self, distance: int) -> int:
        """The rank so many after this one; before it, if negative."""
        return (self.rank + distance) % self.world_size

    @property
    def mine(self) -> slice:
        return self.rows_of(self.rank)

    @property
    def batch(self) -> int:
        """Pairs of all ranks."""
        return self.starts[-1] + self.sizes[-1]

    @property
    def is_even(self) -> bool:
        return len(set(self.sizes)) == 1

    @property
    def all_live(self) -> bool:
        return self.live == _all_rows(self.sizes)

    @property
    def of_live(self) -> Shard:
        """A shard of the ranks' live rows alone."""
        sizes = tuple(rows.stop - rows.start for rows in self.live)
        return self._replace(sizes=sizes, starts=_starts(sizes), live=_all_rows(sizes))

    def where_live(self, device: torch.device) -> Tensor:
        """Where in the batch all ranks' live rows are, int64."""
        rows = self.live[0]
        if self.is_even and len({(r.start, r.stop) for r in self.live}) == 1:
            # The usual case: nothing is copied to the device.
            starts = torch.arange(self.world_size, device=device) * self.rows
            return (starts[:, None] + torch.arange(rows.start, rows.stop, device=device)).flatten()
        parts = [
            torch.arange(start + r.start, start + r.stop)
            for start, r in zip(self.starts, self.live, strict=True)
        ]
        return torch.cat(parts).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' rows (B, ...), in the order of ranks."""
        if self.world_size == 1:
            return x
        most = max(self.sizes)
        x = _padded(x, most)
        out = x.new_empty((self.world_size * most, *x.shape[1:]))
        all_gather(out, x, self.group)
        if self.is_even:
            return out
        return torch.cat([p[:size] for p, size in zip(out.split(most), self.sizes, strict=True)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Of the ranks' x (B, ...) the sum, each rank's own rows of it."""
        if self.world_size == 1:
            return x
        most = max(self.sizes)
        if not self.is_even:
            x = torch.cat([_padded(part, most) for part in x.split(self.sizes)])
        out = x.new_empty((most, *x.shape[1:]))
        reduce_scatter(out, x.contiguous(), self.group)
        return out[: self.rows]

    def sum(self, x: Tensor) -> Tensor:
        """In place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """In place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: dist.ReduceOp) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(x, op, group=self.group)
        return x

    def gather_scalar(self, x: Tensor) -> Tensor:
        """(R): one number of each rank."""
        if self.world_size == 1:
            return x.reshape(1)
        out = x.new_empty(self.world_size)
        all_gather(out, x.reshape(1).contiguous(), self.group)
        return out

    def by_pair(self, x: Tensor) -> Tensor:
        """(B): of x (R) each rank's number, for all of its pairs."""
        if self.is_even:
            return x.repeat_interleave(self.sizes[0], output_size=self.batch)
        counts = torch.tensor(self.sizes, device=x.device)
        return x.repeat_interleave(counts, output_size=self.batch)


def _starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate(sizes[:-1], initial=0))


def _all_rows(sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in sizes)


def shard_of_one(x: Tensor, y: Tensor, live: tuple[int, int]) -> Shard:
    """The whole batch: one process, without a group."""
    return Shard(None, 0, (x.shape[0],), (0,), (slice(*live),), x.requires_grad, y.requires_grad)


def all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    # torch 2.13 has new names for these two, and warns of the old ones.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(out, x, group=group)


def reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> None:
    if x.device.type == "cpu":
        # gloo's own adds up the whole everywhere: measured twice to three times as slow.
        parts = torch.empty_like(x)
        dist.all_to_all_single(parts, x, group=group)
        torch.sum(parts.view(-1, *out.shape), 0, out=out)
        return
    new, old = "reduce_scatter_single", "reduce_scatter_tensor"
    getattr(dist, new if hasattr(dist, new) else old)(out, x, group=group)


def _padded(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat((x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))))


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, without importing the compiler before somebody compiles.

    Collectives and what depends on their answers are no part of a compiled graph: it is cut there.
    """

    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return run


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group that a loss runs in; None stands for all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a loss across processes needs torch.distributed.init_process_group first, "
            "got no initialised group"
        )
    group = dist.group.WORLD if process_group is None else process_group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must have this process among its ranks, got one without it")
    return group


def check_world(
    name: str, rank: int, world_size: int, process_group: dist.ProcessGroup | None
) -> None:
    """Raises ValueError unless these are this process's rank and the size of its group."""
    group = group_of(process_group)
    real = dist.get_rank(group), dist.get_world_size(group)
    if (rank, world_size) != real:
        raise ValueError(
            f"{name}: rank and world_size must be those of this process in its group, "
            f"{real[0]} and {real[1]}, got {rank} and {world_size}"
        )


# What ranks of a group brought where an exchange at every call would wait for the device: at the
# first call, for what this rank brought.
_TOLD: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], _Told]] = WeakKeyDictionary()
_REFUSED = -1


def agree(
    process_group: dist.ProcessGroup | None, x: Tensor, y: Tensor, needs_any: bool, uneven: bool,
    live: tuple[int, int] | None = None, **alike: int | torch.dtype,
) -> Shard:  # fmt: skip
    """The shard of paired features x, y (b, D), after every rank saw that all of them fit.

    Ranks compare what they bring at every call, through CPU memory where the group has a backend
    for that (gloo, or `init_process_group` without a backend, which takes one for each device). In
    a group that moves GPU tensors alone, reading an answer waits for the device: there the first
    call of each kind compares and later ones rely on it, unless `uneven` asks for sizes each time.

    live: of this rank's rows, start and stop of those that are differentiated; None: all.
    alike: what the ranks must have in common besides.

    Raises, on every rank:
        ValueError: widths, dtypes or options that differ, or sizes and live rows, unless `uneven`
            allows that; a rank without anything to differentiate, for whose backward the others
            would wait.
    """
    group = group_of(process_group)
    mine: dict[str, int] = {
        "batch": x.shape[0], **dict(zip(_LIVE, live or (0, x.shape[0]), strict=True)),
        "needs_x": int(x.requires_grad), "needs_y": int(y.requires_grad),
        "requires_grad": int(needs_any), "width D": x.shape[1], "dtype of images": _code(x.dtype),
        "dtype of texts": _code(y.dtype), "uneven": int(uneven),
        **{name: _code(value) for name, value in alike.items()},
    }  # fmt: skip
    through = _exchanging_device(group, x.device)
    relies = through.type != "cpu" and not uneven
    key = x.device, *mine.values()
    known = _TOLD.setdefault(group, {}) if relies else {}
    if key not in known:
        found = _exchange(group, tuple(mine.values()), through)
        told = dict(zip(mine, found, strict=True))
        _check(told)
        known[key] = told
    told = known[key]
    sizes, live_rows = told["batch"], zip(*(told[name] for name in _LIVE), strict=True)
    return Shard(
        group, dist.get_rank(group), sizes, _starts(sizes), tuple(slice(*r) for r in live_rows),
        any(told["needs_x"]), any(told["needs_y"]),
    )  # fmt: skip


def refuse(process_group: dist.ProcessGroup | None, count: int) -> None:
    """Instead of `agree` with `count` options, on a rank that is about to raise: so that others do,
    too. Where they would not listen, because nothing is exchanged, nothing is told."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    group = group_of(process_group)
    if _exchanging_device(group, torch.device("cpu")).type == "cpu" and _has_cpu(group):
        _exchange(group, (_REFUSED,) * (_FIELDS + count), torch.device("cpu"))


# Of `agree`, before what must be alike besides.
_FIELDS = 10
_LIVE = ("start of live pairs", "end of live pairs")
# Of these, those that may differ: whether a tower is frozen.
_FREE = ("needs_x", "needs_y")


def _code(value: int | torch.dtype) -> int:
    return FLOATING.index(value) if isinstance(value, torch.dtype) else int(value)


def _has_cpu(group: dist.ProcessGroup) -> bool:
    return torch.device("cpu") in group._device_types


def _exchanging_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    return torch.device("cpu") if _has_cpu(group) else device


def _exchange(
    group: dist.ProcessGroup, mine: tuple[int, ...], device: torch.device
) -> list[tuple[int, ...]]:
    """Of each field what the ranks bring."""
    world_size = dist.get_world_size(group)
    told = torch.tensor(mine, dtype=torch.int64, device=device)
    heard = told.new_empty((world_size * len(mine),))
    all_gather(heard, told, group)
    return list(zip(*heard.view(world_size, -1).tolist(), strict=True))


def _check(told: _Told) -> None:
    def each(field: str) -> str:
        values = told[field]
        if field.startswith("dtype"):
            values = tuple(FLOATING[index] for index in values)
        return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))

    refused = [str(rank) for rank, size in enumerate(told["batch"]) if size == _REFUSED]
    if refused:
        raise ValueError(
            f"all ranks must have arguments that the loss accepts, got others on rank "
            f"{', '.join(refused)}: the error raised there says which"
        )
    sizes = ("batch", *_LIVE)
    for field in told:
        special = (*sizes, *_FREE, "requires_grad")
        if field not in special and len(set(told[field])) > 1:
            raise ValueError(f"all ranks must have one {field}, got {each(field)}")
    for field in () if told["uneven"][0] else sizes:
        if len(set(told[field])) > 1:
            name = "batches of one size" if field == "batch" else f"one {field}"
            raise ValueError(f"all ranks must have {name} unless uneven=True, got {each(field)}")
    if len(set(told["requires_grad"])) > 1:
        raise ValueError(
            "all ranks or none must have something to differentiate, since a backward waits for "
            f"all of them, got {each('requires_grad')}"
        )
