"""Random steps of a soak: a loss or `contrast` with random sizes, dtypes and options.

Step k of a seed is drawn from a generator of its own, so each can be repeated alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from support import family
from support.contrast_case import OPTIONS
from support.family import CASES, Case
from support.hard_inputs import BATCHES
from support.judge import PRECISIONS
from support.statistics_oracle import KINDS

LOSSES = CASES | {"clip": Case("clip_loss"), "siglip": Case("siglip_loss")}
# These losses take one of several equal pairs, or count pairs by a comparison with another pair.
WITHOUT_TIES = ("random", "separated", "cone", "negative")
BATCHES_OF_ANY_WIDTH = ("random", "separated", "duplicates", "dominating", "lengths", "zero_rows")
SCALES = (14.3, 1.0, 100.0, -5.0, 0.0, 1e-3, 1e4)


class Step(NamedTuple):
    """A call: what it computes, on what, and how."""

    name: str  # in LOSSES, or in contrast_case.OPTIONS
    is_contrast: bool
    kind: str  # of statistics
    shape: tuple[int, int, int]  # M, N and D; a loss has its own N
    batch_name: str
    scale: float
    precision: str
    normalize: bool
    reduction: str
    backend: str | None
    memory_budget: int | None
    cuts: tuple[int, ...]  # the bounds of live slices; empty: all pairs are live
    threads: int
    callers: int  # Python threads that make the same call at the same time
    seed: int

    @property
    def case(self) -> Case:
        return LOSSES[self.name]

    def arrays(self) -> family.Arrays:
        """The arrays of a loss."""
        m, _, d = self.shape
        rng = np.random.default_rng(self.seed)
        x, y = (t.astype(np.float32).astype(float) for t in BATCHES[self.batch_name](rng, m, d))
        return family.arrays(self.case, x, y, self.scale, seed=self.seed)

    def upstream(self) -> Any:
        """The upstream gradient of a loss, of either sign for the reduction "none"."""
        if self.reduction != "none":
            return 1.0
        rng = np.random.default_rng(self.seed + 1)
        return rng.normal(size=self.shape[0]).astype(np.float32).astype(float)


def pick(rng: Generator, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


def size(rng: Generator, most: int, least: int = 1) -> int:
    """A size; small ones are as likely as large ones."""
    return int(np.exp(rng.uniform(np.log(least), np.log(most + 1))))


def draw(seed: int, k: int, engines: dict[str | None, float]) -> Step:
    """Returns step k of a seed. engines: the backends with their shares."""
    rng = np.random.default_rng([seed, k])
    is_contrast = rng.random() < 0.2
    backend = list(engines)[rng.choice(len(engines), p=list(engines.values()))]
    name = pick(rng, OPTIONS if is_contrast else LOSSES)
    large = rng.random() < 0.02 and backend in ("cpu", None)
    m, n, d = size(rng, 200), size(rng, 200), size(rng, 160)
    if large:  # several strips and tiles; gradients of a MiB and more
        m, n, d = (int(rng.integers(*bounds)) for bounds in ((700, 1600), (700, 1600), (180, 400)))
    if backend == "triton":  # interpreted
        m, n, d = min(m, 40), min(n, 40), min(d, 40)
    precision = pick(rng, PRECISIONS)
    decides = not is_contrast and decides_by_comparison(LOSSES[name])
    batch_name = pick(rng, WITHOUT_TIES if decides else BATCHES if d > 2 else BATCHES_OF_ANY_WIDTH)
    # Gradients in float16 overflow at a scale of 1e4, and are denormal at 1e-3.
    scale = pick(rng, SCALES[:5] if precision == "float16" else SCALES)
    live = name in ("clip", "siglip") and not is_contrast and backend != "reference"
    normalize = batch_name == "zero_rows" or bool(rng.random() < 0.4)
    if normalize:  # at D = 1 all gradients cancel
        d = max(d, 2)
    cuts = ()
    if live and rng.random() < 0.3:
        inner = sorted(set(rng.integers(1, m + 1, 2).tolist()) - {m})
        cuts = (0, *inner, m)
    return Step(
        name, is_contrast, pick(rng, KINDS), (m, n, max(d, 4) if decides else d), batch_name, scale,
        precision, normalize,
        "mean" if cuts else pick(rng, ("mean", "sum", "none")), backend,
        pick(rng, (None, 0, size(rng, 4 * m * n))), cuts, int(rng.integers(1, 5)),
        1 if backend == "triton" else int(rng.choice(3, p=(0.8, 0.1, 0.1))) + 1,
        int(rng.integers(1 << 31)),
    )  # fmt: skip


def decides_by_comparison(case: Case) -> bool:
    return case.loss == "ranking_loss" or "false_negative_margin" in case.options
