"""Calls losses, `contrast` and retrieval on the CPU engine, at the edges of its strips and tiles.

    python -m support.sanitized.exercise CALLS SEED

prints a line for each wrong result, and the number of those. Sanitizers end the process at their
first report.
"""

import sys
import warnings

import numpy as np
import torch
from soak.drawn import LOSSES, decides_by_comparison, draw, pick
from soak.stepped import wrong_in

import fastclip
from fastclip import retrieval

SIZES = (1, 2, 3, 5, 7, 13, 31, 63, 64, 65, 97, 127, 128, 129, 257, 383)
WIDE = 1025  # columns from which tiles are larger
WIDTHS = (1, 7, 96, 832)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wrong_in_retrieval(rng: np.random.Generator) -> list[str]:
    """Returns the functions whose results are not those of plain PyTorch."""
    m, n, d, dtype = pick(rng, SIZES), pick(rng, SIZES), pick(rng, WIDTHS), pick(rng, DTYPES)
    k = int(rng.integers(1, n + 3))
    x, y = (torch.from_numpy(rng.integers(-2, 3, (rows, d))).to(dtype) for rows in (m, n))
    ids = tuple(torch.from_numpy(rng.integers(0, 9, rows)) for rows in (m, n))
    calls = {
        "ranks": lambda **o: retrieval.ranks(x, y, ids=ids, **o),
        "topk": lambda **o: retrieval.topk(x, y, k, ids=ids, max_score=2.0, **o),
        "sample_negatives": lambda **o: retrieval.sample_negatives(x, y, 0.1, ids=ids, seed=k, **o),
    }
    return [
        f"{name}, {m} x {n} x {d} {dtype}, k = {k}"
        for name, call in calls.items()
        if not all(map(torch.equal, call(backend="cpu"), call(backend="torch")))
    ]


def main() -> int:
    calls, seed = map(int, sys.argv[1:])
    warnings.simplefilter("ignore")
    wrong = 0
    for k in range(calls):
        step = draw(seed, k, {"cpu": 1.0})
        rng = np.random.default_rng([seed, k, 2])
        m, n, d = pick(rng, SIZES), pick(rng, SIZES), pick(rng, WIDTHS)
        if rng.random() < 0.03:
            n, m = (WIDE, m) if step.is_contrast else (n, WIDE)
        if d == 1 and (
            step.is_contrast or step.normalize or decides_by_comparison(LOSSES[step.name])
        ):
            d = 7  # features of one number and of one length tie
        batch = "random" if d == 1 else step.batch_name
        cuts = tuple(min(cut, m) for cut in step.cuts[:-1]) + ((m,) if step.cuts else ())
        cuts = tuple(sorted(set(cuts)))
        step = step._replace(shape=(m, n, d), batch_name=batch, cuts=cuts)
        for line in (*wrong_in(step), *wrong_in_retrieval(rng)):
            wrong += 1
            print(step, line, sep="\n  ", flush=True)
    info = fastclip.build_info()
    print(f"{wrong} wrong, {info['capability']}, {info['product']}, {info['compiler']}")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
