"""The tile candidates that won, and their use instead of the Triton engine's table.

The table is not changed on disk: `applied` uses the winners for a while.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..methods import registry
from ..report import results
from . import cases, figures, tiles

# Smaller gains are noise.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Winner:
    """The best candidate of a kernel, and the table's own; `own_ms` is None if that failed."""

    key: tuple[str, ...]
    config: tuple[object, ...]
    own: tuple[object, ...]
    ms: float
    own_ms: float | None

    @property
    def better(self) -> bool:
        return self.own_ms is None or self.ms < (1 - LEAST_GAIN) * self.own_ms

    def __str__(self) -> str:
        name = f"{self.key[-1]}, {self.key[0].removeprefix('torch.')}, D = {self.key[2]}"
        if self.own_ms is None:
            return f"{name}: {self.own} does not run; {self.config} takes {self.ms:.3f} ms"
        if not self.better:
            return f"{name}: {self.own} stays, {self.own_ms:.3f} ms"
        gain = 100 * (1 - self.ms / self.own_ms)
        told = f"{self.ms:.3f} ms instead of {self.own_ms:.3f} (-{gain:.0f} %)"
        return f"{name}: {self.own} -> {self.config}, {told}"


def winners(path: Path) -> list[Winner]:
    """The winner of each kernel that has a candidate with a time."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in figures.read(path):
        groups.setdefault(tuple(row[name] for name in tiles.KEY), []).append(row)
    found = []
    for key, rows in groups.items():
        timed = [row for row in rows if row["ms"]]
        own = next((row for row in rows if row["default"] == "1"), None)
        if not timed or own is None:
            continue
        best = min(timed, key=lambda row: float(row["ms"]))
        own_ms = float(own["ms"]) if own["ms"] else None
        configs = (ast.literal_eval(row["config"]) for row in (best, own))
        found.append(Winner(key, *configs, float(best["ms"]), own_ms))
    return found


Better = dict[tuple[str, ...], tuple[object, ...]]


def better_of(path: Path) -> Better:
    """The configurations that are better than the table's, by the key of a kernel."""
    return {winner.key: winner.config for winner in winners(path) if winner.better}


@contextlib.contextmanager
def applied(better: Better) -> Iterator[None]:
    """Makes the Triton engine use the winners' tiles for their kernels, the table's for others."""
    from fastclip.triton_kernels import configurations

    def choose(own: tiles.Choose, arguments: tuple[object, ...]) -> Any:
        config = better.get(tiles.key_of(arguments))
        return own(*arguments) if config is None else configurations.Config(*config)

    with tiles.choosing(choose):
        yield


def add_method(path: Path) -> None:
    """Registers the method WINNERS, which is timed in turns with the table's tiles."""
    own = registry.METHODS["fastclip triton"]
    text = f"{own.text} with the tiles of {path.name}"
    registry.METHODS[cases.WINNERS] = replace(
        own, name=cases.WINNERS, text=text, within=partial(applied, better_of(path))
    )


def find(path: Path | None, out: Path) -> Path | None:
    """The first run's file: `path` if given, else the one in `out` or in bench/results, if any."""
    places = [path] if path else [out / tiles.FILE, results.RESULTS / tiles.FILE]
    return next((place for place in places if place.exists()), None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.winners")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=results.RESULTS)
    options = parser.parse_args(arguments)
    found = winners(options.file)
    for winner in found:
        print(winner, flush=True)
    better = sum(winner.better for winner in found)
    print(f"{better} of {len(found)} entries of the table should change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
