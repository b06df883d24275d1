"""Medians of interleaved runs, and the rate of a plain matmul in the same run.

All methods of a case take turns in one process, so that a slow minute of the machine affects them
alike. The matmul rate that they are compared with is sampled between their turns. Time is measured
by a `Clock`: the host's, or a CUDA device's own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Clock = Callable[[Run, int], float]  # (run, repeats) to the mean seconds of one run

# A run shorter than this is repeated within one measurement. Otherwise the overhead of the clock,
# and cache misses after another method's run, would show.
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


def host_clock(run: Run, repeats: int) -> float:
    """The host's time, for runs that are finished when they return."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def cuda_clock(run: Run, repeats: int) -> float:
    """The device's time, from the start of the first kernel to the end of the last."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


CLOCKS: dict[str, Clock] = {"cpu": host_clock, "cuda": cuda_clock}


def wait_for(device: str) -> None:
    """Returns when the device is done. The failure of a kernel is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    runs: dict[str, Run],
    seconds: float,
    between: Run = lambda: None,
    clock: Clock = host_clock,
    now: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Times all `runs` in turns for about `seconds`.

    Args:
        runs: what to time, by name; each has run before, so that nothing is compiled here.
        seconds: for all rounds together; at least three rounds are made, or one if they are very
            long.
        between: called once before each round, not timed.
        clock: the clock of the device of the runs.
        now: the time in seconds. Processes that make their rounds together must agree on it, or
            one would go on alone. Default: the host's clock.
    """
    now = now or time.perf_counter
    repeats = {name: _repeats(run, clock) for name, run in runs.items()}
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = now()
    while True:
        between()
        for name in order:
            times[name].append(clock(runs[name], repeats[name]))
        order = order[1:] + order[:1]  # each method starts some of the rounds
        rounds, spent = len(times[order[0]]), now() - began
        if rounds >= (FEWEST_ROUNDS if spent / rounds < LONGEST_ROUND else 1) and (
            rounds >= MOST_ROUNDS or spent + spent / rounds > seconds
        ):
            return {name: _summary(found) for name, found in times.items()}


def _repeats(run: Run, clock: Clock) -> int:
    return max(1, math.ceil(SHORTEST_MEASUREMENT / max(clock(run, 1), 1e-7)))


def _summary(times: list[float]) -> Timing:
    low, middle, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    )
    return Timing(middle, low, high, len(times))


class GemmLimit:
    """The rate of a bare matmul, sampled between the rounds of a case.

    If the compiled engine has its own matmul ("brgemm"), the limit is its rate on tiles that stay
    in cache; otherwise that of torch.mm on large matrices. `source` names it.
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
            # Random numbers: a GPU at its power limit multiplies constants faster.
            self._a = torch.randn(size, device=device).to(self.dtype)
            self._rate_of_mm()  # warms up

    def sample(self) -> None:
        """Measures the rate once, in about a tenth of a second."""
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
            return None  # no compiled engine, or no such matmul on this machine

    def _rate_of_tile(self, tile: tuple[int, int, int], seconds: float) -> float:
        from fastclip import _C

        return _C.gemm_rate(str(self.dtype).removeprefix("torch."), *tile, seconds)

    def _rate_of_mm(self) -> float:
        out = torch.empty_like(self._a)
        clock = CLOCKS[self.device]

        def product() -> None:
            torch.mm(self._a, self._a, out=out)

        repeats = max(1, math.ceil(0.1 / clock(product, 1)))
        return 2e-9 * len(out) ** 3 / clock(product, repeats)
