"""The hardest negative of each line: the largest similarity, found without the matrix.

This is plain PyTorch, in chunks of rows: library products, and a maximum with its place for each
row and column of a chunk. Nothing differentiates through the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block import Block
from .chunked_block import ChunkedBlock


def hardest(block: Block, columns: bool) -> list[Tensor]:
    """Returns for each row (M) the column and, if `columns`, for each column (N) the row of its
    negative with the largest t; the first one of equals, -1 for a line without negatives."""
    chunked, (m, n) = ChunkedBlock(block), block.sizes()
    device, dtype = block.x.features.device, chunked.dtype
    of_rows = torch.full((m,), -1, dtype=torch.int64, device=device)
    of_columns = torch.full((n,), -1, dtype=torch.int64, device=device)
    highest = torch.full((n,), -torch.inf, dtype=dtype, device=device)
    for chunk in chunked.chunks() if n else ():
        t = chunked.t(chunk)
        t = torch.where(chunked.pairs(chunk, t, None).rows, t, -torch.inf)
        found, places = t.max(1)
        places = torch.where(found == -torch.inf, -1, places)
        # Not in place, since torch.vmap cannot write samples to a tensor without any. A list of the
        # chunks' places would split the allocator's heap: 1.7 GiB for 65536 rows.
        of_rows = of_rows.slice_scatter(places, 0, chunk.start, chunk.stop)
        if columns:
            found, places = t.max(0)
            # The first of equal rows stays. NaN counts as the largest, as in torch.
            larger = (found > highest) | (found.isnan() & ~highest.isnan())
            highest = torch.where(larger, found, highest)
            of_columns = torch.where(larger, places + chunk.start, of_columns)
    return [of_rows, of_columns] if columns else [of_rows]
