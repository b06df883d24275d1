"""Random losses of batches that are spread over ranks, and the same losses of one process."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from soak.drawn import LOSSES, decides_by_comparison, pick, size
from support import family
from support.judge import PRECISIONS, Precision

from fastclip import distributed

ROWS = ("x", "x_ids", "classes", "weights", "teacher_x", "labels")
COLUMNS = ("y", "y_ids", "key_bias", "teacher_y")
CPU = torch.device("cpu")
Results = dict[str, torch.Tensor]


class Spread(NamedTuple):
    """A loss, its batch, and what each rank does with its part."""

    name: str
    sizes: tuple[int, ...]
    width: int
    precision: str
    scale: float
    normalize: bool
    reduction: str
    ring: bool
    uneven: bool
    backends: tuple[str | None, ...]  # of each rank: these need not agree
    budgets: tuple[int | None, ...]
    threads: tuple[int, ...]
    seed: int

    @property
    def case(self) -> family.Case:
        """The case without keys beyond the queries, and without offsets: ranks own their keys."""
        case = LOSSES[self.name]
        options = {k: v for k, v in case.options.items() if k != "offset" or v is None}
        return case._replace(options=options, more_keys=0)

    @property
    def p(self) -> Precision:
        return PRECISIONS[self.precision]

    def part(self, rank: int) -> slice:
        return slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def arrays(self) -> family.Arrays:
        """The whole batch. Labels are columns of their row's rank."""
        rng, n = np.random.default_rng(self.seed), sum(self.sizes)
        x, y = rng.normal(size=(2, n, self.width)) / np.sqrt(self.width)
        x, y = (t.astype(np.float32).astype(float) for t in (x, y))
        given = family.arrays(self.case, x, y, self.scale, seed=self.seed)
        starts = np.repeat([self.part(k).start for k in range(len(self.sizes))], self.sizes)
        labels = starts + (np.arange(n) * 3 + 1) % np.repeat(self.sizes, self.sizes)
        if "labels" in self.case.given:
            given["x_ids"] = given["y_ids"][labels]
        return given | {"labels": labels}

    def own_arrays(self, rank: int) -> family.Arrays:
        given, mine = self.arrays(), self.part(rank)
        own = {k: v[mine] if k in (*ROWS, *COLUMNS) else v for k, v in given.items()}
        return own | {"labels": own["labels"] - mine.start}

    def upstream(self) -> Any:
        if self.reduction != "none":
            return 1.0
        rng = np.random.default_rng(self.seed + 1)
        return rng.normal(size=sum(self.sizes)).astype(np.float32).astype(float)

    def own_upstream(self, rank: int) -> Any:
        upstream = self.upstream()
        return upstream[self.part(rank)] if self.reduction == "none" else upstream

    def differentiates(self, name: str) -> bool:
        # Across ranks a mean has no gradient of weights.
        return name in self.case.leaves and (name != "weights" or self.reduction != "mean")


def draw(rng: np.random.Generator, ranks: int) -> Spread:
    name = pick(rng, LOSSES)
    uneven = bool(rng.random() < 0.5)
    if uneven:
        sizes = tuple(0 if rng.random() < 0.1 else size(rng, 24) for _ in range(ranks))
        sizes = sizes if sum(sizes) > 1 else (3, *sizes[1:])
    else:
        sizes = (size(rng, 24),) * ranks
    width = size(rng, 64, 4 if decides_by_comparison(LOSSES[name]) else 1)
    return Spread(
        name, sizes, width, pick(rng, PRECISIONS), pick(rng, (14.3, 1.0, 100.0, -5.0)),
        bool(rng.random() < 0.4), pick(rng, ("mean", "sum", "none")), bool(rng.random() < 0.5),
        uneven, *zip(*((
            pick(rng, ("cpu", "cpu", "torch", None)), pick(rng, (None, 0, 4096)),
            int(rng.integers(1, 3)),
        ) for _ in range(ranks)), strict=True), int(rng.integers(1 << 31)),
    )  # fmt: skip


def leaves(spread: Spread, given: family.Arrays) -> Results:
    t = family.tensors(spread.case, given, spread.p, CPU)
    return {k: v if spread.differentiates(k) else v.detach() for k, v in t.items()}


def forward(spread: Spread, rank: int, t: Results, group: Any, **changed: Any) -> torch.Tensor:
    options = {
        "normalize": spread.normalize, "reduction": spread.reduction, "ring": spread.ring,
        "uneven": spread.uneven, "backend": spread.backends[rank],
        "memory_budget": spread.budgets[rank], "process_group": group,
    } | changed  # fmt: skip
    with spread.p.context(CPU):
        return family.call(spread.case, distributed, t, **options)


def backward(spread: Spread, rank: int, t: Results, value: torch.Tensor) -> Results:
    """Returns the value and the gradients, before any sum over ranks."""
    wanted = [k for k in spread.case.leaves if t[k].requires_grad]
    g = torch.as_tensor(np.asarray(spread.own_upstream(rank))).to(value).expand(value.shape)
    found = torch.autograd.grad(value, [t[k] for k in wanted], g, allow_unused=True)
    gradients = {
        f"d{k}": torch.zeros_like(t[k]) if d is None else d
        for k, d in zip(wanted, found, strict=True)
    }
    return {"loss": value.detach(), **gradients}


def joined(spread: Spread, found: list[Results]) -> Results:
    """The ranks' results after the mean over ranks, put together as one process's."""
    whole, ranks = {}, len(found)
    share = 1 if spread.reduction == "none" else ranks
    for name in found[0]:
        parts = [of_rank[name] for of_rank in found]
        apart = name[1:] in (*ROWS, *COLUMNS) or (name == "loss" and spread.reduction == "none")
        if apart:
            whole[name] = torch.cat(parts)
            whole[name] = whole[name] / share if name != "loss" else whole[name]
        else:
            whole[name] = (sum(t.double() for t in parts) / share).to(parts[0].dtype)
    return whole
