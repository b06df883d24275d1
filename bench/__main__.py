"""The command line of the benchmark: `python -m bench`, from the root of the repository."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from . import cases
from .report import results

ROOT = Path(__file__).resolve().parents[1]
SECONDS, QUICK_SECONDS = 6.0, 0.5

EPILOG = """\
  python -m bench --quick                       a short run of two minutes, not in bench/results
  python -m bench --only 'clip 8192*float32*'   runs these cases again and replaces their rows
  python -m bench --list --full                 lists what would run and what cannot
  python -m bench --family                      measures the losses other than CLIP and SigLIP
  python -m bench distributed --quick           measures losses across processes here
  python -m bench hosts                         measures integrations beside their hosts
  python -m bench retrieval                     measures ranks, the best keys, sampled negatives
  python -m bench scale --tflops 400            models their time on thousands of GPUs

Without a command it is `run`; COMMAND --help lists a command's options. Run it with nothing else on
the machine: runs are interleaved, so that a steady load slows all methods alike, but a load that
comes and goes still widens the quartiles. results.Row and distributed/row.py document the columns.
"""
COMMANDS = {
    "run": "measures losses in one process (the default)",
    "distributed": "measures losses across processes on this machine",
    "hosts": "measures losses of fastclip.integrations beside their hosts'",
    "retrieval": "measures retrieval without the matrix of scores",
    "scale": "models the time of losses on thousands of GPUs",
    "table": "prints CSVs as Markdown, with quartiles",
    "plot": "draws CSVs as PNGs beside them",
    "readme": "writes tables to README.md and docs/benchmarks*.md",
}


def parser() -> argparse.ArgumentParser:
    """The parser of every command. `scale` has only its name here: its module parses the rest."""
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time, memory and error of the losses and of those that they replace.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    of = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in COMMANDS.items()
    }
    _add_measuring(
        of["run"], full="also N = 16384 and 65536, streaming only",
        family="InfoNCE, SupCon, NT-Xent, ranking, distillation, ...",
    )  # fmt: skip
    _add_measuring(of["distributed"])
    _add_measuring(of["hosts"])
    _add_measuring(of["retrieval"])
    of["run"].add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    of["run"].add_argument("--no-errors", action="store_true", help="leave out the errors")
    for name in ("table", "plot", "readme"):
        of[name].add_argument(
            "--csv", nargs="+", type=Path, default=[], metavar="FILE",
            help="the files to read (default: those of bench/results)",
        )  # fmt: skip
    of["readme"].add_argument(
        "--pages", type=Path, default=ROOT, metavar="DIR",
        help="the folder in which to write, between the markers of README.md and "
        "docs/benchmarks*.md (default: the repository). With --csv README.md stays as it is.",
    )  # fmt: skip
    return made


def _add_measuring(made: argparse.ArgumentParser, full: str = "", family: str = "") -> None:
    """Adds the options of a command that measures. full, family: what these plans have, if the
    command has them."""
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few and small cases, in minutes")
    if full:
        size.add_argument("--full", action="store_true", help=full)
        size.add_argument("--family", action="store_true", help=f"instead {family}")
    made.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cases by name")
    made.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="methods by name")
    made.add_argument(
        "--list", action="store_true", help="list cases and methods without measuring"
    )
    made.add_argument("--seconds", type=float, help="seconds for the rounds of one case")
    made.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    made.add_argument(
        "--csv", type=Path, metavar="FILE", help="the file to write (default: in bench/results)"
    )


def plan_of(options: argparse.Namespace) -> list[cases.Case]:
    """The cases that the options select; if there are none, an error says how to list them."""
    known = (*cases.METHODS, *cases.FAMILY_PEERS)
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        raise SystemExit(f"--methods: {unknown[0]!r} is none of {', '.join(known)}")
    chosen = (plan for plan in ("quick", "full", "family") if getattr(options, plan))
    made = getattr(cases, next(chosen, "standard"))()
    plan = cases.select(made, options.only, options.methods)
    if not plan:
        raise SystemExit("no case matches; python -m bench --list names them")
    return plan


def show_plan(plan: list[cases.Case], device: str) -> None:
    """Prints the cases, then every method with the reason why it cannot run, if there is one."""
    from .methods.registry import METHODS, Unavailable

    for case in plan:
        print(case.name)
    print(f"\n{len(plan)} cases, {sum(len(case.methods) for case in plan)} rows. Methods:")
    for method in METHODS.values():
        reasons = []
        losses = dict.fromkeys(case.loss for case in plan)
        for loss in losses:
            try:
                method.make(cases.Case(loss, 64, 64, 64, "float32", 14.3), device)
            except (Unavailable, ImportError) as error:
                reasons.append(str(error))
        runs = len(reasons) < len(losses)
        availability = "runs here" if runs else "; ".join(dict.fromkeys(reasons))
        print(f"  {method.name:24} {method.text:38} {availability}")


def measure(options: argparse.Namespace) -> int:
    """Runs the plan, then prints its table."""
    # Fails here, not after the other methods were measured, if fastclip cannot be imported.
    import fastclip  # noqa: F401

    from .measure import runner
    from .report import table

    plan = plan_of(options)
    if options.list:
        show_plan(plan, options.device)
        return 0
    path = _path_of(options, results.RESULTS)
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    chosen = runner.Options(
        path, seconds, options.device, not options.no_memory, not options.no_errors
    )
    return _finish(path, lambda: table.report(runner.run(plan, chosen)))


def measure_across_processes(options: argparse.Namespace) -> int:
    """Runs the plan for losses across processes, then prints its table."""
    from .distributed import cases as across
    from .distributed import row, runner, table

    made = across.quick() if options.quick else across.standard()
    plan = cases.matching(made, options.only)
    plan = [case for case in plan if runner.taking_part(case, options.methods)]
    if not plan:
        raise SystemExit("no case matches; python -m bench distributed --list names them")
    if options.list:
        for case in plan:
            print(f"{case.name}: {', '.join(runner.taking_part(case, options.methods))}")
        return 0
    path = _path_of(options, row.RESULTS)
    seconds = options.seconds or (runner.QUICK_SECONDS if options.quick else runner.SECONDS)
    chosen = runner.Options(path, seconds, not options.no_memory)
    return _finish(path, lambda: table.report(runner.run(plan, chosen, options.methods)))


def measure_in_hosts(options: argparse.Namespace) -> int:
    """Runs the plan for hosts' losses, then prints its table."""
    from .hosts import cases as of_hosts
    from .hosts import row, runner, table

    made = of_hosts.quick() if options.quick else of_hosts.standard()
    return _measure_plan(options, made, row.RESULTS, runner, table)


def measure_retrieval(options: argparse.Namespace) -> int:
    """Runs the plan for retrieval, then prints its table."""
    from .retrieval import cases as of_retrieval
    from .retrieval import row, runner, table

    made = of_retrieval.quick() if options.quick else of_retrieval.standard()
    return _measure_plan(options, made, row.RESULTS, runner, table)


def _measure_plan(
    options: argparse.Namespace, made: list[Any], folder: Path, runner: ModuleType,
    table: ModuleType,
) -> int:  # fmt: skip
    """Runs those cases of a plan that the options select, then prints their table."""
    plan = cases.matching(made, options.only)
    if not plan:
        raise SystemExit(f"no case matches; python -m bench {options.command} --list names them")
    if options.list:
        print("\n".join(case.name for case in plan))
        return 0
    path = _path_of(options, folder)
    seconds = options.seconds or (runner.QUICK_SECONDS if options.quick else runner.SECONDS)
    chosen = runner.Options(path, seconds, not options.no_memory)
    return _finish(path, lambda: table.report(runner.run(plan, chosen)))


def _path_of(options: argparse.Namespace, folder: Path) -> Path:
    """The CSV that a run writes; quick runs write to build/, not to the committed folder."""
    if options.csv:
        return options.csv
    if options.quick:
        folder = ROOT / "build" / "bench" / folder.relative_to(results.RESULTS)
    return folder / f"{results.machine_row(getattr(options, 'device', 'cpu')).machine}.csv"


def _finish(path: Path, run: Callable[[], str]) -> int:
    """Prints the text that `run` returns. Returns the exit status."""
    try:
        print(run())
    except KeyboardInterrupt:
        print(f"\nInterrupted; finished cases are in {path}", file=sys.stderr)
        return 130
    print(f"\nRows in {os.path.relpath(path)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not {*COMMANDS, "-h", "--help"} & set(arguments[:1]):
        arguments = ["run", *arguments]
    if arguments[0] == "scale":
        from .report import table
        from .scale import page

        return page.main(arguments[1:], table.committed())
    options = parser().parse_args(arguments)
    measures = {
        "run": measure, "distributed": measure_across_processes, "hosts": measure_in_hosts,
        "retrieval": measure_retrieval,
    }  # fmt: skip
    return measures.get(options.command, show)(options)


def show(options: argparse.Namespace) -> int:
    """Prints tables, draws pictures or writes pages, from the files given or the committed ones."""
    from .distributed import row
    from .distributed import table as across
    from .hosts import row as host_row
    from .hosts import table as of_hosts
    from .report import family, plot, summary, table
    from .retrieval import row as retrieval_row
    from .retrieval import table as of_retrieval
    from .scale import page

    paths = options.csv or [*table.committed(), *row.committed()]
    if not paths:
        raise SystemExit(f"no CSV in {results.RESULTS}: run `python -m bench` first")
    of_ranks = [path for path in paths if results.holds(path, row.Row)]
    of_one = [path for path in paths if path not in of_ranks]
    if options.command == "plot":
        for path in of_one:
            rows = results.read(path)
            for picture in (
                plot.draw(rows, path.with_suffix(".png")),
                plot.draw_summary(rows, path.with_name(f"{path.stem}-summary.png")),
            ):
                print(os.path.relpath(picture) if picture else f"{path}: too few sizes to plot")
        if not options.csv:
            print(os.path.relpath(page.draw(of_one)))
    elif options.command == "readme":
        docs = options.pages / "docs"
        if of_one:
            table.into_page(docs / "benchmarks.md", of_one)
            family.into_page(docs / "benchmarks-family.md", of_one)
        if of_ranks:
            across.into_page(docs / "benchmarks-distributed.md", of_ranks)
        if not options.csv:
            of_hosts.into_page(docs / "sentence-transformers.md", host_row.committed())
            of_retrieval.into_page(docs / "retrieval.md", retrieval_row.committed())
            page.into_page(docs / "benchmarks-distributed.md", of_one)
            summary.into_readme(options.pages / "README.md", of_one)
        print(f"Wrote the tables of {', '.join(path.name for path in paths)} to {options.pages}")
    else:
        reports = [table.report(results.read(path)) for path in of_one]
        reports += [across.report(results.read(path, row.Row)) for path in of_ranks]
        print("\n\n".join(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
