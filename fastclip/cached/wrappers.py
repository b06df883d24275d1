"""The modules behind a model, and those among them that exchange gradients: DDP and FSDP."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import ModuleType
from typing import Any

import torch.distributed as dist
from torch import nn


def modules_of(model: Any) -> list[nn.Module]:
    """Returns the modules that a model calls: itself, or those that a function, a bound method, a
    partial or another callable object refers to, directly or as attributes of an object."""
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        referred = [model.func, *model.args, *model.keywords.values()]
        return [m for r in referred if callable(r) for m in modules_of(r)]
    if inspect.ismethod(model):
        referred = [model.__self__]
    elif inspect.isfunction(model):
        referred = [model.__globals__.get(name) for name in model.__code__.co_names]
        referred += [*(model.__defaults__ or ()), *(model.__kwdefaults__ or {}).values()]
        for cell in model.__closure__ or ():
            with suppress(ValueError):  # a cell that has no value yet
                referred.append(cell.cell_contents)
    else:
        referred = [model]
    found = []
    for r in referred:
        is_plain = not isinstance(r, (nn.Module, ModuleType, type)) and not inspect.isroutine(r)
        of_object = getattr(r, "__dict__", {}).values() if is_plain else ()
        found += [m for m in (r, *of_object) if isinstance(m, nn.Module)]
    return found


def wrappers_of(model: Any) -> list[nn.Module]:
    """Returns the outermost modules of a model that exchange gradients between ranks."""
    found = [w for module in modules_of(model) for w in _outermost(module)]
    return list(dict.fromkeys(found))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    if _is_wrapper(module):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


def _is_wrapper(module: nn.Module) -> bool:
    if isinstance(module, nn.parallel.DistributedDataParallel) or is_fsdp2(module):
        return True
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and not needed without it
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_fsdp2(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")


def groups_of(wrapper: nn.Module) -> list[dist.ProcessGroup]:
    """Returns the groups whose ranks a wrapper's ranks exchange with."""
    if not is_fsdp2(wrapper):
        return [wrapper.process_group]
    for p in wrapper.parameters():
        if hasattr(p, "device_mesh"):
            return p.device_mesh.get_all_groups()
    return [dist.group.WORLD]


def in_step(wrapper: nn.Module) -> bool:
    """True if the ranks of a wrapper must encode the same number of micro-batches, because its
    forward exchanges parameters, buffers or statistics."""
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        if any(isinstance(module, nn.SyncBatchNorm) for module in wrapper.modules()):
            return True
        return wrapper.broadcast_buffers and next(wrapper.buffers(), None) is not None
    return True


def without_exchange(
    wrappers: list[nn.Module], no_sync: Callable[[], AbstractContextManager[Any]] | None
) -> AbstractContextManager[Any]:
    """Returns a context in which gradients are added up on each rank. no_sync: returns such a
    context, in place of those of the wrappers."""
    contexts = ExitStack()
    if no_sync is not None:
        contexts.enter_context(no_sync())
    else:
        for wrapper in wrappers:
            own = _fsdp2_without_exchange(wrapper) if is_fsdp2(wrapper) else wrapper.no_sync()
            contexts.enter_context(own)
    return contexts


@contextmanager
def _fsdp2_without_exchange(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)
