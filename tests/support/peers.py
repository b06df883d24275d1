"""Imports peers, the libraries whose losses ours must equal, and compares a loss with theirs."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from torch import Tensor

from bench.methods import open_clip


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of N pairs: "random" ones, "close" ones, or close ones with "duplicates"."""

    n: int
    d: int
    scale: float
    sort: str

    def __str__(self) -> str:
        return f"{self.n}x{self.d}-{self.scale:g}-{self.sort}"

    def features(
        self, count: int, n: int | None = None, d: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:  # fmt: skip
        """Returns `count` leaves (n, d) whose rows have different lengths."""
        n, d = n or self.n, d or self.d
        first = torch.randn(n, d, dtype=torch.float64)
        leaves = []
        for _ in range(count):
            leaf = torch.randn(n, d, dtype=torch.float64)
            if self.sort != "random":
                leaf = first + 0.2 * leaf
            if self.sort == "duplicates":
                leaf = leaf[torch.arange(n) % max(1, n // 3)]
            leaf = leaf * torch.exp(torch.randn(n, 1, dtype=torch.float64) / 2)
            leaves.append(leaf.to(dtype).requires_grad_())
        return leaves

    def leaves(self, count: int) -> list[Tensor]:
        """Returns features and the scale; peers take tensors where they ask for a number."""
        scale = torch.tensor(self.scale, dtype=torch.float64, requires_grad=True)
        return [*self.features(count), scale]


# Lines without negatives, one feature, primes.
CASES = [
    Case(1, 4, 20.0, "random"), Case(2, 3, 20.0, "close"), Case(3, 1, 1.0, "random"),
    Case(3, 1, 100.0, "close"), Case(17, 8, 1.0, "random"), Case(17, 8, 20.0, "duplicates"),
    Case(17, 8, 100.0, "close"), Case(67, 24, 1.0, "duplicates"), Case(67, 24, 20.0, "close"),
    Case(67, 24, 100.0, "random"), Case(67, 24, 100.0, "duplicates"),
]  # fmt: skip


# A folder with another open_clip for the tests of its trainer, such as the `src` of a checkout.
OPEN_CLIP = os.environ.get("FASTCLIP_OPEN_CLIP")


def find(package: str) -> ModuleSpec:
    """Returns where a peer is installed.

    If it is not, the test is skipped; with FASTCLIP_REQUIRE_PEERS it fails.
    """
    found = importlib.util.find_spec(package)
    if found is not None:
        return found
    if os.environ.get("FASTCLIP_REQUIRE_PEERS"):
        pytest.fail(f"{package} is not installed")
    pytest.skip(f"{package} is not installed")


def peer(name: str) -> ModuleType:
    """Returns the module `name` of a peer; like `find`, skips the test or fails without it."""
    find(name.partition(".")[0])
    return open_clip.import_module(name, ("torchvision",))


def assert_same(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], leaves: Sequence[Tensor],
    rtol: float = 1e-9, atol: float = 1e-11,
) -> None:  # fmt: skip
    """Asserts that two losses have the same value and the same gradient of each leaf."""
    found = []
    for loss in (ours, theirs):
        value = loss(*leaves)
        found.append((value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)))
    for name, a, b in zip(("value", *range(len(leaves))), *found, strict=True):
        torch.testing.assert_close(
            a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
