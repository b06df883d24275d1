"""Gumbel noise by counter, as in `csrc/cpu/retrieval/noise.h`: the noise of a pair depends on the
seed and the pair alone.

The maximum over j of `s_ij + G_ij`, with `G_ij = -log(-log(u))` for uniform u, is a draw from the
softmax of row i (Gumbel, 1954; Maddison et al., arXiv 1411.0030).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift of int64 numbers to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def line_keys(seed: int, of_columns: bool, lines: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two numbers of 32 bits, int64, for each of the lines: halves of splitmix64's outputs
    (Steele et al., 2014)."""
    z = _signed(seed) + _signed(GOLDEN) * (2 * lines + int(of_columns) + 1)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    z = z ^ _shifted(z, 31)
    return z & WORD, _shifted(z, 32)


def _mixed(h: Tensor) -> Tensor:
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & WORD
    h = ((h ^ (h >> 15)) * 0x846CA68B) & WORD
    return h ^ (h >> 16)


def gumbel(counters: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
    """Returns float32 noise for counters and the keys of their lines, which broadcast."""
    h = _mixed((_mixed(counters ^ keys[0]) + keys[1]) & WORD)
    v = (h.to(torch.float32) + 0.5) * 2.0**-32
    rest = ((h ^ WORD).to(torch.float32) + 0.5) * 2.0**-32
    # Both tails keep their digits.
    exponential = torch.where(v < 0.5, torch.log1p(v / rest), -torch.log(rest))
    return -torch.log(exponential)
