"""The checked arguments that retrieval functions share: two sides of features, ids, the engine."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import pairs
from ..engine.backends import choose
from ..engine.checks import check_ids, check_integers, check_offset, check_sides, check_tensor
from ..engine.dtypes import accumulation_dtype
from ..engine.tiny_norms import EPS

NAMES = ("queries", "keys")
LARGEST_NORM = 1e154  # scores of float64 features stay finite


class Sides(NamedTuple):
    """Queries x (M, D) and keys y (N, D) of one dtype, detached, and their ids or None."""

    x: Tensor
    y: Tensor
    ids_x: Tensor | None  # (M), (N): int32 codes, equal where the ids are
    ids_y: Tensor | None
    offset: int
    engine: str
    pairs: Tensor | None = None  # (P, 2): queries and keys that belong together

    @property
    def compiled(self) -> bool:
        """True if the CPU engine's operators serve, which take no empty sides."""
        return self.engine == "cpu" and not self.is_empty

    @property
    def is_empty(self) -> bool:
        return self.x.numel() == 0 or self.y.numel() == 0

    @property
    def device(self) -> torch.device:
        return self.x.device

    def swapped(self) -> Sides:
        pairs = None if self.pairs is None else self.pairs.flip(1)
        return Sides(self.y, self.x, self.ids_y, self.ids_x, -self.offset, self.engine, pairs)

    def own(self) -> Tensor:
        """Returns the key of each query by the offset, (M) int64, -1 for a query without one."""
        columns, inside = pairs.partners(len(self.x), len(self.y), self.offset, self.device)
        return torch.where(inside, columns, -1)


def check_finite(name: str, features: Tensor) -> None:
    """Checks features for NaN and infinities, whose scores have no order."""
    if torch.isfinite(features.sum()):  # one pass, without a mask, where all is well
        return
    if bool(torch.isfinite(features).all()):
        return  # the sum overflowed
    row = int((~torch.isfinite(features)).any(1).nonzero()[0])
    value = features[row][~torch.isfinite(features[row])][0].item()
    raise ValueError(f"{name} must be finite, got {value} in row {row}")


def check_pairs(pairs: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Checks the indices of queries and keys that belong together; returns them as int64."""
    check_tensor("pairs", pairs)
    check_integers("pairs", pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.device != x.device:
        raise ValueError(
            f"pairs must be (P, 2) on {x.device}, got {tuple(pairs.shape)} on {pairs.device}"
        )
    limits = torch.tensor([len(x), len(y)], device=pairs.device)
    if bool(((pairs < 0) | (pairs >= limits)).any()):
        raise ValueError(
            f"pairs must be queries below {len(x)} and keys below {len(y)}, got "
            f"{pairs.amin(0).tolist()} to {pairs.amax(0).tolist()}"
        )
    return pairs.long()


def check_norms(name: str, features: Tensor) -> None:
    """Checks that scores of float64 features are finite. Others cannot overflow in float64."""
    if features.dtype != torch.float64 or features.numel() == 0:
        return
    largest = torch.linalg.vector_norm(features, dim=1).max().item()
    if largest > LARGEST_NORM:
        raise ValueError(f"{name} must have norms of at most {LARGEST_NORM}, got {largest}")


def _unit(x: Tensor) -> Tensor:
    """`F.normalize(x, dim=1, eps=EPS)` for norms that overflow or underflow, too."""
    largest = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    scaled = x / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return torch.where(norm * largest > EPS, scaled / norm, x / EPS)


def sides_of(
    queries: Tensor, keys: Tensor, ids: Any, offset: int, normalize: bool, backend: str | None,
    names: tuple[str, str] = NAMES,
) -> Sides:  # fmt: skip
    """Checks the arguments and returns the sides. Integer ids of any size become codes.

    Raises:
        TypeError: features or ids that are not tensors of the right dtypes.
        ValueError: shapes or devices that differ, values that are not finite, a backend that cannot
            run here.
    """
    check_sides(queries, keys, may_be_empty=True, names=names)
    for name, features in zip(names, (queries, keys), strict=True):
        if features.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got {features.layout}")
    if offset is None:
        raise TypeError("offset must be an int, got None")
    check_offset(offset)
    ids = check_ids(ids, "ignore", queries, keys)
    for name, features in zip(names, (queries, keys), strict=True):
        check_finite(name, features.detach())
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    x, y = (t.detach().to(dtype) for t in (queries, keys))
    if normalize:
        # Half-precision norms would round the scores.
        x, y = (_unit(t.to(accumulation_dtype(t))) for t in (x, y))
    for name, features in zip(names, (x, y), strict=True):
        check_norms(name, features)
    codes = (None, None) if ids is None else pairs.codes_of(*ids)
    engine = choose(backend, x.device, x.dtype, len(x) * len(y), x.shape[1], "hinge")
    return Sides(x, y, *codes, offset, engine)
