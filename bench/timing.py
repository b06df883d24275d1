"""Medians of interleaved runs, and the rate of the plain product in the same run.

All methods of a case take turns in one process, so that a slow minute of the machine falls on all
of them alike, and the rate they are compared with is taken between their turns. This file never
decides what is measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A run shorter than this is repeated within one measurement: the clock and the first touch of
# caches that another method has just filled would show.
SHORTEST_MEASUREMENT = 2e-3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 101
LONGEST_ROUND = 60.0  # seconds; beyond it one round is enough


@dataclass
class Timing:
    """Seconds of one run: the median of the rounds and their quartiles."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    runs: dict[str, Callable[[], object]],
    seconds: float,
    between: Callable[[], object] = lambda: None,
    finish: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times all `runs` in turns for about `seconds`.

    Args:
        runs: what to time, by name; each has run before, so that nothing is compiled here.
        seconds: for all rounds together; at least three rounds are made, but for one if they are
            very long.
        between: called once before each round, outside the clock.
        finish: waits for the device, inside the clock.
    """
    repeats = {name: _repeats(run, finish) for name, run in runs.items()}
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    while True:
        between()
        for name in order:
            times[name].append(_one(runs[name], repeats[name], finish))
        order = order[1:] + order[:1]  # so that nobody always follows the same neighbour
        rounds, spent = len(times[order[0]]), time.perf_counter() - began
        if rounds >= (FEWEST_ROUNDS if spent / rounds < LONGEST_ROUND else 1) and (
            rounds >= MOST_ROUNDS or spent + spent / rounds > seconds
        ):
            return {name: _summary(found) for name, found in times.items()}


def _one(run: Callable[[], object], repeats: int, finish: Callable[[], object]) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    finish()
    return (time.perf_counter() - began) / repeats


def _repeats(run: Callable[[], object], finish: Callable[[], object]) -> int:
    once = _one(run, 1, finish)
    return max(1, math.ceil(SHORTEST_MEASUREMENT / max(once, 1e-7)))


def _summary(times: list[float]) -> Timing:
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return Timing(middle, low, high, len(times))


class GemmLimit:
    """The rate of the bare product, sampled between the rounds of a case.

    Where the compiled engine has a product of its own it is that, on tiles that stay in cache; else
    torch.mm on large matrices, which `source` says.
    """

    # (m, n, k) of the tiles tried; the fastest of them is the limit.
    TILES = ((64, 128, 512), (128, 128, 512), (64, 256, 512), (32, 512, 512), (256, 128, 512))

    def __init__(self, half: bool, device: str = "cpu") -> None:
        self.dtype = torch.bfloat16 if half else torch.float32
        self.device = device
        self.samples: list[float] = []
        self._tile = self._fastest_tile() if device == "cpu" else None
        self.source = "brgemm" if self._tile else "torch.mm"
        if self._tile is None:
            size = (2048, 2048) if device == "cpu" else (8192, 8192)
            self._a = torch.ones(size, dtype=self.dtype, device=device)
            self._rate_of_mm()  # warms up

    def sample(self) -> None:
        """Takes the rate once, in about a tenth of a second."""
        rate = self._rate_of_tile(self._tile, 0.1) if self._tile else self._rate_of_mm()
        self.samples.append(rate)

    def take(self) -> float:
        """The median of the samples since the last call, in GFLOP/s."""
        rate = statistics.median(self.samples)
        self.samples.clear()
        return rate

    def _fastest_tile(self) -> tuple[int, int, int] | None:
        try:
            return max(self.TILES, key=lambda tile: self._rate_of_tile(tile, 0.1))
        except (ImportError, AttributeError, RuntimeError):
            return None  # no compiled engine, or no such product on this machine

    def _rate_of_tile(self, tile: tuple[int, int, int], seconds: float) -> float:
        from fastclip import _C

        return _C.gemm_rate(str(self.dtype).removeprefix("torch."), *tile, seconds)

    def _rate_of_mm(self) -> float:
        out = torch.empty_like(self._a)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            torch.mm(self._a, self._a, out=out)
            if self.device == "cuda":
                torch.cuda.synchronize()
            count += 1
        return 2e-9 * len(out) ** 3 * count / (time.perf_counter() - began)
