"""A case of the benchmark, and the inputs of its loss. This file knows no loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One entry of the plan, and the methods that are measured on it."""

    loss: str  # of losses.LOSSES or losses.FAMILY
    m: int  # rows, pairs
    n: int  # columns; the positive of row i is column i
    d: int
    dtype: str  # of cases.DTYPES; "autocast": float32 features under bfloat16 autocast
    scale: float
    data: str = "random"  # or "separated": y = x + small noise
    # "both": forward and backward; "graph": the same, captured in a CUDA graph and replayed;
    # "forward": the loss alone, under no_grad.
    mode: str = "both"
    methods: tuple[str, ...] = ()
    memory: bool = False  # also measure peak memory
    timed: bool = True  # False: measure nothing but memory

    @property
    def name(self) -> str:
        """The name that `--only` is matched against."""
        shape = f"{self.m}x{self.n}x{self.d}"
        return f"{self.loss} {shape} {self.dtype} {self.data} {self.scale:g} {self.mode}"

    @property
    def half(self) -> bool:
        """True if the matmuls take bfloat16 operands."""
        return self.dtype != "float32"

    @property
    def square(self) -> bool:
        return self.m == self.n

    @property
    def pass_flops(self) -> float:
        """FLOPs of one pass: an (M, D) @ (D, N) matmul."""
        return 2.0 * self.m * self.n * self.d


@dataclass
class Inputs:
    """The inputs of a loss: x (M, D), y (N, D), one-element scale and bias, all leaves, or None if
    the loss has none; and further ones, without gradients."""

    x: Tensor
    y: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    further: tuple[Tensor, ...] = ()

    @property
    def slots(self) -> tuple[Tensor | None, ...]:
        return self.x, self.y, self.scale, self.bias

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in self.slots if leaf is not None)
