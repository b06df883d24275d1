"""Ranks and metrics of retrieval among the features of all processes.

Each rank compares its own queries with all keys, which are gathered: O(N D) memory. Counts of keys
add up over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.compile_marks import no_compile
from ..retrieval.metrics import Features, as_metrics, check_partners, pairs_of, sign_of
from ..retrieval.own import Own, own_partners
from ..retrieval.ranks import Ranks, count, without_strays
from ..retrieval.sides import Sides, sides_of
from .agreement import Call, agree_on_sides, announced
from .shard import Shard, starts_of


@no_compile
def ranks(
    queries: Tensor,  # (m, D)
    keys: Tensor,  # (n, D)
    *,
    ids: tuple[Tensor, Tensor] | None = None,
    columns: bool = True,
    normalize: bool = False,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Ranks:
    """`fastclip.retrieval.ranks` of this rank's queries among the keys of all ranks, and of this
    rank's keys among the queries of all.

    Concatenated over ranks, the results are those of one process. The numbers of queries and keys
    may differ from rank to rank; without ids each rank has as many queries as keys, which are
    pairs.

    Args:
        queries, keys, columns, normalize, backend: as in `fastclip.retrieval.ranks`.
        ids: (query_ids (m), key_ids (n)), which mean the same on all ranks.
        process_group: the ranks; None: all.

    Raises, on every rank:
        TypeError, ValueError: as in `fastclip.retrieval.ranks`; options, widths or dtypes that
            differ between ranks.
    """
    sides, shard, first = _begin(queries, keys, ids, columns, normalize, backend, process_group)
    with torch.no_grad(), torch.autocast(sides.device.type, enabled=False):
        of_rows = own_partners(sides)
        if not columns:
            return without_strays(count(sides, of_rows, None), of_rows, None)
        of_columns = _own_of_all(sides, shard, first)
        found = count(sides, of_rows, of_columns, first)
        shard.sum(found.columns)
        found = without_strays(found, of_rows, of_columns)
        return found._replace(columns=found.columns[shard.mine])


@no_compile
def metrics(
    image_features: Features,  # (m, D)
    text_features: Features,  # (n, D)
    logit_scale: Tensor | float | None = None,
    image_key: str = "image",
    text_key: str = "text",
    retrieval_chunk_size: int | None = None,
    retrieval_device: torch.device | str | None = None,
    retrieval_dtype: torch.dtype | str | None = torch.float32,
    *,
    ids: tuple[Tensor, Tensor] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    normalize: bool = False,
    backend: str | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """`fastclip.retrieval.metrics` of the pairs of all ranks: the same numbers on every rank.

    Each rank passes its own features, in any numbers, and ids that mean the same on all ranks.

    Raises, on every rank:
        TypeError, ValueError: as in `fastclip.retrieval.metrics`; options, widths or dtypes that
            differ between ranks.
    """
    images, texts, ids = announced(
        process_group,
        lambda: pairs_of(
            image_features, text_features, logit_scale, retrieval_device, retrieval_dtype, ids
        ),
    )
    found = ranks(
        images, texts, ids=ids, normalize=normalize, backend=backend, process_group=process_group
    )
    signs = {"sign of logit_scale": 1 + int(sign_of(logit_scale, images))}
    call = Call("metrics()", False, True, signs)
    shard = agree_on_sides(process_group, images, texts, None, call)
    everywhere = Ranks(
        _of_rows(shard, len(images), found.rows.device).gather(found.rows),
        shard.gather(found.columns),
    )
    check_partners(everywhere)
    return as_metrics(everywhere, image_key, text_key, ks)


def _begin(
    queries: Tensor, keys: Tensor, ids: Any, columns: bool, normalize: bool, backend: str | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[Sides, Shard, int]:  # fmt: skip
    """Returns this rank's queries with the keys of all ranks, the shard of the keys, and the number
    of the first query."""

    def check() -> Sides:
        sides = sides_of(queries, keys, ids, 0, normalize, backend)
        if ids is None and len(queries) != len(keys):
            raise ValueError(
                "queries and keys of a rank must be pairs, or ids must be given, got "
                f"{len(queries)} and {len(keys)} of them"
            )
        return sides

    own = announced(process_group, check)
    options = {
        "ids": int(ids is not None), "columns": int(columns), "normalize": int(normalize)
    }  # fmt: skip
    call = Call("ranks()", False, True, options)
    shard = agree_on_sides(process_group, own.x, own.y, None, call)
    first = _of_rows(shard, len(own.x), own.device).start
    everywhere = None
    if ids is not None:
        everywhere = ids[0], shard.gather(ids[1].contiguous())
    offset = first if ids is None else 0
    sides = sides_of(own.x, shard.gather(own.y), everywhere, offset, False, backend)
    return sides, shard, first


def _of_rows(shard: Shard, rows: int, device: torch.device) -> Shard:
    """The shard of the queries."""
    sizes = tuple(shard.gather_scalar(torch.tensor(rows, device=device)).tolist())
    return shard._replace(sizes=sizes, starts=starts_of(sizes))


def _own_of_all(sides: Sides, shard: Shard, first: int) -> Own:
    """The own queries of all keys, among those of all ranks: the best, of equals the first."""
    mine = own_partners(sides.swapped())
    none = mine.index < 0
    score = torch.where(none, -torch.inf, mine.score)
    best = shard.max(score.clone())
    nowhere = torch.iinfo(torch.int64).max
    index = torch.where(none | (score < best), nowhere, mine.index + first)
    index = -shard.max(-index)
    missing = index == nowhere
    return Own(torch.where(missing, -1, index), torch.where(missing, torch.inf, best))
