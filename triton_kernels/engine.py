"""The Triton engine: `ops.py`'s operators for CUDA tensors.

Nothing here waits for the device: what depends on data (the reference, whether it was enough,
whether one exponential serves) is decided there, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.kept import Weights

from . import card, plan
from .block import Block
from .card import LANES, on_its_device
from .configurations import Config
from .epilogues import EPILOGUES
from .finalise import finish_kernel
from .gradients import Tail, Weighing
from .kept import Kept
from .plan import Chunk, cdiv
from .states import add_moments, add_sums, reference_of, run_sweep, sweep_maxima


@on_its_device
def sweep(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, bound: Tensor | None, offset: int, loss: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep. What it keeps is described in `kept.py`; a small block fills in nothing."""
    block = Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    state, positive = block.new_states()
    keeping = Weights.empty(x, y, keep)
    kept = block.kept(keeping)
    if block.is_small and block.epilogue.needs_state:
        config = block.config("small")
        chunks = plan.sweep(block.n, config, plan.MAXIMA_LAYERS, 0, block.m)
        partial = block.empty(plan.MAXIMA_LAYERS * max(chunk.partials for chunk in chunks))
        sweep_maxima(block, config, chunks, partial, state, positive, kept, None)
    else:
        _sweep(block, bound, state, positive, kept)
    return state, positive, keeping


def _sweep(block: Block, bound: Tensor | None, state: Tensor, positive: Tensor, kept: Kept) -> None:
    """With one reference for all lines, if they have any, and a way out if that is not enough."""
    reference = flag = None
    if block.epilogue.needs_state:
        reference, flag = reference_of(block, bound, kept)
    by_maxima = block.config("tile")

    def prepare(config: Config, keeping: Config) -> tuple[list[Chunk], list[Chunk], Tensor]:
        m, n = block.m, block.n
        chunks = plan.sweep(n, keeping, plan.KEPT_LAYERS, 0, kept.rows, kept=True)
        chunks += plan.sweep(n, config, plan.LAYERS, kept.rows, m)
        again = [] if flag is None else plan.sweep(n, by_maxima, plan.MAXIMA_LAYERS, 0, m)
        sizes = [(plan.KEPT_LAYERS if c.kept else plan.LAYERS) * c.partials for c in chunks]
        sizes += [plan.MAXIMA_LAYERS * chunk.partials for chunk in again]
        return chunks, again, block.empty(max(sizes))

    def first(config: Config) -> None:
        chunks, _, partial = prepare(config, config)
        chunk = chunks[-1] if kept.rows < block.m else chunks[0]
        run_sweep(block, config, chunk, reference, positive, kept, partial)

    def first_kept(config: Config) -> None:
        chunks, _, partial = prepare(config, config)
        run_sweep(block, config, chunks[0], reference, positive, kept, partial)

    kind = "small" if block.is_small else "sweep"
    keeping = block.config(f"kept, {block.loss}", first_kept) if kept.rows else by_maxima
    config = keeping
    if kept.rows < block.m:
        config = block.config(f"{kind}, {block.loss}", first)
    chunks, again, partial = prepare(config, keeping)
    for chunk in chunks:
        chosen = keeping if chunk.kept else config
        run_sweep(block, chosen, chunk, reference, positive, kept, partial)
        add_sums(block, chunk, partial, state, positive, reference, flag)
        if chunk.kept:
            add_moments(block, chunk, partial, kept)
    if flag is not None:
        sweep_maxima(block, by_maxima, again, partial, state, None, kept, flag)


@on_its_device
def finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, loss: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.py`'s finish, in one launch: a small batch waits for launches, not for arithmetic."""
    epilogue, lines = EPILOGUES[loss], state.shape[1]
    state = state if state.stride(1) == 1 else state.contiguous()
    results = tuple(torch.empty_like(state[0]) for _ in range(3))
    card.launch(
        finish_kernel, cdiv(lines, LANES), state, positive.contiguous(), scale,
        bias if epilogue.uses_bias else None, *results, lines, positive.numel(), state.stride(0),
        FINISH=epilogue.finish, LANES=LANES,
    )  # fmt: skip
    return results


@on_its_device
def weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, state: Tensor, positive: Tensor, coefficients: Tensor,
    positive_weight: Tensor, gain: Tensor, kept: Tensor, offset: int, loss: str, needs_x: bool,
    needs_y: bool, project: bool, dtype_x: torch.dtype, dtype_y: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s weigh: a chunk of weights, two products with the features, the next chunk."""
    block = Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    work = Weighing(
        block, state, positive.contiguous(), coefficients, (needs_x, needs_y), block.kept(kept)
    )  # fmt: skip
    dx = block.empty(block.m if needs_x else 0, block.d, dtype=dtype_x)
    dy = block.empty(block.n if needs_y else 0, block.d, dtype=dtype_y)
    product = dy if dtype_y == torch.float32 else block.empty(*dy.shape)
    tail = Tail(work, positive_weight, gain, project, dx, dy)
    last = work.run(block.kind_of_weights, dx, product, tail.finish_rows)
    return dx, dy, tail.finish(last, product)


@on_its_device
def sweep_and_weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, gain: Tensor, offset: int, loss: str, needs_x: bool, needs_y: bool,
    project: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep_and_weigh: every tile is made once, folded and weighed."""
    block = Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    state, positive = block.new_states()
    work = Weighing(block, state, positive, None, (needs_x, needs_y), Kept(), also_fold=True)
    dx = block.empty(block.m if needs_x else 0, block.d)
    dy = block.empty(block.n if needs_y else 0, block.d)
    last = work.run(block.kind_of_weights, dx, dy)
    # Only now the positives, whose weights the gradients wait for, are known.
    _, _, weights = finish(state[:, : block.m], positive, scale, block.bias, loss)
    totals = Tail(work, weights, gain, project, dx, dy).finish(last, dy, every_row=True)
    return state, positive, dx, dy, totals
