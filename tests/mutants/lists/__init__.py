"""The mutants by area."""

from collections.abc import Sequence
from typing import NamedTuple

from mutants import emulation, extension
from mutants.lists import (
    bench,
    cached,
    clip,
    cpu,
    cuda,
    distributed,
    engine,
    integrations,
    losses,
    pairs,
    retrieval,
    retrieval_cpu,
    triton,
)
from mutants.mutant import Mutant
from mutants.trial import Build


class Area(NamedTuple):
    mutants: Sequence[Mutant]
    build: Build | None = None


AREAS = {
    "cpu": Area(cpu.MUTANTS, Build(extension.make, extension.undo)),
    "cuda": Area(cuda.MUTANTS, Build(emulation.make)),
    "triton": Area(triton.MUTANTS),
    "engine": Area(engine.MUTANTS),
    "losses": Area(losses.MUTANTS),
    "distributed": Area(distributed.MUTANTS),
    "cached": Area(cached.MUTANTS),
    "integrations": Area(integrations.MUTANTS),
    "retrieval": Area(retrieval.MUTANTS),
    "retrieval on CPUs": Area(retrieval_cpu.MUTANTS, Build(extension.make, extension.undo)),
    "clip": Area(clip.MUTANTS),
    "pairs": Area(pairs.MUTANTS),
    "bench": Area(bench.MUTANTS),
}
