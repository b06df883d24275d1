"""What ranks must have in common, checked where all of them see it.

`agree` comes before every loss across processes: each rank tells what it brings, and what does not
fit fails on all of them at once instead of leaving some to wait. After it everything is collectives
on tensors of known sizes. Ranks here are ranks within the group.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_rows
from .operands import FLOATING
from .shard import Shard, starts_of

_Told = dict[str, tuple[int, ...]]  # of each field what the ranks brought


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
_REFUSED = -1  # instead of a batch size


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
        group, dist.get_rank(group), sizes, starts_of(sizes), tuple(slice(*r) for r in live_rows),
        any(told["needs_x"]), any(told["needs_y"]),
    )  # fmt: skip


def refuse(process_group: dist.ProcessGroup | None) -> None:
    """Instead of `agree`, on a rank that is about to raise: so that others do, too. Where they
    would not listen, because nothing is exchanged, nothing is told."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    group = group_of(process_group)
    if _has_cpu(group):
        _exchange(group, (_REFUSED,), torch.device("cpu"))


# Numbers that a rank sends, however many it has to say: one that refuses has one.
_MOST_FIELDS = 24
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
    padded = mine + (0,) * (_MOST_FIELDS - len(mine))
    told = torch.tensor(padded, dtype=torch.int64, device=device)
    heard = gather_rows(told, (len(padded),) * world_size, group)
    return list(zip(*heard.view(world_size, -1).tolist(), strict=True))[: len(mine)]


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
