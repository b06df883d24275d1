"""The steps of `make gpu` in order, the most important first, with a time limit for each.

With fastclip from a bundle, a minute is left for the card tests even if every step before them uses
all of its time. Tests that the first run did not finish are run by the second. The first run takes
eight minutes, the second four.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from ..cases import CONTRAST
from . import counters, figures, smoke, suite, winners
from .cases import CUDA, OWN, SPLIT, TRITON, WINNERS
from .install import install
from .steps import PASSED, Session, Step, commanded, module

FIRST_SECONDS, AGAIN_SECONDS = 480.0, 240.0
CARD_TESTS = "card tests"

# The methods that run on an engine; the default one is Triton in bf16.
METHODS_OF = {
    "triton": ("fastclip", *TRITON, WINNERS, SPLIT, *CONTRAST),
    "triton split": (SPLIT,),
    "cuda": CUDA,
    "cuda fused": ("fastclip cuda fused",),
}


def without(session: Session) -> list[str]:
    """Methods whose engine crashed or hung in the smoke test: they would end the whole process."""
    lost = smoke.unusable(figures.read(session.out / smoke.FILE))
    return [method for engine in lost for method in METHODS_OF.get(engine, ())]


def rows(group: str, *arguments: str) -> Callable[[Session], list[str]]:
    def command(session: Session) -> list[str]:
        run = module("rows", group, *arguments)(session)
        return [*run, "--without", *without(session)]

    return command


def kernels(session: Session) -> list[str]:
    return [*module("kernels")(session), "--without", *without(session)]


def no_triton(session: Session) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    lost = set(without(session)) & set(OWN)
    return "the Triton engine failed the smoke test" if set(TRITON) & lost else None


def no_counters(session: Session) -> str | None:
    reason = None if counters.find() else "ncu is not on PATH"
    return reason or no_triton(session)


def no_tests(session: Session) -> str | None:
    return suite.missing()


def tests(
    name: str,
    group: str,
    seconds: float,
    until_cut: bool,
    backwards: bool = False,
    unless: Callable[[Session], str | None] = no_tests,
) -> Step:
    def command(session: Session) -> list[str]:
        return suite.command(group, backwards)

    run = commanded(name, command, until_cut, **suite.ENVIRONMENT)
    return Step(name, seconds, run, unless)


def first() -> list[Step]:
    return [
        Step("install", 120, install),
        Step("rates", 20, commanded("rates", module("rates")), least=5),
        Step("smoke", 60, commanded("smoke", module("smoke"))),
        Step("tiles", 45, commanded("tiles", module("tiles")), no_triton),
        Step("headline", 100, commanded("headline", rows("headline"))),
        Step("kernels", 25, commanded("kernels", kernels)),
        Step("ncu", 40, commanded("ncu", module("counters")), no_counters),
        Step("contrast", 20, commanded("contrast", rows("contrast"), until_cut=True)),
        Step("engines", 35, commanded("engines", rows("engines"), until_cut=True)),
        Step("small", 30, commanded("small", rows("small"), until_cut=True)),
        tests(CARD_TESTS, "card", 150, until_cut=False),
        Step("rest", 60, commanded("rest", rows("rest"), until_cut=True)),
        tests("loss tests", "losses", 120, until_cut=True),
    ]


def again() -> list[Step]:
    """The second run: checks and times the tiles that won in the first, and runs tests that did not
    fit into it.

    The losses' test files run in reverse order: the first run may have been cut before the last.
    """

    def tiles_of(session: Session) -> str:
        return str(winners.find(session.winners, session.out))

    def no_winners(session: Session) -> str | None:
        if winners.find(session.winners, session.out) is None:
            return "no gpu-tiles.csv of a first run (WINNERS=path)"
        return None

    def no_card_tests(session: Session) -> str | None:
        found = winners.find(session.winners, session.out)
        folder = found.parent if found else session.out
        passed = any(
            (row["step"], row["status"]) == (CARD_TESTS, PASSED)
            for row in figures.read(folder / "gpu-steps.csv")
        )
        return "passed in the first run" if passed else no_tests(session)

    def table(session: Session) -> list[str]:
        return module("winners", tiles_of(session))(session)

    def check(session: Session) -> list[str]:
        run = module("smoke", "--winners", tiles_of(session))(session)
        return [*run, "--file", "gpu-again-smoke.csv", "--engines", "triton winners"]

    def headline(session: Session) -> list[str]:
        return module("rows", "again", "--winners", tiles_of(session))(session)

    return [
        Step("install", 120, install),
        Step("winners", 15, commanded("winners", table), no_winners, least=5),
        Step("smoke", 30, commanded("smoke", check), no_winners),
        Step("headline", 70, commanded("headline", headline), no_winners),
        tests(CARD_TESTS, "card", 80, until_cut=False, unless=no_card_tests),
        tests("loss tests", "losses", 80, until_cut=True, backwards=True),
        tests("sanitizers", "sanitizers", 120, until_cut=True),
    ]
