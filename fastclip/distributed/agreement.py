"""The things that ranks must have in common, checked where all of them see it.

`agree` comes before every loss across processes: each rank tells what it brings, and what does not
fit fails on all of them at once instead of leaving some to wait. After it everything is collectives
on tensors of known sizes. Ranks here are ranks within the group.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.dtypes import FLOATING
from .collectives import gather_rows
from .shard import Shard, starts_of

_Told = dict[str, tuple[int, ...]]  # of each field what the ranks brought


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a loss runs in. None stands for all processes; None of them without an
    initialised group: a process alone is a world of one."""
    if process_group is None and not is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must have this process among its ranks, got one without it")
    return group


def group_named(name: str) -> dist.ProcessGroup | None:
    """The argument process_group whose name a graph holds; "": None."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None


def ranks_of(process_group: dist.ProcessGroup | None) -> int:
    group = group_of(process_group)
    return 1 if group is None else dist.get_world_size(group)


def check_world(
    name: str, rank: int, world_size: int, process_group: dist.ProcessGroup | None
) -> None:
    """Raises unless these are this process's rank and the size of its group: ValueError, or
    RuntimeError where several processes have no group."""
    group = group_of(process_group)
    if group is None and world_size > 1:
        raise RuntimeError(
            f"{name}: a loss across {world_size} processes needs "
            "torch.distributed.init_process_group first, got no initialised group"
        )
    real = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if (rank, world_size) != real:
        raise ValueError(
            f"{name}: rank and world_size must be those of this process in its group, "
            f"{real[0]} and {real[1]}, got {rank} and {world_size}"
        )


# The ranks' answers at the first call, by group and by what this rank brought: an exchange at every
# call would wait for the device.
_TOLD: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], _Told]] = WeakKeyDictionary()
_REFUSED = -1  # instead of the first field, a size


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
            allows that; a batch without pairs; a rank without anything to differentiate, for whose
            backward the others would wait.
    """
    start, stop = live or (0, x.shape[0])
    sizes = {"batch": x.shape[0], "start of live pairs": start, "end of live pairs": stop}
    group, told = _told(
        process_group, ("images", x), ("texts", y), sizes, {}, needs_any, uneven, alike
    )
    live_rows = tuple(
        slice(*rows)
        for rows in zip(told["start of live pairs"], told["end of live pairs"], strict=True)
    )
    return _shard(group, told, told["batch"], live_rows)


def agree_on_sides(
    process_group: dist.ProcessGroup | None, x: Tensor, y: Tensor, key_bias: Tensor | None,
    needs_any: bool, uneven: bool, **alike: int | torch.dtype,
) -> Shard:  # fmt: skip
    """`agree` for rows x (m, D) and columns y (n, D), which need not be as many: the shard of
    columns."""
    sizes = {"number of rows": x.shape[0], "number of columns": y.shape[0]}
    needs = {"needs_key_bias": int(key_bias is not None and key_bias.requires_grad)}
    alike["key_bias"] = int(key_bias is not None)
    if key_bias is not None:
        alike["dtype of key_bias"] = key_bias.dtype
    group, told = _told(process_group, ("x", x), ("y", y), sizes, needs, needs_any, uneven, alike)
    columns = told["number of columns"]
    return _shard(group, told, columns, tuple(slice(0, n) for n in columns))


def _told(
    process_group: dist.ProcessGroup | None, named_x: tuple[str, Tensor],
    named_y: tuple[str, Tensor], sizes: dict[str, int], needs: dict[str, int], needs_any: bool,
    uneven: bool, alike: dict[str, int | torch.dtype],
) -> tuple[dist.ProcessGroup | None, _Told]:  # fmt: skip
    """Sizes may differ where that is allowed; needs may, whatever a rank has frozen."""
    group = group_of(process_group)
    (name_x, x), (name_y, y) = named_x, named_y
    needs = {"needs_x": int(x.requires_grad), "needs_y": int(y.requires_grad), **needs}
    common = {
        "width D": x.shape[1], f"dtype of {name_x}": x.dtype, f"dtype of {name_y}": y.dtype,
        "uneven": int(uneven), **alike,
    }  # fmt: skip
    mine: dict[str, int] = {
        **sizes, **needs, "requires_grad": int(needs_any),
        **{name: _code(value) for name, value in common.items()},
    }  # fmt: skip
    if group is None:
        told = {name: (value,) for name, value in mine.items()}
        _check(told, tuple(sizes), tuple(common))
        return group, told
    through = _exchanging_device(group, x.device)
    relies = through.type != "cpu" and not uneven
    key = x.device, *mine.items()
    known = _TOLD.setdefault(group, {}) if relies else {}
    if key not in known:
        found = _exchange(group, tuple(mine.values()), through)
        told = dict(zip(mine, found, strict=True))
        _check(told, tuple(sizes), tuple(common))
        known[key] = told
    return group, known[key]


def _shard(
    group: dist.ProcessGroup | None, told: _Told, sizes: tuple[int, ...], live: tuple[slice, ...]
) -> Shard:
    rank = 0 if group is None else dist.get_rank(group)
    needs = (any(told.get(name, ())) for name in NEEDS)
    return Shard(group, rank, sizes, starts_of(sizes), live, *needs)


# The fields of a shard that say what any rank wants, in its order.
NEEDS = ("needs_x", "needs_y", "needs_key_bias")


def refuse(process_group: dist.ProcessGroup | None) -> None:
    """Instead of `agree`, on a rank that is about to raise: so that others do, too. No-op where
    nothing is exchanged."""
    if not is_initialized():
        return
    group = group_of(process_group)
    if _has_cpu(group):
        _exchange(group, (_REFUSED,), torch.device("cpu"))


# Numbers that a rank sends, however many it has to say: one that refuses has one.
_MOST_FIELDS = 32
# No rank needs any of these, but the whole batch does.
_COUNTS = ("batch", "number of rows", "number of columns")


def _code(value: int | torch.dtype) -> int:
    return FLOATING.index(value) if isinstance(value, torch.dtype) else int(value)


def _has_cpu(group: dist.ProcessGroup) -> bool:
    return torch.device("cpu") in group._device_types


def _exchanging_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    return torch.device("cpu") if _has_cpu(group) else device


def _exchange(
    group: dist.ProcessGroup, mine: tuple[int, ...], device: torch.device
) -> list[tuple[int, ...]]:
    """Each field as the ranks bring it."""
    world_size = dist.get_world_size(group)
    padded = mine + (0,) * (_MOST_FIELDS - len(mine))
    told = torch.tensor(padded, dtype=torch.int64, device=device)
    heard = gather_rows(told, (len(padded),) * world_size, group)
    return list(zip(*heard.view(world_size, -1).tolist(), strict=True))[: len(mine)]


def _check(told: _Told, sizes: tuple[str, ...], common: tuple[str, ...]) -> None:
    def each(field: str) -> str:
        values = told[field]
        if field.startswith("dtype"):
            values = tuple(FLOATING[index] for index in values)
        return ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))

    refused = [str(rank) for rank, size in enumerate(told[sizes[0]]) if size == _REFUSED]
    if refused:
        raise ValueError(
            f"all ranks must have arguments that the loss accepts, got others on rank "
            f"{', '.join(refused)}: the error raised there says which"
        )
    for field in common:
        if len(set(told[field])) > 1:
            raise ValueError(f"all ranks must have one {field}, got {each(field)}")
    for field in sizes:
        if field in _COUNTS and sum(told[field]) == 0:
            raise ValueError(f"the batch must not be empty, got {field} {each(field)}")
        if not told["uneven"][0] and len(set(told[field])) > 1:
            name = "batches of one size" if field == "batch" else f"one {field}"
            raise ValueError(f"all ranks must have {name} unless uneven=True, got {each(field)}")
    if len(set(told["requires_grad"])) > 1:
        raise ValueError(
            "all ranks or none must have something to differentiate, since a backward waits for "
            f"all of them, got {each('requires_grad')}"
        )
