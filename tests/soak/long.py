"""The two long runs of a soak: steps in one process, and cases across ranks, with their tables."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from soak import ranked, stepped
from soak.drawn import draw
from soak.meter import Held, growth, held
from soak.table import Table

Wrong = list[str]
MEASUREMENTS, LEAST_STEPS = 50, 20  # in a run, and between two
# Triton's kernels are interpreted, and take a hundred times as long.
ENGINES = {"cpu": 0.6, "torch": 0.195, "reference": 0.1, None: 0.1, "triton": 0.005}


def numbers(first: int, count: int, seconds: float) -> Iterator[int]:
    """Yields count numbers from the first, until the seconds are over."""
    ends = time.monotonic() + seconds
    for k in range(first, first + count):
        if time.monotonic() > ends:
            return
        yield k


def steps(
    first: int, count: int, seconds: float, seed: int, table: Path | None,
    say: Callable[[str], None], engines: dict[str | None, float] = ENGINES,
) -> Wrong:  # fmt: skip
    """Runs steps in this process. Returns a line for each mistake, and for what grows.

    After each measurement the steps go on in another Python thread: torch keeps a compiled product
    for each shape and thread, which random sizes would let grow for ever.
    """
    begun, wrong, measured = time.monotonic(), [], []
    every = max(LEAST_STEPS, count // MEASUREMENTS)
    rows = Table(table, ("steps", "seconds", "wrong", *Held._fields))
    left, done = numbers(first, count, seconds), 0

    def several() -> int:
        number = 0
        for k in itertools.islice(left, every):
            number += 1
            step = draw(seed, k, engines)
            mistakes = stepped.wrong_in(step)
            if mistakes:
                wrong.append(_failure("steps", seed, k, step, mistakes))
                say(wrong[-1])
        return number

    while True:
        with ThreadPoolExecutor(1) as pool:
            number = pool.submit(several).result()
        if not number:
            break
        done += number
        measured.append(held())
        rows.add(done, round(time.monotonic() - begun), len(wrong), *measured[-1])
    return wrong + [f"{done} steps: {line}" for line in growth(measured)]


def cases(
    first: int, count: int, seconds: float, seed: int, table: Path | None,
    say: Callable[[str], None],
) -> Wrong:  # fmt: skip
    """Runs cases across ranks. Returns a line for each mistake, and for what grows."""
    begun, wrong, measured = time.monotonic(), [], []
    every = max(LEAST_STEPS, count // MEASUREMENTS)
    rows = Table(table, ("fault", "cases", "wrong", "latest_s"))
    over_time = Table(
        table and table.with_stem(f"{table.stem}-held"), ("cases", "seconds", *Held._fields)
    )
    by_fault: dict[str, list[float]] = {}
    runner, done = ranked.Runner(), 0
    try:
        for k in numbers(first, count, seconds):
            case = ranked.draw(seed, k)
            verdict = runner.run(case)
            found = by_fault.setdefault(case.fault, [0, 0, 0.0])
            found[0] += 1
            found[1] += bool(verdict.wrong)
            found[2] = max(found[2], round(verdict.seconds, 1))
            if verdict.wrong:
                wrong.append(_failure("ranks", seed, k, case, verdict.wrong))
                say(wrong[-1])
            done += 1
            if done % every == 0:
                of_ranks = runner.held()
                if of_ranks:  # the largest process counts
                    measured.append(Held(*map(max, zip(*of_ranks, strict=True))))
                    over_time.add(done, round(time.monotonic() - begun), *measured[-1])
                rows.replace(_by_fault(by_fault))
    finally:
        runner.close()
        rows.replace(_by_fault(by_fault))
    return wrong + [f"{done} cases: {line}" for line in growth(measured)]


def _by_fault(found: dict[str, list[float]]) -> list[tuple[Any, ...]]:
    return [(fault, *numbers) for fault, numbers in sorted(found.items())]


def _failure(what: str, seed: int, k: int, drawn: Any, mistakes: Wrong) -> str:
    again = f"python -m tests.soak {what} --seed {seed} --first {k} --count 1"
    return "\n".join([f"{what} {k} of seed {seed}: {drawn}", *(f"  {m}" for m in mistakes),
                      f"  again: {again}"])  # fmt: skip
