"""Runs cases of a soak across ranks, and says what is wrong with their outcomes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from soak import faults, spread
from soak.drawn import decides_by_comparison
from soak.faults import FAULTS
from soak.judged import exact_of, mistakes, undecided
from soak.meter import Held, held
from soak.pool import Outcome, Pool
from soak.spread import Spread

MOST_RANKS = 8
TIMEOUT = 90.0  # of groups whose ranks all answer
SHORT = 4.5  # of groups with a rank that stalls or dies; no number of ranks
# A rank may notice a fault in the exchange after the one that the others notice it in.
LATEST = 2 * SHORT + 10.0


class Case(NamedTuple):
    """A loss across ranks, and the fault of one of them."""

    spread: Spread
    fault: str
    faulty: int


class Verdict(NamedTuple):
    case: Case
    wrong: list[str]
    seconds: float  # until the last rank's result or error


def draw(seed: int, k: int) -> Case:
    """Returns case k of a seed."""
    rng = np.random.default_rng([seed, k, 1])
    one = spread.draw(rng, int(rng.integers(1, MOST_RANKS + 1)))
    return Case(one, *faults.choose(rng, one))


class Runner:
    """Runs cases in a pool that lives on, or in one of their own if a rank stalls or dies."""

    def __init__(self) -> None:
        self._pool: Pool | None = None

    def run(self, case: Case) -> Verdict:
        outcomes = self._outcomes(case)
        expected = FAULTS[case.fault].expected
        if any(o.error in ("died", "hangs") for o in outcomes) and expected != "broken":
            wrong = _texts(outcomes)
            self.close()
        else:
            wrong = {
                "equal": _unequal, "nan": _without_nan, "refused": _accepted, "broken": _unbroken
            }[expected](case, outcomes)  # fmt: skip
        return Verdict(case, wrong, max(o.seconds for o in outcomes))

    def _outcomes(self, case: Case) -> list[Outcome]:
        ranks, (one, fault, faulty) = len(case.spread.sizes), case
        if FAULTS[fault].expected != "broken":
            self._pool = self._pool or Pool(MOST_RANKS, TIMEOUT, smaller=True)
            return self._pool.run(faults.step, one, fault, faulty, ranks=ranks)
        pool = Pool(ranks, TIMEOUT)
        try:
            # So that only the wait for the faulty rank takes time.
            first = pool.run(faults.step, one, "none", faulty)
            if any(outcome.error for outcome in first):
                return [o._replace(error=f"before the fault: {o.error}") for o in first]
            return pool.run_but(faulty, SHORT, faults.step, one, fault, faulty)
        finally:
            pool.close()

    def held(self) -> list[Held]:
        """The holdings of each process of the pool."""
        if self._pool is None:
            return []
        return [outcome.result for outcome in self._pool.run(_held)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _held(rank: int, group: Any) -> Held:
    return held()


def _texts(outcomes: list[Outcome]) -> list[str]:
    return [f"rank {k}: {o.error or 'a result'}" for k, o in enumerate(outcomes)]


def _unequal(case: Case, outcomes: list[Outcome]) -> list[str]:
    one = case.spread
    if any(o.error for o in outcomes):
        return _texts(outcomes)
    found = spread.joined(one, [o.result for o in outcomes])
    given, loss_case = one.arrays(), one.case
    if decides_by_comparison(loss_case) and undecided(loss_case, given, one.p, one.normalize):
        return []
    exact = exact_of(loss_case, given, one.p, one.normalize, one.reduction, one.upstream())
    dense = faults.of_one_process(one, None)
    return mistakes(found, dense, exact, one.p, given)


def _without_nan(case: Case, outcomes: list[Outcome]) -> list[str]:
    """No rank may return a number for the loss or for dx where the dense loss has NaN, and no other
    gradient may lose all of its NaN. Which of its elements have NaN depends on the engine: excluded
    pairs of a dense loss have weights of 0, and 0 times NaN is NaN."""
    if any(o.error for o in outcomes):
        return _texts(outcomes)
    found = spread.joined(case.spread, [o.result for o in outcomes])
    right, wrong = faults.of_one_process(case.spread, case.faulty), []
    for name, value in right.items():
        ours, theirs = found[name].isnan(), value.isnan()
        lost = theirs & ~ours if name in ("loss", "dx") else theirs.any() & ~ours.any()
        if bool(lost.any()):
            wrong.append(f"{name}: a number in place of NaN")
    return wrong


def _accepted(case: Case, outcomes: list[Outcome]) -> list[str]:
    refused = ("ValueError", "TypeError")
    return [] if all(o.error.startswith(refused) for o in outcomes) else _texts(outcomes)


def _unbroken(case: Case, outcomes: list[Outcome]) -> list[str]:
    wrong = []
    for rank, outcome in enumerate(outcomes):
        if rank == case.faulty:
            continue
        if not outcome.error.startswith("RuntimeError") or outcome.seconds > LATEST:
            wrong.append(f"rank {rank}: {outcome.error or 'a result'}, {outcome.seconds:.1f} s")
    return wrong
