"""Hard negatives, drawn from the softmax of the logits: a dense stand-in with an M x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sample_negatives(
    x: Tensor,  # (M, D)
    y: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    *,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    seed: int,
    columns: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draws a negative y for each row of x, and a negative x for each row of y.

    Args:
        x, y: (M, D) and (N, D); rows with the same index are a pair.
        logit_scale: multiplies the similarities, as in `clip_loss`.
        ids: (x ids (M), y ids (N)), integers, or one tensor for both: pairs with equal ids are no
            negatives.
        seed: of the draw.
        columns: whether to draw for the rows of y.

    Returns:
        (indices into y (M), indices into x (N) or None), int64.

    Raises:
        ValueError: a row has no negative.
    """
    logits = float(logit_scale) * x.float() @ y.float().T
    own = torch.eye(*logits.shape, dtype=torch.bool, device=x.device)
    if ids is not None:
        x_ids, y_ids = (ids, ids) if isinstance(ids, Tensor) else ids
        own |= x_ids[:, None] == y_ids
    logits = logits.masked_fill(own, -torch.inf)
    sides = (logits, logits.T) if columns else (logits,)
    if any(side.isneginf().all(dim=1).any() for side in sides):
        raise ValueError("every row must have a negative, got one without")
    generator = torch.Generator().manual_seed(seed)
    # The draw runs on the CPU, where a seed has the same meaning with any device.
    drawn = [
        torch.multinomial(side.softmax(dim=1).cpu(), 1, generator=generator)[:, 0].to(x.device)
        for side in sides
    ]
    return (drawn[0], drawn[1]) if columns else (drawn[0], None)
