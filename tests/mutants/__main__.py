"""Runs mutants and prints a table; the exit status is 1 unless all were killed.

make mutants                                    all of them
make mutants ARGS='--area cpu'                  those of an area
make mutants ARGS='"cpu: bf16*" "*ring*"'       those whose names match
make mutants ARGS=--list                        lists them
"""

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from mutants.lists import AREAS, Area
from mutants.mutant import Mutant
from mutants.tree import copy_of_checkout
from mutants.trial import SECONDS, DoesNotBuild, Outcome, Verdict, run_tests, trial

Entry = tuple[str, Mutant]  # with its area


def chosen(areas: dict[str, Area], area: str | None, patterns: Sequence[str]) -> list[Entry]:
    """Returns the mutants of an area (None: all) whose "area: name" matches a pattern, if any."""
    every = [(name, one) for name, found in areas.items() for one in found.mutants]
    return [
        (name, one)
        for name, one in every
        if area in (None, name)
        and (not patterns or any(fnmatch.fnmatch(f"{name}: {one.name}", p) for p in patterns))
    ]


def check_unmutated(entries: Sequence[Entry], areas: dict[str, Area], tree: Path) -> str:
    """Builds a copy and runs all tests of the mutants once; returns what failed."""
    for name in dict.fromkeys(name for name, _ in entries):
        if build := areas[name].build:
            try:
                build.make(tree, None)
            except DoesNotBuild as reason:
                return f"{name} does not build without a mutant:\n{reason}"
        mine = [one for area, one in entries if area == name]
        tests = list(dict.fromkeys(test for one in mine for test in one.tests))
        try:
            code, output = run_tests(tests, tree, SECONDS * len(mine))
        except subprocess.TimeoutExpired as reason:
            return f"{name} without a mutant: {reason}"
        if code or " passed" not in output:
            return f"{name} does not pass without a mutant:\n{output}"
    return ""


def run(
    entries: Sequence[Entry], areas: dict[str, Area], trees: Sequence[Path],
    seconds: float = SECONDS,
) -> list[Outcome]:  # fmt: skip
    """Tries every mutant, as many at a time as there are trees, and prints each outcome."""
    free: SimpleQueue[Path] = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(entry: Entry) -> Outcome:
        tree = free.get()
        try:
            outcome = trial(entry[1], tree, areas[entry[0]].build, seconds)
        finally:
            free.put(tree)
        print(row(entry, outcome), flush=True)
        return outcome

    with ThreadPoolExecutor(len(trees)) as pool:
        try:
            return list(pool.map(one, entries))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # ends after the mutants that are being tried
            raise


def status(outcomes: Sequence[Outcome]) -> int:
    """The exit status: 0 if all mutants were killed."""
    return int(any(outcome.verdict is not Verdict.KILLED for outcome in outcomes))


def row(entry: Entry, outcome: Outcome) -> str:
    area, mutant = entry
    return (
        f"{outcome.verdict.value:13} {outcome.seconds:4.0f} s  {area}: {mutant.name} "
        f"({mutant.path})  {outcome.said}"
    )


def summary(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> str:
    """Returns a line for each area, and the mutants that were not killed."""
    lines = []
    for area in dict.fromkeys(area for area, _ in entries):
        found = Counter(
            o.verdict.value for (name, _), o in zip(entries, outcomes, strict=True) if name == area
        )
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(found.items()))
        lines.append(f"{area:12} {sum(found.values()):3} mutants: {counts}")
    for entry, outcome in zip(entries, outcomes, strict=True):
        if outcome.verdict is not Verdict.KILLED:
            lines.append(row(entry, outcome))
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help='patterns of "area: name"')
    parser.add_argument("--area", choices=AREAS)
    parser.add_argument("--list", action="store_true", help="lists the mutants, and runs none")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    given = parser.parse_args(arguments)
    entries = chosen(AREAS, given.area, given.names)
    if not entries:
        parser.error("no mutant matches")
    if given.list:
        print("\n".join(f"{area}: {one.name} ({one.path})" for area, one in entries))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastclip-mutants-") as folder:
        trees = [Path(folder) / str(k) for k in range(min(given.jobs, len(entries)))]
        copy_of_checkout(trees[0])
        if failure := check_unmutated(entries, AREAS, trees[0]):
            print(failure)
            return 1
        print(f"without a mutant all tests pass ({time.monotonic() - began:.0f} s)", flush=True)
        for tree in trees[1:]:
            shutil.copytree(trees[0], tree, symlinks=True)
        outcomes = run(entries, AREAS, trees)
    print(f"\n{summary(entries, outcomes)}\n{time.monotonic() - began:.0f} s")
    return status(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
