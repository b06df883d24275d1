"""The host's view of a rectangular block of logits: its operands, their layout, and its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..engine.block import Block
from ..kinds import kind_of
from . import configurations, launch, plan, targets
from .configurations import Config
from .constants import LOG2E
from .kept import Kept
from .kernels import bf16_parts, split_product, tf32
from .kinds import functions_of
from .launch import COLUMNS, ROWS, takes_split, takes_tf32
from .plan import Chunk, cdiv
from .targets import Targets


class LogitBlock:
    """A rectangular block of logits as the kernels take it."""

    def __init__(self, block: Block) -> None:
        x, y = block.x.features, block.y.features
        self.m, self.n, self.d = *block.sizes(), x.shape[1]
        self.kind, self.device_functions = kind_of(block.kind), functions_of(block.kind)
        self.is_plain, self.same_id_positive = block.is_plain, block.same_id_positive
        self.tf32, self.split = takes_tf32(x), takes_split(x)
        self.x, self.y = (self.rows_of(t) for t in (x, y))
        # The operands of products, `depth` features long.
        self.depth = self.depth_of(self.d)
        self.operands = tuple(self.operand_of(t, self.depth) for t in (self.x, self.y))
        self.factor_x, self.factor_y = (
            None if side.factor is None else side.factor.to(torch.float32).contiguous()
            for side in (block.x, block.y)
        )
        self.scale, self.bias = block.scale, None if self.kind.has_shift else block.bias
        self.key_bias, self.largest_bias = (None, None), None
        if block.key_bias is not None:
            self.key_bias, self.largest_bias = self._biases(block.key_bias)
            self.bias = None
        # The ids of rows, of columns, the thresholds of rows, of columns.
        self.sides = tuple(
            None if t is None else t.contiguous()
            for t in (block.x.ids, block.y.ids, block.x.threshold, block.y.threshold)
        )
        self.unit = self.unit_of(self.operands)
        self.targets = None if block.x.target is None else Targets(self, block)
        self.has_teacher = block.has_teacher()
        # All offsets beyond the block mean that no row has an own positive. The offset is clamped
        # to the block, so that it fits 32 bits and no second kernel is compiled for 64 bits.
        self.offset = max(-self.m, min(block.offset, self.n))
        self.is_small = plan.is_small(self.m, self.n)

    def _biases(self, bias: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Returns the biases of the columns in log2 units, as an integral part and the rest, and
        the largest bias."""
        bias = bias.to(torch.float64)
        if self.bias is not None:
            bias = bias + self.bias.reshape(()).to(torch.float64)
        bias = bias * LOG2E.value
        high = bias.round().to(torch.float32)
        low = torch.where(high.isinf(), 0.0, bias - high).to(torch.float32)
        # If all are -inf, any finite number serves.
        return (high, low), bias.amax().clamp_min(-1e30)

    def rows_of(self, x: Tensor) -> Tensor:
        """Returns features whose rows kernels can load, rounded to tf32 if products are tf32."""
        side_by_side = x.stride(1) == 1 or x.shape[1] == 1
        # Descriptors do not support overlapping rows, such as one row expanded.
        apart = x.stride(0) >= x.shape[1] or x.shape[0] == 1
        x = x if side_by_side and apart else x.contiguous()
        if not self.tf32:
            return x
        rounded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch.launch(
            tf32.to_tf32_kernel, cdiv(x.shape[0], ROWS), x, rounded, *x.shape, x.stride(0),
            ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip
        return rounded

    def depth_of(self, width: int) -> int:
        """Returns the length of an operand's rows."""
        return split_product.padded(width) if self.split else width

    def operand_of(self, x: Tensor, depth: int) -> Tensor:
        """Returns the operand of products: the features, or their three bf16 parts."""
        if not self.split:
            return x
        out = torch.empty(len(x), 3 * depth, dtype=torch.bfloat16, device=x.device)
        launch.launch(
            bf16_parts.to_parts_kernel, cdiv(len(x), ROWS), x, out, *x.shape, x.stride(0),
            WIDTH=depth, ROWS=ROWS, BK=COLUMNS,
        )  # fmt: skip
        return out

    @staticmethod
    def unit_of(operands: tuple[Tensor, ...]) -> int:
        """Returns the elements in 16 bytes if all rows of the operands begin on them, else 1."""
        unit = 16 // operands[0].element_size()
        for t in operands:
            if t.data_ptr() % 16 or t.shape[1] % unit or t.stride(0) % unit:
                return 1
        return unit

    def features(self, chunk: Chunk, config: Config | None = None) -> tuple[Any, Any]:
        """Returns x and y of a chunk, as descriptors if a config is given and uses them."""
        x, y = self.operands
        x, y = x[chunk.row_slice], y[chunk.column_slice]
        if config is None or not config.descriptors:
            return x, y
        return launch.descriptor(x, config.bm, config.bk), launch.descriptor(
            y, config.bn, config.bk
        )

    def logits(self, chunk: Chunk) -> tuple[Tensor | None, ...]:
        """Returns a chunk's LOGITS: all that `kernels/logits.py` needs to make logits."""

        def sliced(t: Tensor | None, lines: slice) -> Tensor | None:
            return None if t is None else t[lines]

        rows, columns = chunk.row_slice, chunk.column_slice
        return (
            sliced(self.factor_x, rows), sliced(self.factor_y, columns), self.scale, self.bias,
            *(sliced(t, columns) for t in self.key_bias),
            *map(sliced, self.sides, (rows, columns, rows, columns)),
        )  # fmt: skip

    @property
    def same_id(self) -> int:
        """The kernels' SAME_ID: 0, or the sign with which positives by id are folded."""
        return (-1 if self.kind.negates_positives else 1) if self.same_id_positive else 0

    @property
    def folds(self) -> int:
        """The number of sums of each line: over negatives and, if asked for, positives by id."""
        return 2 if self.same_id_positive else 1

    @property
    def has_own_numbers(self) -> bool:
        """True if no sweep uses one shift: each line has a level, or, in a block with targets or a
        small block of a kind with a shift, a shift of its own."""
        small = self.kind.has_shift and self.is_small
        return self.kind.has_levels or self.targets is not None or small

    @property
    def is_relative(self) -> bool:
        """True if the weights are relative to numbers of lines, which may all be 0."""
        return self.kind.is_relative() or self.targets is not None

    @property
    def layers_apart(self) -> int:
        """The partials of each line in a tile if lines have numbers of their own."""
        return plan.APART_LAYERS * self.folds + (plan.TEACHER_LAYERS if self.has_teacher else 0)

    def targets_of(self, chunk: Chunk) -> tuple[Any, ...]:
        """Returns a chunk's TARGETS and TARGET_LOGITS."""
        return targets.ABSENT if self.targets is None else self.targets.arguments(chunk)

    def apart_tiles(self, config: Config) -> dict[str, Any]:
        """Returns compile-time arguments of the kernels with a number for each line. Masks and a
        second product take registers, so such a kernel has more warps."""
        tiles = {"GROUP": config.group, **self.tiles(config)}
        if self.targets is not None or not self.is_plain:
            tiles["num_warps"] = max(config.warps, min(8, config.bm * config.bn // 512))
        given = self.targets
        return tiles | (targets.ABSENT_CONSTANTS if given is None else given.constants(config))

    @property
    def functions(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels that fold and weigh."""
        own = self.device_functions
        return {
            "FOLD": own.fold, "ACTIVATION": own.activation, "SAME_ID": self.same_id
        }  # fmt: skip

    def offset_of(self, chunk: Chunk) -> int:
        """Returns the offset of a chunk, clamped to 32 bits like the block's."""
        offset = self.offset + chunk.start - chunk.column_start
        return max(-chunk.rows, min(offset, chunk.columns))

    def skipped(self, chunk: Chunk) -> int:
        """Returns how many whole tiles of each row of tiles go to the launch of the edges. In a
        small block these are all tiles, which saves a launch."""
        if self.is_small:
            return chunk.columns // chunk.bn
        return chunk.skipped(self.offset_of(chunk))

    @property
    def width(self) -> int:
        """The features of an operand, counted in units."""
        return self.depth // self.unit

    @property
    def strides(self) -> tuple[int, int]:
        """The distances between rows of x and of y, counted in units."""
        x, y = self.operands
        return x.stride(0) // self.unit, y.stride(0) // self.unit

    @property
    def precision(self) -> str:
        """The kernels' PRECISION: how fp32 operands are multiplied. Half operands get "ieee", which
        changes nothing for them."""
        return "tf32" if self.tf32 else "split" if self.split else "ieee"

    def tiles(self, config: Config) -> dict[str, Any]:
        """Returns compile-time arguments of every kernel that computes tiles."""
        return {
            "BM": config.bm, "BN": config.bn, "BK": config.bk, "EVEN": self.depth % config.bk == 0,
            "PRECISION": self.precision, "UNIT": self.unit, "num_warps": config.warps,
            "num_stages": config.stages,
        }  # fmt: skip

    def edge_tiles(self, config: Config) -> dict[str, Any]:
        """Returns compile-time arguments of a kernel for the edges. Masks take registers, so such a
        kernel has more warps: a thread holds at most 64 numbers of a tile of 128 x 128."""
        warps = max(config.warps, min(8, config.bm * config.bn // 2048))
        return {"SLICES": launch.EDGE_SLICES, **self.tiles(config), "num_warps": warps}

    def plain_tiles(self, config: Config) -> dict[str, Any]:
        """Returns compile-time arguments of a kernel for plain tiles."""
        return {
            "D": self.width, "GROUP": config.group, "SLICES": config.slices,
            "DESCRIBED": config.descriptors, **self.tiles(config),
        }  # fmt: skip

    def programs(self, tiles: int, config: Config) -> int:
        """Returns the number of programs for so many plain tiles."""
        if not config.descriptors:
            return tiles
        return min(
            tiles, launch.programs_at_once(self.x.device, config, self.operands[0].element_size())
        )

    # Names of configurations (`configurations.KERNELS`). Masks take registers that the widest tiles
    # do not have, so masked blocks have other configurations than plain ones.

    @property
    def kernel_of_lines(self) -> str:
        """The kernels in which each line has a number of its own."""
        if self.is_small or not self.is_plain:
            return "small"
        return "levels" if self.kind.has_levels else "tile"

    @property
    def kernel_of_sums(self) -> str:
        """The kernel that folds."""
        return "small" if self.is_small else "sweep" if self.is_plain else "heavy"

    @property
    def kernel_of_keeping(self) -> str:
        """The kernel that folds and keeps weights."""
        return "kept" if self.is_plain and self.device_functions.is_light else "heavy kept"

    @property
    def kernel_of_weights(self) -> str:
        """The kernel that makes weights."""
        if self.is_small:
            return "small"
        if not self.is_plain:
            return "heavy"
        return "weigh" if self.device_functions.is_light else "both"

    def config(
        self, kernel: str, run: Callable[[Config], object] | None = None, how: str = ""
    ) -> Config:
        """Returns the configuration of a kernel. how: the variant of it that `run` launches."""
        x, words = self.x, [kernel, self.kind.name, how, "" if self.is_plain else "masked"]
        return configurations.choose(
            x.device, x.dtype, self.tf32, self.d, self.unit, ", ".join(filter(None, words)), run,
            self.split,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def kept(self, kept: Tensor) -> Kept:
        """Returns views of what a first sweep has kept. Small blocks keep nothing. Neither do the
        blocks that `engine.kept.Weights.keep` excludes: those with thresholds, with positives by
        id, with a key_bias, with a teacher or of a kind with levels."""
        keeps = self.sides[2] is None and self.largest_bias is None and not self.same_id_positive
        keeps = keeps and not self.is_small and not self.kind.has_levels and not self.targets
        return Kept.of(kept, self.m, self.n, self.x) if keeps else Kept()

    def new_states(self) -> tuple[Tensor, Tensor]:
        """Returns room for the states, and for the positives: NaN for rows without one."""
        positive = self.empty(self.m, dtype=torch.float64)
        if self.offset < 0 or self.m + self.offset > self.n:  # rows without a positive
            positive.fill_(torch.nan)
        rows = 2 * self.folds + (3 if self.has_teacher else 0)
        return self.empty(rows, self.m + self.n, dtype=torch.float64), positive
