"""Runs a host's own tests of its losses, with the host as it is and with fastclip in it.

    python -m tests.peers.host_suites sentence_transformers CHECKOUT
    python -m tests.peers.host_suites lightly CHECKOUT 'tests/loss/test_ntx*.py'

CHECKOUT is a clone of the host's repository; its tests run on the host that is installed. Without
patterns these are its tests of losses in files that name a class of ours. Prints a
Markdown table of the tests that pass, file by file. Nothing is downloaded: models of `stand_ins`
have the names of some that tests of sentence-transformers load. Tests that fail without fastclip
count in neither column. The exit status is 1 if a test fails with fastclip alone; its name is
printed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent


class Suite(NamedTuple):
    """A host's module of fastclip.integrations, and its tests of losses: the files that have one of
    `words`, which are names of our classes and of the host's heirs of these."""

    integration: str
    files: str
    words: tuple[str, ...]

    def files_in(self, checkout: Path) -> list[Path]:
        found = sorted(checkout.glob(self.files))
        return [file for file in found if any(word in file.read_text() for word in self.words)]


SUITES = {
    "sentence_transformers": Suite(
        "sentence_transformers", "tests/s*/losses/test_*.py", ("MultipleNegatives", "GISTEmbed")
    ),
    "pytorch_metric_learning": Suite(
        "metric_learning", "tests/losses/test_*.py", ("NTXentLoss", "SupConLoss")
    ),
    "lightly": Suite("lightly", "tests/loss/test_*.py", ("NTXentLoss", "DCLLoss")),
}

# ---- as a plugin of pytest, in the host's checkout ---------------------------------------------

_outcomes: dict[str, str] = {}
_fallbacks: Counter[str] = Counter()


def _prepare(host: str, how: str) -> None:
    """Imports the host before the checkout can stand in its place, and patches it."""
    from support.peers import peer

    from fastclip.integrations.host import Host

    peer(host)
    if host == "sentence_transformers":
        import stand_ins

        stand_ins.make(Path(os.environ["HF_HUB_CACHE"]))
    if how == "control":
        return
    falls_back = Host.falls_back

    def counted(self: Host, reason: str) -> None:
        _fallbacks[reason] += 1
        falls_back(self, reason)

    Host.falls_back = counted
    importlib.import_module(f"fastclip.integrations.{SUITES[host].integration}").patch()


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        before = _outcomes.get(report.nodeid, "passed")
        _outcomes[report.nodeid] = report.outcome if before == "passed" else before


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _outcomes[report.nodeid] = "failed"


def pytest_sessionfinish(session: Any) -> None:
    if path := os.environ.get("HOST_SUITES_FILE"):
        Path(path).write_text(json.dumps({"outcomes": _outcomes, "fallbacks": _fallbacks}))


if "HOST_SUITES" in os.environ:
    _prepare(*os.environ["HOST_SUITES"].split(":"))

# ---- as a script -------------------------------------------------------------------------------


def run(host: str, checkout: Path, files: Iterable[Path], how: str) -> dict[str, Any]:
    """Runs the files; returns each test's outcome, and how often the host's code served a call."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        # An empty path would stand for the checkout.
        paths = [HERE, HERE.parent, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1",
            "TEST_DEVICE": "cpu", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(folder) / "hub"),
            "HOST_SUITES": f"{host}:{how}", "HOST_SUITES_FILE": str(found),
        }  # fmt: skip
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "host_suites",
            "--continue-on-collection-errors",
        ]
        command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if not found.exists():
            raise SystemExit(f"pytest did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return json.loads(found.read_text())


def table(control: dict[str, str], patched: dict[str, str]) -> str:
    """The passing tests of each file, without and with fastclip."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for test, outcome in control.items():
        name = test.partition("::")[0]
        counts[name][outcome] += 1
        counts[name]["ours"] += outcome == patched.get(test) == "passed"
    lines = ["| tests | host | with fastclip | cannot run here |", "|---|---|---|---|"]
    for name, count in sorted(counts.items()):
        other = count["failed"] + count["skipped"]
        lines.append(f"| {name} | {count['passed']} | {count['ours']} | {other or ''} |")
    total = [sum(count[key] for count in counts.values()) for key in ("passed", "ours")]
    return "\n".join([*lines, f"| all | {total[0]} | {total[1]} | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("host", choices=SUITES)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="patterns in the checkout (default: its losses)")
    options = parser.parse_args()
    if options.files:
        files = [file for one in options.files for file in sorted(options.checkout.glob(one))]
    else:
        files = SUITES[options.host].files_in(options.checkout)
    if not files:
        raise SystemExit(f"no files of {options.host}'s tests in {options.checkout}")
    files = [file.relative_to(options.checkout) for file in files]
    runs = [run(options.host, options.checkout, files, how) for how in ("control", "patched")]
    control, patched = (found["outcomes"] for found in runs)
    print(table(control, patched))
    for reason, count in runs[1]["fallbacks"].items():
        print(f"\nthe host's own code served {count} calls: {reason}")
    lost = [t for t, o in control.items() if o == "passed" and patched.get(t) != "passed"]
    print(*(f"\nfails with fastclip: {test}" for test in lost), sep="")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
