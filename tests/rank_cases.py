"""What ranks do in the tests of losses across processes; `ranks.py` runs it on all of them.

Every rank makes the whole batch, takes its own part, and returns what it got as float64 arrays:
gradients of its features as they are after DDP's mean, scalars averaged over ranks.
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hard_inputs import batch
from judge import PRECISIONS
from torch import Tensor

from fastclip import distributed, modules


class Case(NamedTuple):
    """A batch, how it is spread, and what each rank multiplies its loss with."""

    loss: str
    sizes: tuple[int, ...]
    precision: str = "float64"
    kind: str = "random"
    scale: float = 14.3
    normalize: bool = False
    upstream: tuple[float, ...] | None = None
    frozen: str = ""  # "x" or "y"
    width: int = 24

    @property
    def towers(self) -> tuple[np.ndarray, np.ndarray]:
        return batch(self.kind, sum(self.sizes), self.width)

    def part(self, rank: int) -> slice:
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])


def leaves(case: Case, rows: slice) -> list[Tensor]:
    precision = PRECISIONS[case.precision]
    towers = zip(case.towers, (precision.x, precision.y), strict=True)
    tensors = [torch.tensor(t[rows], dtype=dtype) for t, dtype in towers]
    tensors += [torch.tensor(v, dtype=precision.scalars) for v in (case.scale, -3.0)]
    frozen = [case.frozen == name for name in ("x", "y", "scale", "bias")]
    return [t.requires_grad_(not off) for t, off in zip(tensors, frozen, strict=True)]


def results(case: Case, rank: int, world_size: int, loss: Callable[..., Tensor]) -> dict[str, Any]:
    """loss: of four leaves."""
    inputs = leaves(case, case.part(rank))
    value = loss(*inputs)
    (value * (case.upstream[rank] if case.upstream else 1.0)).backward()
    mean = value.detach().double().clone()
    dist.all_reduce(mean)
    found = {"value": value.item(), "loss": mean.item() / world_size}
    for name, leaf in zip(("dx", "dy", "dscale", "dbias"), inputs, strict=True):
        if leaf.grad is None:
            found[name] = None
            continue
        gradient = leaf.grad.double() / world_size
        if leaf.dim() == 0:
            dist.all_reduce(gradient)
        found[name] = gradient.numpy()
    return found


def ours(rank: int, world_size: int, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """The functions of `fastclip.distributed`."""
    function = getattr(distributed, f"{case.loss}_loss")
    return results(
        case, rank, world_size,
        lambda *inputs: function(*inputs, normalize=case.normalize, **options),
    )  # fmt: skip


def accumulated(rank: int, world_size: int, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """`ours` in three micro-batches, of whose features alone there is a graph."""
    function = getattr(distributed, f"{case.loss}_loss")
    b = case.sizes[rank]
    cuts = (0, 1, 1 + (b - 1) // 2, b)

    def loss(x: Tensor, y: Tensor, *scalars: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for live in itertools.pairwise(cuts):
            own = slice(*live)
            towers = []
            for tower in (x, y):
                spliced = tower.detach().clone()
                spliced[own] = tower[own]
                towers.append(spliced)
            total = total + function(
                *towers, *scalars, normalize=case.normalize, live=live, **options
            )
        return total

    return results(case, rank, world_size, loss)


def module(
    rank: int, world_size: int, case: Case, theirs: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """open_clip's class or ours of the same name."""
    name = {"clip": "ClipLoss", "siglip": "SigLipLoss"}[case.loss]
    if theirs:
        from open_clip_import import import_open_clip

        source = import_open_clip().loss
    else:
        source = modules
    loss = getattr(source, name)(rank=rank, world_size=world_size, **options)
    return results(case, rank, world_size, loss)


def warnings_of(rank: int, world_size: int, local_loss: bool, gather_with_grad: bool) -> list[str]:
    """Of two steps in a process that has had no warning yet; each with its file."""
    modules._warn_of_direction.cache_clear()
    loss = modules.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(*leaves(Case("clip", (3,) * world_size), slice(3 * rank, 3 * rank + 3)))
    return [f"{warning.filename}: {warning.message}" for warning in found]


def whole(case: Case, loss: Callable[..., Tensor]) -> dict[str, Any]:
    """One process on the whole batch; `loss` of four leaves."""
    inputs = leaves(case, slice(None))
    loss(*inputs).backward()
    names = ("dx", "dy", "dscale", "dbias")
    return {n: None if t.grad is None else t.grad for n, t in zip(names, inputs, strict=True)}


def normalized(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
