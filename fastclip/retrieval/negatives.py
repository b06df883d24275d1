"""Hard negatives, drawn from the softmax of the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..engine.checks import scalar
from ..engine.compile_marks import no_compile
from . import operators
from .chunks import chunks_of
from .noise import gumbel, line_keys
from .scores import norms
from .sides import Sides, sides_of


@no_compile
def sample_negatives(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: Tensor | float,
    *,
    offset: int | None = 0,
    ids: tuple[Tensor, Tensor] | None = None,
    seed: int | None = None,
    columns: bool = True,
    normalize: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns a column drawn for each row from the softmax of its negatives, and a row drawn for
    each column: the hard negatives of a matching head (ALBEF, arXiv 2107.07651, section 3.2).

        sample_negatives(x, y, logit_scale)

    draws from the same distributions as

        logits = (logit_scale * x @ y.T).fill_diagonal_(-math.inf)
        logits.softmax(1).multinomial(1)[:, 0], logits.softmax(0).T.multinomial(1)[:, 0]

    in memory O(M + N). Gumbel's trick makes both draws in one sweep: a draw is the largest logit
    plus noise that depends on the seed and the pair alone. All draws are independent.

    Args:
        x, y: float64, float32, bfloat16 or float16, any strides; mixed dtypes promote.
        logit_scale: already exponentiated; a number or a tensor of one element.
        offset: the own positive of row i, which is never drawn, is column i + offset; None: no row
            has one.
        ids: (x_ids (M), y_ids (N)), integers. Pairs with equal ids are not drawn.
        seed: an integer, another one in each step of a training. Equal seeds give equal draws, on
            any number of threads. None: torch's default generator draws one.
        columns: whether to draw for the columns, too.
        normalize: divide features by max(norm, 1e-12) first.
        backend: as in `clip_loss`.

    Returns:
        rows (M) and columns (N), int64; -1 for a line without negatives. columns is None if not
        wanted.

    Raises:
        TypeError: features or ids that are not tensors, or have another dtype.
        ValueError: shapes or devices that do not fit, features, a scale or logits that are not
            finite, a backend that cannot run here.
    """
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
    sides = sides_of(x, y, ids, offset or 0, normalize, backend, ("x", "y"))
    scale = scalar("logit_scale", logit_scale, sides.x).detach().item()
    if not math.isfinite(scale):
        raise ValueError(f"logit_scale must be finite, got {scale}")
    _check_logits(sides, scale)
    own = offset is not None
    with torch.no_grad(), torch.autocast(sides.device.type, enabled=False):
        if sides.compiled:
            rows, of_columns = operators.draw(
                sides.x, sides.y, scale, seed, sides.ids_x, sides.ids_y, own, sides.offset, columns
            )
        else:
            rows, of_columns = _drawn(sides, scale, seed, own, columns)
    return rows, of_columns if columns else None


def _check_logits(sides: Sides, scale: float) -> None:
    """Checks that no logit overflows float32, in which the noise is added."""
    if sides.is_empty:
        return
    x, y = (norms(t).max().item() for t in sides[:2])
    if not max(1.0, abs(scale)) * x * y < torch.finfo(torch.float32).max / 4:
        raise ValueError(
            f"logits must be finite in float32, got features of norms {x:.1e} and {y:.1e} and the "
            f"scale {scale:.1e}"
        )


def _drawn(
    sides: Sides, scale: float, seed: int, own: bool, draws_columns: bool
) -> tuple[Tensor, Tensor]:
    m, n, device = len(sides.x), len(sides.y), sides.device
    rows, columns = (torch.full((k,), -1, dtype=torch.int64, device=device) for k in (m, n))
    highest = torch.full((n,), -torch.inf, device=device)
    if sides.is_empty:
        return rows, columns
    keys = torch.arange(n, device=device)
    column_keys = line_keys(seed, True, keys)
    # The integers of the noise take eight times the memory of the products.
    for part, t in chunks_of(sides, 8):
        queries = torch.arange(part.start, part.stop, device=device)
        logits = (t * scale).float()
        if own:
            logits[queries[:, None] + sides.offset == keys] = -torch.inf
        if sides.ids_x is not None:
            logits[sides.ids_x[part, None] == sides.ids_y] = -torch.inf
        row_keys = tuple(k[:, None] for k in line_keys(seed, False, queries))
        found, places = (logits + gumbel(keys, row_keys)).max(1)
        rows[part] = torch.where(found > -torch.inf, places, -1)
        if not draws_columns:
            continue
        found, places = (logits + gumbel(queries[:, None], column_keys)).max(0)
        better = found > highest
        columns[better] = places[better] + part.start
        highest = torch.maximum(highest, found)
    return rows, columns
