"""The emulated CUDA engine with the fused epilogues in it: both sweeps against the dense truth.

    python engine.py     prints how often each fused kernel ran, and the second with two shifts

It runs in its own process, since torch accepts one implementation of an operator.
"""

import ctypes
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from emulation.sm90 import build
from support import cuda_case

KERNELS = build.emulated_kernels()


def link_fused() -> None:
    """Makes cuda_case build the engine with the fused path, and link the kernels."""
    # cuda_case hashes only its own sources, so the folder is named after the kernels' library.
    cuda_case.FOLDER = build.FOLDER / f"engine-of-{KERNELS.name}"
    cuda_case.UNITS["cuda/engine.cu"].append("-DFASTCLIP_FUSED=1")
    run = cuda_case.run

    def run_with_kernels(command: list[str]) -> None:
        run([*command, str(KERNELS)] if "-shared" in command else command)

    cuda_case.run = run_with_kernels
    os.environ["FASTCLIP_CUDA_TILES"] = "fused"


def main() -> None:
    kernels = ctypes.CDLL(str(KERNELS))
    link_fused()
    cuda_case.emulated()

    from support.dense_block import DTYPES, KINDS, make_block
    from support.gpu_engine_case import check, check_in_one_go
    from support.masked_cases import OPTIONS, check_masked, masked_blocks

    halves = DTYPES["bfloat16"], DTYPES["float16"]
    shapes = [(129, 257, 16, 3), (300, 130, 24, -140), (1, 300, 8, 299), (140, 1, 8, 0)]
    for kind, dtype, (m, n, d, offset) in itertools.product(KINDS, halves, shapes):
        for factors in ((False, False), (True, True)):
            block = make_block(m, n, d, dtype, kind=kind, offset=offset, factors=factors)
            check("cuda", block, what=f"{kind} {dtype} {m} x {n} {factors=}")
    # Chunks, whose positives, factors and weights begin anywhere.
    with cuda_case.chunks(128, 144):
        for kind, dtype in itertools.product(KINDS, halves):
            block = make_block(200, 300, 16, dtype, kind=kind, offset=60, factors=(True, False))
            check("cuda", block, what=f"{kind} {dtype} in chunks")
    # No fused kernel runs both sweeps in one go; partial sums have the other kernels' layout.
    for dtype in halves:
        check_in_one_go("cuda", make_block(140, 200, 16, dtype, kind="sigmoid", offset=30))
    # At this scale every line has its own shift.
    for dtype in halves:
        block = make_block(150, 140, 16, dtype, scale=500.0)
        check("cuda", block, what=f"{dtype} two shifts")
    # Blocks with options take the library's tiles.
    for options in OPTIONS:
        for _, block in masked_blocks((140, 200, 16), halves[0], options):
            check_masked("cuda", block, options)
    counts = ("emulated_sweeps", "emulated_weighs", "emulated_differ")
    print(*(ctypes.c_int.in_dll(kernels, name).value for name in counts))


if __name__ == "__main__":
    main()
