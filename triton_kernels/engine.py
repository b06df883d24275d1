"""The Triton engine: the operators of `fastclip.engine.operators` for CUDA tensors.

Nothing here waits for the device. The device itself computes the shift, finds out whether one shift
serves all lines, and sets the flags by which kernels work or return at once. Every call can
therefore be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.block import Block, SweepResults, Upstream, Wanted
from ..engine.kept import Weights
from ..kinds import kind_of
from . import launch, plan
from .complete import Completion
from .configurations import Config
from .first_sweep import add_moments, add_sums, run_sweep, shift_of, sweep_apart
from .kept import Kept
from .kernels.finalise import finish_kernel
from .kinds import functions_of
from .launch import LANES, on_its_device
from .logit_block import LogitBlock
from .plan import Chunk, cdiv
from .second_sweep import Weighing


@on_its_device
def sweep(
    block: Block, bound: Tensor | None, occupied: Tensor | None, levels: Tensor | None, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the first sweep. `kept.py` describes what it keeps; small blocks, kinds with levels and
    blocks with targets keep nothing."""
    kept_tensor = Weights.empty(block.x.features, block.y.features, keep)
    block = LogitBlock(block)
    state, positive = block.new_states()
    kept = block.kept(kept_tensor)
    if block.has_own_numbers:
        config = block.config(block.kernel_of_lines)
        layers = block.layers_apart
        chunks = plan.sweep_chunks(block.n, config, layers, 0, block.m)
        partial = block.empty(layers * max(chunk.partials for chunk in chunks))
        levels = None if levels is None else levels.contiguous()
        sweep_apart(block, config, chunks, partial, state, positive, levels, kept, None)
    else:
        occupied = None if occupied is None else occupied.contiguous().view(torch.uint8)
        _sweep(block, bound, occupied, state, positive, kept)
    return state, positive, kept_tensor


def _sweep(
    block: LogitBlock, bound: Tensor | None, occupied: Tensor | None, state: Tensor,
    positive: Tensor, kept: Kept,
) -> None:  # fmt: skip
    """Sweeps with one shift for all lines, or without a shift. For a kind with a shift it launches
    a second sweep, with a shift for each line, which works only if the device finds that one shift
    was too coarse."""
    shift = flag = None
    if block.kind.has_shift:
        shift, flag = shift_of(block, bound, kept)
    apart_config = block.config(block.kernel_of_lines)
    layers, apart_layers = plan.LAYERS * block.folds, plan.APART_LAYERS * block.folds

    def prepare(config: Config, keep_config: Config) -> tuple[list[Chunk], list[Chunk], Tensor]:
        m, n = block.m, block.n
        chunks = plan.sweep_chunks(n, keep_config, plan.KEPT_LAYERS, 0, kept.rows, kept=True)
        chunks += plan.sweep_chunks(n, config, layers, kept.rows, m)
        again = [] if flag is None else plan.sweep_chunks(n, apart_config, apart_layers, 0, m)
        sizes = [(plan.KEPT_LAYERS if c.kept else layers) * c.partials for c in chunks]
        sizes += [apart_layers * chunk.partials for chunk in again]
        return chunks, again, block.empty(max(sizes))

    def first(config: Config) -> None:
        chunks, _, partial = prepare(config, config)
        run_sweep(block, config, chunks[-1], shift, positive, kept, partial)

    def first_kept(config: Config) -> None:
        chunks, _, partial = prepare(config, config)
        run_sweep(block, config, chunks[0], shift, positive, kept, partial)

    keep_config = apart_config
    if kept.rows:
        keep_config = block.config(block.kernel_of_keeping, first_kept, "keeping")
    config = keep_config
    if kept.rows < block.m:
        config = block.config(block.kernel_of_sums, first)
    chunks, again, partial = prepare(config, keep_config)
    for chunk in chunks:
        chosen = keep_config if chunk.kept else config
        run_sweep(block, chosen, chunk, shift, positive, kept, partial)
        add_sums(block, chunk, partial, state, occupied, shift, flag)
        if chunk.kept:
            add_moments(block, chunk, partial, kept)
    if flag is not None:
        sweep_apart(block, apart_config, again, partial, state, None, None, kept, flag)


@on_its_device
def finish(
    state: Tensor, positive: Tensor, scale: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Finishes lines in one launch, since a small batch spends its time in launches."""
    lines = state.shape[1]
    state = state if state.stride(1) == 1 else state.contiguous()
    results = tuple(torch.empty_like(state[0]) for _ in range(3))
    launch.launch(
        finish_kernel, cdiv(lines, LANES), state, positive.contiguous(), scale,
        None if kind_of(kind).has_shift else bias, *results, lines, positive.numel(),
        state.stride(0), FINISH=functions_of(kind).finish, LANES=LANES,
    )  # fmt: skip
    return results


@on_its_device
def weigh(
    block: Block, statistics: SweepResults, upstream: Upstream, wanted: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the second sweep: a chunk of weights, two products with the features, the next chunk."""
    state, positive, kept = statistics
    block = LogitBlock(block)
    # Kept moments do not include the column sums of weights that a key bias needs.
    kept = Kept() if wanted.key_bias else block.kept(kept)
    needs = (wanted.x, wanted.y, wanted.key_bias)
    work = Weighing(block, state, positive.contiguous(), upstream.coefficients, needs, kept)
    dx = block.empty(block.m if wanted.x else 0, block.d, dtype=wanted.dtype_x)
    dy = block.empty(block.n if wanted.y else 0, block.d, dtype=wanted.dtype_y)
    product = dy if dy.dtype == torch.float32 else block.empty(*dy.shape)
    completion = Completion(work, upstream.positive_weight, upstream.gain, wanted.project, dx, dy)
    last = work.run(block.kernel_of_weights, dx, product, completion.complete_rows)
    return dx, dy, completion.complete(last, product), completion.key_bias_gradient()


@on_its_device
def sweep_and_weigh(
    block: Block, gain: Tensor, needs_x: bool, needs_y: bool, project: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs both sweeps in one go: every tile is computed once, folded and weighed."""
    block = LogitBlock(block)
    state, positive = block.new_states()
    needs = (needs_x, needs_y, False)
    work = Weighing(block, state, positive, None, needs, Kept(), also_fold=True)
    dx = block.empty(block.m if needs_x else 0, block.d)
    dy = block.empty(block.n if needs_y else 0, block.d)
    last = work.run(block.kernel_of_weights, dx, dy)
    # The positives are known only now, and the gradients need their weights.
    rows = state[:, : block.m]
    _, _, weights = finish(rows, positive, block.scale, block.bias, block.kind.name)
    totals = Completion(work, weights, gain, project, dx, dy).complete(last, dy, every_row=True)
    return state, positive, dx, dy, totals
