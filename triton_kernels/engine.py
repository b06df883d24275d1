"""The Triton engine: `ops.py`'s operators for CUDA tensors.

Nothing here waits for the device: what depends on data (the reference, whether it was enough,
whether one exponential serves) is decided there, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import card, plan
from .block import Block
from .card import LANES, on_its_device
from .configurations import Config
from .epilogues import EPILOGUES
from .finalise import finish_kernel
from .gradients import Tail, Weighing
from .plan import Chunk, cdiv
from .states import add_sums, reference_of, run_sweep, sweep_maxima


@on_its_device
def sweep(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, bound: Tensor | None, offset: int, loss: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep. What it keeps are the leading rows of t, whichever tower is longer."""
    block = Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    state, positive = block.new_states()
    kept = block.empty(keep * min(block.m, block.n))
    reference = flag = None
    if block.epilogue.needs_state:
        reference, flag = reference_of(block, bound)

    by_maxima = block.config("maxima")

    def prepare(config: Config) -> tuple[list[Chunk], list[Chunk], Tensor]:
        chunks = plan.sweep(block.m, block.n, config, 1)
        again = [] if flag is None else plan.sweep(block.m, block.n, by_maxima, 2)
        sizes = [chunk.partials for chunk in chunks] + [2 * chunk.partials for chunk in again]
        return chunks, again, block.empty(max(sizes))

    def first(config: Config) -> None:
        chunks, _, partial = prepare(config)
        run_sweep(block, config, chunks[0], reference, positive, kept, partial)

    config = block.config("sweep" if block.epilogue.is_light else f"sweep, {loss}", first)
    chunks, again, partial = prepare(config)
    for chunk in chunks:
        run_sweep(block, config, chunk, reference, positive, kept, partial)
        add_sums(block, chunk, partial, state, positive, reference, flag)
    if flag is not None:
        sweep_maxima(block, by_maxima, again, partial, state, flag)
    return state, positive, kept


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
        block, state, positive.contiguous(), coefficients, (needs_x, needs_y), kept=kept
    )
    tail = Tail(work, positive_weight, gain, project)
    dx = block.empty(block.m if needs_x else 0, block.d, dtype=dtype_x)
    dy = block.empty(block.n if needs_y else 0, block.d, dtype=dtype_y)
    product = dy if dtype_y == torch.float32 else block.empty(*dy.shape)
    totals = work.run("weigh", dx, product, tail)
    if needs_y:
        tail.finish_columns(product, dy)
    return dx, dy, tail.totals(totals)


@on_its_device
def sweep_and_weigh(
    x: Tensor, y: Tensor, factor_x: Tensor | None, factor_y: Tensor | None, scale: Tensor,
    bias: Tensor | None, gain: Tensor, offset: int, loss: str, needs_x: bool, needs_y: bool,
    project: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.py`'s sweep_and_weigh: every tile is made once, folded and weighed."""
    block = Block(x, y, factor_x, factor_y, scale, bias, offset, loss)
    state, positive = block.new_states()
    work = Weighing(block, state, positive, None, (needs_x, needs_y), also_fold=True)
    dx = block.empty(block.m if needs_x else 0, block.d)
    dy = block.empty(block.n if needs_y else 0, block.d)
    totals = work.run("both", dx, dy, None)
    # Only now the positives, whose weights the gradients wait for, are known.
    _, _, weights = finish(state[:, : block.m], positive, scale, block.bias, loss)
    tail = Tail(work, weights, gain, project)
    if needs_x:
        tail.finish_rows(dx, dx, 0)
    if needs_y:
        tail.finish_columns(dy, dy)
    return state, positive, dx, dy, tail.totals(totals)
