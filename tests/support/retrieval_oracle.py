"""Retrieval over a dense matrix of scores, and inputs on which rounding and ties decide."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_scores(x: Tensor, y: Tensor) -> Tensor:
    """Scores (M, N) in float64, each summed in the same order, so that equal features tie."""
    return torch.stack([(row * y.double()).sum(1) for row in x.double()])


def dense_ranks(x: Tensor, y: Tensor, offset: int = 0, ids: tuple | None = None) -> list[int]:
    """The ranks of queries, by sorting: -1 without an own key."""
    found = []
    for i, scores in enumerate(dense_scores(x, y)):
        order = sorted(range(len(y)), key=lambda j: (-float(scores[j]), j))
        if ids is not None:
            own = [j for j in order if ids[0][i] == ids[1][j]]
            others = [j for j in order if ids[0][i] != ids[1][j]]
            best = (-float(scores[own[0]]), own[0]) if own else None
            found.append(sum((-float(scores[j]), j) < best for j in others) if own else -1)
        else:
            found.append(order.index(i + offset) if 0 <= i + offset < len(y) else -1)
    return found


def dense_topk(
    x: Tensor, y: Tensor, k: int, allowed: Callable[[int, int, float], bool]
) -> tuple[Tensor, Tensor]:
    """Scores (M, k) in float64 and indices; -inf and -1 beyond the last allowed key."""
    scores = torch.full((len(x), k), -torch.inf, dtype=torch.float64)
    indices = torch.full((len(x), k), -1)
    for i, row in enumerate(dense_scores(x, y)):
        keys = [j for j in range(len(y)) if allowed(i, j, float(row[j]))]
        order = sorted(keys, key=lambda j: (-float(row[j]), j))[:k]
        scores[i, : len(order)] = row[order]
        indices[i, : len(order)] = torch.tensor(order, dtype=torch.int64)
    return scores, indices


def features(kind: str, count: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Features of a kind, (count, width)."""
    g = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(count, width, generator=g, dtype=torch.float64), dim=1)
    if kind == "near":  # scores differ in float32's last digits
        x = F.normalize(x[:1] + 1e-7 * x, dim=1)
    elif kind == "integers":  # many exact ties
        x = torch.randint(-1, 2, (count, width), generator=g).double()
    elif kind == "duplicates":
        x = x[torch.randint(0, max(1, count // 4), (count,), generator=g)]
    elif kind == "alike":
        x = x[:1].expand(count, width).clone()
    elif kind == "zeros":
        x = torch.where(torch.rand(count, width, generator=g) < 0.5, 0.0, -0.0).double()
    elif kind == "large":  # products overflow in float32
        x = x * 1e25
    return x.to(dtype)


KINDS = ("random", "near", "integers", "duplicates", "alike", "zeros", "large")
