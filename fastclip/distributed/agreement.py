"""The agreement of ranks before a loss: sizes, dtypes and options are exchanged and compared.

A mismatch raises on all ranks at once, instead of leaving some of them waiting. After the agreement
everything is collectives on tensors of known sizes. Ranks are ranks within the group.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.dtypes import FLOATING
from .collectives import gather_rows
from .described import by_rank, difference, exchange_texts
from .drift import code_of_number, code_of_scalar, number_of, warn_of_drift
from .shard import Shard, starts_of

Checked = TypeVar("Checked")
_LOSS = "loss with its options"  # the first field: a code of these and of the fields' names
_RankValues = dict[str, tuple[int, ...]]  # the ranks' values of each field


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a loss runs in. None stands for all processes. Returns None without an
    initialised group: such a process is a world of one."""
    if process_group is None and not is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must have this process among its ranks, got one without it")
    return group


def group_named(name: str) -> dist.ProcessGroup | None:
    """The process group with the name that a graph holds; None for ""."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None


def ranks_of(process_group: dist.ProcessGroup | None) -> int:
    group = group_of(process_group)
    return 1 if group is None else dist.get_world_size(group)


def check_world(
    name: str, rank: int, world_size: int, process_group: dist.ProcessGroup | None
) -> None:
    """Raises ValueError unless these are this process's rank and the size of its group, and
    RuntimeError if several processes have no group."""
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


# The ranks' values at the first call, by group and by this rank's values: an exchange at every call
# would wait for the device.
_FIRST_CALLS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[object, ...], _RankValues]] = (
    WeakKeyDictionary()
)
REFUSED = -1  # in place of the first field, a code that is at least 0
_REFUSALS: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
# The fixed length of a rank's message; shorter ones, such as a refusal, are padded.
_MOST_FIELDS = 40
# Sizes that may be 0 on some ranks, but not on all.
_COUNTS = ("batch", "number of rows", "number of columns")
# The fields of `Shard` that tell which gradients any rank needs, in the order of its fields.
NEEDS = ("needs_x", "needs_y", "needs_key_bias")


class Call(NamedTuple):
    """The values that ranks compare beside their features.

    loss: the loss with its options (`described`), the same on all ranks.
    needs_any: something requires a gradient, on all ranks or on none.
    must_match: further values that must be the same on all ranks.
    scalars: scale and bias; a difference between ranks is a warning.
    """

    loss: str
    needs_any: bool
    uneven: bool
    must_match: dict[str, int | float | torch.dtype]
    scalars: dict[str, Tensor | float | None] = {}  # noqa: RUF012 -- never changed


def agree(
    process_group: dist.ProcessGroup | None, x: Tensor, y: Tensor, call: Call,
    live: tuple[int, int] | None = None,
) -> Shard:  # fmt: skip
    """Compares the ranks' paired features x, y (b, D) and options; returns this rank's shard.

    If the group has a backend for CPU memory (gloo, or `init_process_group` without a backend,
    which takes one for each device), ranks compare through it at every call. In a group that only
    moves GPU tensors, reading the result waits for the device. There, calls with `uneven` compare
    every time, since they need the sizes; others compare only if this rank has not made the same
    call, with the same sizes and options, before.

    live: start and stop of this rank's rows that are differentiated; None: all.

    Raises, on every rank:
        ValueError: losses, widths, dtypes or options that differ; sizes or live rows that differ
            without `uneven`; a batch without pairs; a rank without anything to differentiate while
            others have, since their backward would wait for it.
    """
    start, stop = live or (0, x.shape[0])
    sizes = {"batch": x.shape[0], "start of live pairs": start, "end of live pairs": stop}
    group, exchanged = _compared(process_group, ("images", x), ("texts", y), sizes, {}, call)
    live_rows = tuple(
        slice(*rows)
        for rows in zip(
            exchanged["start of live pairs"], exchanged["end of live pairs"], strict=True
        )
    )
    return _shard(group, exchanged, exchanged["batch"], live_rows)


def agree_on_sides(
    process_group: dist.ProcessGroup | None, x: Tensor, y: Tensor, key_bias: Tensor | None,
    call: Call,
) -> Shard:  # fmt: skip
    """Does what `agree` does, for rows x (m, D) and columns y (n, D), where m and n may differ.
    Returns the shard of the columns."""
    sizes = {"number of rows": x.shape[0], "number of columns": y.shape[0]}
    needs = {"needs_key_bias": int(key_bias is not None and key_bias.requires_grad)}
    of_key_bias = {
        "key_bias": int(key_bias is not None),
        "dtype of key_bias": y.dtype if key_bias is None else key_bias.dtype,
    }
    call = call._replace(must_match={**call.must_match, **of_key_bias})
    group, exchanged = _compared(process_group, ("x", x), ("y", y), sizes, needs, call)
    columns = exchanged["number of columns"]
    shard = _shard(group, exchanged, columns, tuple(slice(0, n) for n in columns))
    return shard._replace(most_rows=max(exchanged["number of rows"]))


def _compared(
    process_group: dist.ProcessGroup | None, named_x: tuple[str, Tensor],
    named_y: tuple[str, Tensor], sizes: dict[str, int], needs: dict[str, int], call: Call,
) -> tuple[dist.ProcessGroup | None, _RankValues]:  # fmt: skip
    """Returns the group and the ranks' values, once they agree. `sizes` may differ between ranks if
    `uneven`; `needs` may always differ."""
    group = group_of(process_group)
    (name_x, x), (name_y, y) = named_x, named_y
    common = {
        "width D": x.shape[1], f"dtype of {name_x}": x.dtype, f"dtype of {name_y}": y.dtype,
        "uneven": int(call.uneven), **call.must_match,
    }  # fmt: skip
    mine: dict[str, int] = {
        **sizes, "needs_x": int(x.requires_grad), "needs_y": int(y.requires_grad), **needs,
        "requires_grad": int(call.needs_any),
        **{name: _code(value) for name, value in common.items()},
    }  # fmt: skip
    if group is None:
        exchanged = {name: (value,) for name, value in mine.items()}
        _check(exchanged, tuple(sizes), common)
        return group, exchanged
    # Ranks that call different losses may have different fields.
    mine = {_LOSS: zlib.crc32(f"{call.loss} {list(mine)}".encode()), **mine}
    through = _exchanging_device(group, x.device)
    trusts_first_call = through.type != "cpu" and not call.uneven
    # A scale changes at every step, so those that trust the first call do not compare it.
    scalars = {} if trusts_first_call else call.scalars
    key = x.device, *mine.items()
    known = _FIRST_CALLS.setdefault(group, {}) if trusts_first_call else {}
    if key not in known:
        message = *mine.values(), *map(code_of_scalar, scalars.values())
        received = exchange(group, message, through)
        exchanged = dict(zip(mine, received, strict=False))
        _check_losses(exchanged[_LOSS], group, call.loss, through)
        _check(exchanged, tuple(sizes), common)
        for name, codes in zip(scalars, received[len(mine) :], strict=True):
            warn_of_drift(name, codes)
        known[key] = exchanged
    return group, known[key]


def _shard(
    group: dist.ProcessGroup | None,
    exchanged: _RankValues,
    sizes: tuple[int, ...],
    live: tuple[slice, ...],
) -> Shard:
    rank = 0 if group is None else dist.get_rank(group)
    needs = (any(exchanged.get(name, ())) for name in NEEDS)
    return Shard(group, rank, sizes, starts_of(sizes), live, *needs)


def announce_failure(process_group: dist.ProcessGroup | None) -> None:
    """Called in place of `agree` by a rank that is about to raise, so that the others raise, too.
    It sends nothing without a group, or in one that only moves GPU tensors: there the other ranks
    wait until the group's timeout."""
    if not is_initialized():
        return
    group = group_of(process_group)
    if has_cpu(group):
        exchange(group, (REFUSED,), torch.device("cpu"))


def announced(process_group: dist.ProcessGroup | None, check: Callable[[], Checked]) -> Checked:
    """Calls a check of this rank's arguments. If it raises, the other ranks raise, too."""
    try:
        return check()
    except (TypeError, ValueError, RuntimeError):
        announce_failure(process_group)
        raise


def _code(value: int | float | torch.dtype) -> int:
    if isinstance(value, torch.dtype):
        return FLOATING.index(value)
    return code_of_number(value) if isinstance(value, float) else int(value)


def has_cpu(group: dist.ProcessGroup) -> bool:
    return torch.device("cpu") in group._device_types


def _exchanging_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    return torch.device("cpu") if has_cpu(group) else device


def refusals(group: dist.ProcessGroup) -> int:
    """Returns how many refusals this process has sent to or received from a group. An error after
    another one is known to the ranks of the group."""
    return _REFUSALS.get(group, 0)


def exchange(
    group: dist.ProcessGroup, mine: tuple[int, ...], device: torch.device
) -> list[tuple[int, ...]]:
    """Returns the ranks' values of each field."""
    world_size = dist.get_world_size(group)
    padded = mine + (0,) * (_MOST_FIELDS - len(mine))
    message = torch.tensor(padded, dtype=torch.int64, device=device)
    received = gather_rows(message, (len(padded),) * world_size, group).view(world_size, -1)
    fields = list(zip(*received.tolist(), strict=True))
    if REFUSED in fields[0]:
        _REFUSALS[group] = refusals(group) + 1
    return fields[: len(mine)]


def _check_losses(
    codes: tuple[int, ...], group: dist.ProcessGroup, loss: str, through: torch.device
) -> None:
    refused = [str(rank) for rank, code in enumerate(codes) if code == REFUSED]
    if refused:
        raise ValueError(
            f"all ranks must have arguments that the loss accepts, got others on rank "
            f"{', '.join(refused)}: the error raised there says which"
        )
    if len(set(codes)) > 1:
        raise ValueError(difference(exchange_texts(group, loss, through)))


def _check(
    exchanged: _RankValues, sizes: tuple[str, ...], common: dict[str, int | float | torch.dtype]
) -> None:
    def each(field: str) -> str:
        values: tuple[object, ...] = exchanged[field]
        if isinstance(common.get(field), torch.dtype):
            values = tuple(FLOATING[index] for index in exchanged[field])
        elif isinstance(common.get(field), float):
            values = tuple(map(number_of, exchanged[field]))
        return by_rank(values)

    for field in common:
        if len(set(exchanged[field])) > 1:
            raise ValueError(f"all ranks must have one {field}, got {each(field)}")
    for field in sizes:
        if field in _COUNTS and sum(exchanged[field]) == 0:
            raise ValueError(f"the batch must not be empty, got {field} {each(field)}")
        if not exchanged["uneven"][0] and len(set(exchanged[field])) > 1:
            name = "batches of one size" if field == "batch" else f"one {field}"
            raise ValueError(f"all ranks must have {name} unless uneven=True, got {each(field)}")
    if len(set(exchanged["requires_grad"])) > 1:
        raise ValueError(
            "all ranks or none must have something to differentiate, since a backward waits for "
            f"all of them, got {each('requires_grad')}"
        )
