"""Functions that ranks run in the tests of losses across ranks; `processes.py` starts the ranks.

Every rank makes the whole batch, takes its own part, and returns its results as float64 arrays:
gradients of its features as they are after DDP's mean, scalars averaged over ranks.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from support.hard_inputs import batch
from support.judge import PRECISIONS
from torch import Tensor

from bench.measure.traffic import Traffic
from fastclip import distributed
from fastclip.distributed import sharded_loss
from fastclip.engine import warn_once
from fastclip.loss import open_clip


class Case(NamedTuple):
    """A batch, how it is spread over ranks, and the factor of each rank's loss."""

    loss: str
    sizes: tuple[int, ...]
    precision: str = "float64"
    batch_name: str = "random"
    scale: float = 14.3
    normalize: bool = False
    upstream: tuple[float, ...] | None = None
    frozen: str = ""  # "x" or "y"
    frozen_on: tuple[tuple[int, str], ...] = ()  # on single ranks
    width: int = 24

    @property
    def towers(self) -> tuple[np.ndarray, np.ndarray]:
        return batch(self.batch_name, sum(self.sizes), self.width)

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
    """This rank's value and gradients of `loss`, a function of x, y, scale and bias."""
    inputs = leaves(case, case.part(rank))
    for tower, name in zip(inputs, ("x", "y"), strict=False):
        if (rank, name) in case.frozen_on:
            tower.requires_grad_(False)
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
    """Results of the functions of `fastclip.distributed`."""
    function = getattr(distributed, f"{case.loss}_loss")
    return results(
        case, rank, world_size,
        lambda *inputs: function(*inputs, normalize=case.normalize, **options),
    )  # fmt: skip


def ours_and_kept(
    rank: int, world_size: int, case: Case, options: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Results of `ours`, and the bytes of products that were kept between the two sweeps."""
    kept, sweep = [], sharded_loss.sweep

    def seen(*arguments: Any, **named: Any) -> Any:
        value, swept, lines = sweep(*arguments, **named)
        kept.extend(products.nbytes for products in swept.kept)
        return value, swept, lines

    with mock.patch.object(sharded_loss, "sweep", seen):
        return ours(rank, world_size, case, options), sum(kept)


def in_slices(b: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of b pairs, summed over three micro-batches; each has a graph of its own rows only."""
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
            total = total + function(*towers, *scalars, live=live)
        return total

    return loss


def accumulated(rank: int, world_size: int, case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Results of `ours`, summed over micro-batches."""
    function = getattr(distributed, f"{case.loss}_loss")
    loss = functools.partial(function, normalize=case.normalize, **options)
    return results(case, rank, world_size, in_slices(case.sizes[rank], loss))


def module(
    rank: int, world_size: int, case: Case, theirs: bool, options: dict[str, Any],
    sliced: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Results of open_clip's class (`theirs`), or of ours with the same name."""
    name = {"clip": "ClipLoss", "siglip": "SigLipLoss"}[case.loss]
    if theirs:
        from support.open_clip_import import import_open_clip

        source = import_open_clip().loss
    else:
        source = open_clip
    loss = getattr(source, name)(rank=rank, world_size=world_size, **options)
    if sliced:
        loss = in_slices(case.sizes[rank], loss)
    return results(case, rank, world_size, loss)


class Module(NamedTuple):
    """A case for one of our classes."""

    case: Case
    options: dict[str, Any]
    sliced: bool = False

    @property
    def combination(self) -> dict[str, bool]:
        """open_clip's two flags. SigLipLoss and a single process have no choice: their gradients
        are exact, as with both flags."""
        names, alone = ("local_loss", "gather_with_grad"), len(self.case.sizes) == 1
        return {name: alone or self.options.get(name, True) for name in names}

    @property
    def is_ring(self) -> bool:
        around = self.options.get("dist_impl") in ("bidir", "shift")
        return around or self.options.get("ring", False)


def each_module(rank: int, world_size: int, several: list[Module]) -> list[dict[str, Any]]:
    """This rank's results of each module; in float64 also the kinds of its exchanges."""
    found = []
    for one in several:
        # Counting exchanges takes a third longer.
        watched = Traffic() if one.case.precision == "float64" else nullcontext()
        with warnings.catch_warnings(), watched as traffic:
            warnings.simplefilter("ignore")
            found.append(module(rank, world_size, one.case, False, one.options, one.sliced))
        if traffic is not None:
            found[-1]["exchanges"] = set(traffic.sent)
    return found


class Logits(NamedTuple):
    """The factors of a rank's logits, before the scale."""

    x: Tensor  # its rows
    y: Tensor  # its columns
    images: Tensor  # all rows, beside y
    texts: Tensor  # all columns, beside x


def clip_sum(own: Logits, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    logits = scale * own.x @ own.texts.T, scale * own.y @ own.images.T
    return sum(F.cross_entropy(s, labels, reduction="sum") for s in logits) / 2


def siglip_sum(own: Logits, scale: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    signs = 2 * F.one_hot(labels, len(own.texts)) - 1
    return -F.logsigmoid(signs * (scale * own.x @ own.texts.T + bias)).sum()


# The sum over a rank's pairs, as open_clip writes it.
SUMS = {"clip": clip_sum, "siglip": siglip_sum}


def emulated(case: Case, local_loss: bool, gather_with_grad: bool) -> list[dict[str, Any]]:
    """Each rank's results with one of open_clip's combinations, on batches of any sizes.

    Autograd makes them in one process, in float64, from the numbers that the ranks' tensors hold.
    """
    x, y, scale, bias = (t.detach().double() for t in leaves(case, slice(None)))
    size, batch = len(case.sizes), len(x)
    ranks = [
        [t.clone().requires_grad_() for t in (x[part], y[part], scale, bias)]
        for part in map(case.part, range(size))
    ]
    values, total = [], torch.zeros((), dtype=torch.float64)
    for k, (own_x, own_y, own_scale, own_bias) in enumerate(ranks):
        images, texts = (
            torch.cat([
                r[tower] if gather_with_grad or (j == k and not local_loss) else r[tower].detach()
                for j, r in enumerate(ranks)
            ])
            for tower in (0, 1)
        )  # fmt: skip
        labels = torch.arange(batch)
        if local_loss:
            labels = labels[case.part(k)]
        else:
            own_x, own_y = images, texts
        factors = Logits(own_x, own_y, images, texts)
        value = SUMS[case.loss](factors, own_scale, own_bias, labels)
        value = value * (size if local_loss else 1) / batch
        values.append(value.item())
        total = total + value * (case.upstream[k] if case.upstream else 1.0)
    total.backward()
    scalars = {
        name: sum(0 if r[place].grad is None else r[place].grad.item() for r in ranks) / size
        for name, place in (("dscale", 2), ("dbias", 3))
    }
    return [
        {"value": value, "loss": sum(values) / size, "dx": (r[0].grad / size).numpy(),
         "dy": (r[1].grad / size).numpy(), **scalars}
        for value, r in zip(values, ranks, strict=True)
    ]  # fmt: skip


def warnings_of(rank: int, world_size: int, local_loss: bool, gather_with_grad: bool) -> list[str]:
    """The warnings of two steps, in a process that has had none yet; each with its file."""
    warn_once._given.clear()
    loss = open_clip.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            loss(*leaves(Case("clip", (3,) * world_size), slice(3 * rank, 3 * rank + 3)))
    return [f"{warning.filename}: {warning.message}" for warning in found]
