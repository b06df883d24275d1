"""Builds the programs of this folder."""

from collections.abc import Sequence
from pathlib import Path

from emulation import programs
from emulation.programs import CSRC, Unit

HERE = Path(__file__).resolve().parent
SCHEDULERS = {"fibers": ("-DEMULATION_POISON",), "threads": ("-DEMULATION_THREADS",)}
SELFTEST = [HERE / "selftest.cpp", HERE / "mistakes.cpp"]


def driver(csrc: Path = CSRC) -> list[Path]:
    return [csrc / "cuda/engine.cu", HERE / "driver.cpp"]


def units(sources: Sequence[Path], scheduler: str = "fibers", csrc: Path = CSRC) -> list[Unit]:
    return [Unit(source, HERE, SCHEDULERS[scheduler], csrc) for source in sources]


def build(
    sources: Sequence[Path],
    sanitizer: str = "none",
    scheduler: str = "fibers",
    csrc: Path = CSRC,
) -> Path:
    """Returns the built program; skips the test if the compiler lacks the sanitizer."""
    return programs.build(units(sources, scheduler, csrc), sanitizer)
