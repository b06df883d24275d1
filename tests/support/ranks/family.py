"""The losses of the family across ranks, and the same losses of one process.

Ranks hold parts of one batch, which every process draws again. Smaller worlds are groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from support import family
from support.family import CASES, Arrays
from support.judge import PRECISIONS
from support.ranks.failures import error_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip import distributed, loss, reference
from fastclip.loss import ClipLoss, DistillClipLoss, GlobalClipLoss, SigLipLoss

CPU, WIDTH = torch.device("cpu"), 6
FLOAT64 = PRECISIONS["float64"]
ROWS = ("x", "x_ids", "classes", "weights", "teacher_x")
COLUMNS = ("y", "y_ids", "key_bias", "teacher_y")


class Spread(NamedTuple):
    """A case, how its batch is spread over ranks, and the options of the call."""

    name: str
    sizes: tuple[int, ...]
    ring: bool = False
    uneven: bool = False
    reduction: str = "mean"
    normalize: bool = False
    module: bool = False  # through the loss's class
    # Rank 0 freezes this input; the others differentiate all.
    frozen_on_one: str = ""

    @property
    def case(self) -> family.Case:
        """The case without keys beyond the queries, and without offsets: ranks own their keys."""
        case = CASES[self.name]
        options = {k: v for k, v in case.options.items() if k != "offset" or v is None}
        return case._replace(options=options, more_keys=0)

    @property
    def starts(self) -> list[int]:
        return [sum(self.sizes[:rank]) for rank in range(len(self.sizes) + 1)]

    def arrays(self) -> Arrays:
        """The whole batch. Labels are columns of their row's rank."""
        case, n = self.case, sum(self.sizes)
        given = family.of_batch(case, "random", n, WIDTH, 3.0)
        of_rank = [k for k, size in enumerate(self.sizes) for _ in range(size)]
        starts = torch.tensor([self.starts[k] for k in of_rank])
        sizes = torch.tensor([self.sizes[k] for k in of_rank])
        labels = starts + (torch.arange(n) * 3 + 1) % sizes
        if "labels" in case.given:
            given["x_ids"] = given["y_ids"][labels.numpy()]
        return given | {"labels": labels.numpy()}

    def upstream(self) -> Tensor:
        if self.reduction != "none":
            return torch.ones((), dtype=torch.float64)
        return torch.linspace(-1, 2, sum(self.sizes), dtype=torch.float64)

    @property
    def frozen(self) -> tuple[str, ...]:
        # Across ranks a mean has no gradient of weights.
        return ("weights",) if self.reduction == "mean" else ()


MODULES = {
    "info_nce": loss.InfoNCELoss, "supcon_loss": loss.SupConLoss, "nt_xent_loss": loss.NTXentLoss,
    "ranking_loss": loss.RankingLoss,
}  # fmt: skip


def _through_module(case: family.Case) -> Any:
    """A namespace whose function is the loss's class, with the options that it takes."""

    def function(*inputs: Any, **options: Any) -> Tensor:
        calls = {k: options.pop(k) for k in case.given if k in options}
        if "offset" in options:
            calls["offset"] = options.pop("offset")
        return MODULES[case.loss](across_ranks=True, **options)(*inputs, **calls)

    return SimpleNamespace(**{case.loss: function})


def _value(spread: Spread, module: Any, t: dict[str, Tensor], **options: Any) -> Tensor:
    return family.call(
        spread.case, module, t, reduction=spread.reduction, normalize=spread.normalize, **options
    )


def _leaves(spread: Spread, given: Arrays, rank: int = -1) -> dict[str, Tensor]:
    t = family.tensors(spread.case, given, FLOAT64, CPU)
    frozen = (*spread.frozen, *([spread.frozen_on_one] if rank == 0 else []))
    return {k: v.detach() if k in frozen else v for k, v in t.items()}


def _gradients(spread: Spread, t: dict[str, Tensor], value: Tensor, g: Tensor) -> dict[str, Any]:
    """Gradients by name, zeros for an input that this rank alone has frozen."""
    named = [name for name in spread.case.leaves if name not in spread.frozen]
    wanted = [name for name in named if t[name].requires_grad]
    found = torch.autograd.grad(value, [t[name] for name in wanted], g, allow_unused=True)
    given = dict(zip(wanted, found, strict=True))
    return {name: given[name] if name in given else torch.zeros_like(t[name]) for name in named}


def of_one_process(spread: Spread) -> tuple[Tensor, dict[str, Tensor | None]]:
    t = _leaves(spread, spread.arrays())
    value = _value(spread, reference, t)
    return value.detach(), _gradients(spread, t, value, spread.upstream())


def own_arrays(spread: Spread, rank: int) -> Arrays:
    given = spread.arrays()
    mine = slice(*spread.starts[rank : rank + 2])
    own = {k: v[mine] if k in (*ROWS, *COLUMNS) else v for k, v in given.items()}
    return own | {"labels": given["labels"][mine] - spread.starts[rank]}


def of_rank(spread: Spread, rank: int, group: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """This rank's value and gradients, before any sum over ranks."""
    t = _leaves(spread, own_arrays(spread, rank), rank)
    module = _through_module(spread.case) if spread.module else distributed
    value = _value(spread, module, t, ring=spread.ring, uneven=spread.uneven, process_group=group)
    g = spread.upstream()
    g = g[slice(*spread.starts[rank : rank + 2])] if spread.reduction == "none" else g
    return value.detach(), _gradients(spread, t, value, g)


@functools.cache
def group_of(size: int) -> dist.ProcessGroup:
    return dist.new_group(list(range(size)))


def run(rank: int, world_size: int, spreads: list[Spread]) -> list[Any]:
    found: list[Any] = []
    for spread in spreads:
        group = group_of(len(spread.sizes))
        found.append(of_rank(spread, rank, group) if rank < len(spread.sizes) else None)
    return found


def joined(spread: Spread, found: list[Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The ranks' results after the mean over ranks, put together as one process's."""
    ranks = len(spread.sizes)
    share = 1 if spread.reduction == "none" else ranks
    values, gradients = zip(*found[:ranks], strict=True)
    value = torch.cat(values) if spread.reduction == "none" else sum(values) / ranks
    whole: dict[str, Tensor | None] = {}
    for name in gradients[0]:
        parts = [of[name] for of in gradients]
        if all(t is None for t in parts):
            whole[name] = None
        elif name in (*ROWS, *COLUMNS):
            whole[name] = torch.cat(parts) / share
        else:
            whole[name] = sum(t for t in parts if t is not None) / share
    return value, whole


# ---- open_clip's classes -------------------------------------------------------------------------


def classes(rank: int, world_size: int, n: int) -> dict[str, tuple[list[float], list[Tensor]]]:
    """For each class with each combination of its options: the values, and the gradients of this
    rank's features and of the scale."""
    spread = Spread("clip, ids", (n,) * world_size)
    found = {}
    for local_loss in (False, True):
        for gather_with_grad in (False, True):
            options = {
                "local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank,
                "world_size": world_size,
            }  # fmt: skip
            calls: dict[str, Callable[[dict[str, Tensor]], Any]] = {
                "distill": lambda t, o=options: DistillClipLoss(**o)(
                    t["x"], t["y"], t["scale"], t["teacher_x"], t["teacher_y"], 2.0
                )
            }
            if gather_with_grad or not local_loss:
                calls |= {
                    same_id: lambda t, o=options, s=same_id: ClipLoss(
                        **o, same_id=s, label_smoothing=0.1
                    )(t["x"], t["y"], t["scale"], **_ids_and_weights(t, s == "positive"))
                    for same_id in ("ignore", "positive")
                }  # fmt: skip
            for name, call in calls.items():
                found[f"{name} {local_loss} {gather_with_grad}"] = _step(spread, rank, call)
    for impl in SigLipLoss.DIST_IMPLS:
        module = SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl, same_id="positive")
        found[f"siglip {impl}"] = _step(
            spread, rank,
            lambda t, m=module: m(t["x"], t["y"], t["scale"], -1.0, **_ids_and_weights(t, True)),
        )  # fmt: skip
    return found


def _ids_and_weights(t: dict[str, Tensor], weighted: bool) -> dict[str, Any]:
    weights = t["weights"].detach() if weighted else None
    return {"ids": (t["x_ids"], t["y_ids"]), "weights": weights}


def _step(
    spread: Spread, rank: int, call: Callable[[dict[str, Tensor]], Any]
) -> tuple[list[float], list[Tensor]]:
    t = family.tensors(spread.case, own_arrays(spread, rank), FLOAT64, CPU)
    values = call(t)
    values = values if isinstance(values, tuple) else (values,)
    # The parts of a loss have different factors, so that no two can be exchanged.
    total = sum((k + 1) * value for k, value in enumerate(values))
    gradients = torch.autograd.grad(total, [t["x"], t["y"], t["scale"]])
    return [value.item() for value in values], list(gradients)


# ---- the global loss -----------------------------------------------------------------------------


def global_loss(
    rank: int, world_size: int, sizes: tuple[int, ...], shared: bool, rho: float | None
) -> list[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """For each step the value, the gradients and the averages."""
    samples = sum(sizes) * 2
    module = GlobalClipLoss(
        samples, 0.6, rho=rho, eps=1e-3, across_ranks=True, uneven=len(set(sizes)) > 1,
        shared=shared, normalize=True,
    ).double()  # fmt: skip
    found = []
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for step in range(3):
        x, y, scale, indices = global_batch(sum(sizes), step, samples, shared)
        leaves = [t.clone().requires_grad_() for t in (x[mine], y[mine], scale)]
        value = module(*leaves, indices[mine])
        found.append((
            value.detach(),
            list(torch.autograd.grad(value, leaves[: 2 + (rho is not None)])),
            [module.log_u_images.clone(), module.log_u_texts.clone()],
        ))  # fmt: skip
    return found


def global_batch(
    n: int, step: int, samples: int, shared: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, the scale, and the samples' numbers. Without sharing these are those of the first
    step, because no sample may change its rank."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64).unbind()
    scale = torch.tensor(5.0, dtype=torch.float64)
    if not shared:
        generator.manual_seed(0)
    return x, y, scale, torch.randperm(samples, generator=generator)[:n]


# ---- compilation and errors ----------------------------------------------------------------------


def compiled(rank: int, world_size: int, spreads: list[Spread]) -> list[tuple[int, float]]:
    """The number of graphs for two batch sizes, and the largest error against eager mode."""
    found = []
    for spread in spreads:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")

        def function(t: dict[str, Tensor], spread: Spread = spread) -> Tensor:
            return _value(spread, distributed, t, ring=spread.ring)

        fast = torch.compile(function, backend=counter, fullgraph=True)
        mistakes = []
        for sizes in (spread.sizes, tuple(n + 2 for n in spread.sizes)):
            t = _leaves(spread, own_arrays(spread._replace(sizes=sizes), rank))
            one, other = (
                [value.detach(), *_gradients(spread, t, value, torch.ones_like(value)).values()]
                for value in (fast(t), function(t))
            )
            mistakes += [
                float((a - b).abs().max()) for a, b in zip(one, other, strict=True) if b is not None
            ]
        found.append((counter.frame_count, max(mistakes)))
    torch._dynamo.reset()
    return found


def errors(rank: int, world_size: int, by_rank: list[tuple[str, dict[str, Any]]]) -> str:
    """The error of this rank's loss with options of its own."""
    name, options = by_rank[rank]
    spread = Spread(name, (4,) * world_size)
    t = family.tensors(spread.case, own_arrays(spread, rank), FLOAT64, CPU)
    t = {k: v.detach() if k == "weights" else v for k, v in t.items()}
    options = dict(options)
    for key in ("x", "y"):
        if key in options:
            t[key] = options.pop(key)
    return error_of(family.call, spread.case, distributed, t, **options)


def module_errors(rank: int, world_size: int) -> list[str]:
    """Errors of modules that are wrong on rank 1 alone."""
    x = torch.ones(3, WIDTH, requires_grad=True)
    ids, far = torch.arange(3), 7 * (rank == 1)
    world = {"rank": (rank + (rank == 1)) % world_size, "world_size": world_size}
    return [
        error_of(SigLipLoss(**world), x, x, 1.0, -1.0, ids=ids),
        error_of(ClipLoss(True, True, **world), x, x, 1.0, ids=ids),
        error_of(DistillClipLoss(True, True, **world), x, x, 1.0, x, x, 1.0),
        error_of(GlobalClipLoss(5, across_ranks=True), x, x, 1.0, ids + far),
        error_of(
            DistillClipLoss(True, True, rank=rank, world_size=world_size), x, x, 1.0, x, x, 1.0,
            logit_bias=torch.ones(1 + (rank == 1)),
        ),
    ]  # fmt: skip


def differing_modules(rank: int, world_size: int) -> list[str]:
    """Errors of global losses, one of which trains, has more samples or is in float64."""
    x, ids = torch.ones(3, WIDTH, requires_grad=True), torch.arange(3)
    return [
        error_of(GlobalClipLoss(5, across_ranks=True).train(rank == 1), x, x, 1.0, ids),
        error_of(GlobalClipLoss(5 + rank, across_ranks=True), x, x, 1.0, ids),
        error_of(
            GlobalClipLoss(5, across_ranks=True).to((torch.float32, torch.float64)[rank]), x, x,
            1.0, ids,
        ),
    ]  # fmt: skip
