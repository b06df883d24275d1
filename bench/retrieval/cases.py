"""The cases: a task of retrieval, its size, and the methods that do it.

"product" is the library product of all scores alone, in chunks of rows: the limit. "chunked" is
what one writes without fastclip: torch.topk, or a softmax and torch.multinomial, on each chunk.
"open_clip" is the trainer's `get_clip_metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import retrieval

from ..methods.open_clip import import_module

Step = Callable[[], object]
CHUNK = 1 << 24  # scores


@dataclass(frozen=True)
class Case:
    task: str  # a key of TASKS
    m: int
    n: int
    d: int = 512
    dtype: str = "float32"
    k: int = 0
    methods: tuple[str, ...] = ("product", "chunked", "fastclip")

    @property
    def name(self) -> str:
        """The name that `--only` is matched against."""
        text = f"{self.task} {self.k}" if self.k else self.task
        return f"{text} {self.m} x {self.n} x {self.d} {self.dtype}"


def make_step(case: Case, method: str) -> Step:
    generator = torch.Generator().manual_seed(case.n)
    x, y = (
        F.normalize(torch.randn(rows, case.d, generator=generator), dim=1)
        .to(getattr(torch, case.dtype))
        for rows in (case.m, case.n)
    )  # fmt: skip
    if method == "product":
        return lambda: _chunks(x, y, lambda scores, start: None)
    return TASKS[case.task][method](x, y, case.k)


def _chunks(x: Tensor, y: Tensor, use: Callable[[Tensor, int], object]) -> None:
    rows = max(1, CHUNK // len(y))
    out = x.new_empty(rows, len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        use(torch.mm(part, y.T, out=out[: len(part)]), start)


def _topk_chunked(x: Tensor, y: Tensor, k: int) -> Step:
    return lambda: _chunks(x, y, lambda scores, start: scores.topk(k, 1))


def _drawn_chunked(x: Tensor, y: Tensor, k: int) -> Step:
    def draw(scores: Tensor, start: int) -> Tensor:
        scores *= 14.3
        rows = torch.arange(len(scores))
        scores[rows, rows + start] = -torch.inf
        return scores.softmax(1).multinomial(1)

    def both() -> None:
        _chunks(x, y, draw)
        _chunks(y, x, draw)

    return both


def _open_clip(x: Tensor, y: Tensor, k: int) -> Step:
    trainer = import_module("open_clip_train.train")
    return lambda: trainer.get_clip_metrics(x, y, torch.tensor(100.0))


TASKS: dict[str, dict[str, Callable[[Tensor, Tensor, int], Step]]] = {
    "metrics": {
        "open_clip": _open_clip,
        "fastclip": lambda x, y, k: lambda: retrieval.metrics(x, y, retrieval_dtype=None),
    },
    "topk": {
        "chunked": _topk_chunked,
        "fastclip": lambda x, y, k: lambda: retrieval.topk(x, y, k),
    },
    "sample_negatives": {
        "chunked": _drawn_chunked,
        "fastclip": lambda x, y, k: lambda: retrieval.sample_negatives(x, y, 14.3),
    },
}  # fmt: skip
BESIDE, ALONE = ("product", "open_clip", "fastclip"), ("product", "fastclip")


def standard() -> list[Case]:
    """A quarter of an hour on two cores."""
    return [
        Case("metrics", 5_000, 5_000, methods=BESIDE),
        Case("metrics", 20_000, 20_000, methods=BESIDE),
        Case("metrics", 20_000, 20_000, dtype="bfloat16", methods=ALONE),
        Case("metrics", 50_000, 50_000, methods=ALONE),
        Case("topk", 10_000, 50_000, k=10),
        Case("topk", 10_000, 50_000, k=100),
        Case("sample_negatives", 8_192, 8_192),
    ]


def quick() -> list[Case]:
    """A plan of seconds, to check the benchmark itself."""
    return [
        Case("metrics", 1_000, 1_000, methods=ALONE), Case("topk", 500, 2_000, k=10),
        Case("sample_negatives", 500, 500),
    ]  # fmt: skip
