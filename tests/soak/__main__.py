"""Long use of fastclip: `python -m tests.soak [steps] [ranks]`, from the repository's root.

`steps` makes 10,000 calls of losses and of `contrast` in one process, with random sizes, dtypes,
options, engines and threads; `ranks` makes 2,000 losses on 1 to 8 gloo ranks, half of them with a
fault of one rank. Results are compared with formulas in float64, and memory, file descriptors and
threads must not grow. Without a name both run. Each failure is printed with the command that
repeats it alone, and the tables are written as the run goes on.
"""

import os
import sys

# These are read when torch and Triton are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import importlib.util
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = str(HERE.parent)
COUNTS = {"steps": 10_000, "ranks": 2_000}


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=[[], *COUNTS], metavar="steps | ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first step or case")
    parser.add_argument("--count", type=int, help="steps or cases; default: 10,000 and 2,000")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each of the two")
    parser.add_argument("--tables", type=Path, default=HERE.parents[1] / "build" / "soak")
    given = parser.parse_args()
    if TESTS not in sys.path:
        sys.path.insert(0, TESTS)
    import warnings

    from soak import long
    from soak.meter import return_freed_memory

    return_freed_memory()
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("triton"):
        from support import interpreter

        interpreter.hasten()
        interpreter.mend()
    wrong = []
    for what in given.what or COUNTS:
        run = {"steps": long.steps, "ranks": long.cases}[what]
        wrong += run(
            given.first, given.count or COUNTS[what], given.seconds, given.seed,
            given.tables / f"{what}.csv", partial(print, flush=True),
        )  # fmt: skip
    print(f"{len(wrong)} failures")
    print(*(line for line in wrong if "again:" not in line), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
