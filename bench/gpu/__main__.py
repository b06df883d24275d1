"""The command line of `make gpu`: `python -m bench.gpu`, from the root of the repository."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ..report import results
from . import plan, report, steps


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Checks and times the engines on a CUDA device, within eight minutes.",
    )
    made.add_argument("--check", action="store_true", help="only check that there is a GPU")
    made.add_argument("--again", action="store_true", help="make the second run (four minutes)")
    made.add_argument("--only", nargs="+", metavar="STEP", help="run these steps, in this order")
    made.add_argument("--bundle", type=Path, metavar="FOLDER", help="a bundle of make gpu-bundle")
    made.add_argument("--winners", type=Path, metavar="FILE", help="a first run's gpu-tiles.csv")
    made.add_argument("--seconds", type=float, help="limit of the run (480; with --again 240)")
    made.add_argument("--out", type=Path, help="folder of the results ($OUT, else bench/results)")
    made.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    began = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 2
    if options.check:
        return 0
    if options.bundle and not options.bundle.is_dir():
        print(f"make gpu: BUNDLE must be a folder, got {options.bundle}", file=sys.stderr)
        return 2
    seconds = options.seconds or (plan.AGAIN_SECONDS if options.again else plan.FIRST_SECONDS)
    out = (options.out or Path(os.environ.get("OUT") or results.RESULTS)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    session = steps.Session(
        out, began + seconds, options.device, options.again, options.bundle, options.winners
    )
    session.file("log.txt").write_text("")
    todo = plan.again() if options.again else plan.first()
    if options.only:
        by_name = {step.name: step for step in todo}
        if unknown := set(options.only) - set(by_name):
            print(
                f"make gpu: --only takes {', '.join(by_name)}, got {', '.join(sorted(unknown))}",
                file=sys.stderr,
            )
            return 2
        todo = [by_name[name] for name in options.only]
    return run(todo, session)


def run(todo: list[steps.Step], session: steps.Session) -> int:
    """Runs the steps, then prints the report, even if Ctrl-C or a scheduler ends the run."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        steps.run_all(todo, session)
        return report.exit_status(session)
    except KeyboardInterrupt:
        session.say("interrupted")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        session.say(report.report(session))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
