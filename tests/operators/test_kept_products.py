"""The second sweep reads the products that the first one kept, and results do not change.

This holds for every budget, matrix product and instruction set, in either sweep.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.block_cases import (
    SHAPES,
    SMALL,
    compiled_only,
    everywhere,
    for_every_kind,
    in_every_dtype,
)
from support.block_operators import make_weights, sweep, weigh
from support.dense_block import DTYPES, accumulator, make_block
from support.dense_truth import Dense, assert_gradients, assert_states

import fastclip
from fastclip.engine.kept import rows_to_keep

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")


@compiled_only
@everywhere
@in_every_dtype
@for_every_kind
def test_kept_products_do_not_change_results(kind: str, dtype: str, shape: str) -> None:
    """Budgets hold no row, some rows, all rows, and more than all."""
    block = make_block(*SHAPES[shape], DTYPES[dtype], kind=kind, offset=-3, factors=(True, True))
    dense = Dense(block)
    long, short = max(dense.m, dense.n), min(dense.m, dense.n)
    itemsize = accumulator(block.x.dtype).itemsize
    budgets = (0, 16 * short * itemsize, long // 2 * short * itemsize, 1 << 40)
    sizes = set()
    for budget in budgets:
        keep = rows_to_keep(dense.m, dense.n, itemsize, budget)
        state, positive, kept = sweep("cpu", block, keep)
        assert kept.shape == (keep * short,) and kept.nbytes <= budget
        sizes.add(kept.numel())
        assert_states(dense, state, positive, f"{keep} rows")
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        for _ in range(2):  # reading kept products does not change them
            results = weigh("cpu", block, state, positive, weights, kept)
            assert_gradients(dense, exact, results, what=f"{keep} rows")
    assert len(sizes) > 2


@compiled_only
@for_every_kind
def test_any_number_of_kept_rows(kind: str) -> None:
    """Rows are kept in whole registers; those that do not fill one are computed again."""
    for shape in SMALL:
        block = make_block(*SHAPES[shape], kind=kind)
        dense = Dense(block)
        for keep in (1, 15, 17, 64, 65, 149, 150, 151, 160):
            state, positive, kept = sweep("cpu", block, keep)
            assert_states(dense, state, positive, f"{keep} rows")
            weights = make_weights(state, dense.m)
            exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
            results = weigh("cpu", block, state, positive, weights, kept)
            assert_gradients(dense, exact, results, what=f"{keep} rows")


@compiled_only
@for_every_kind
def test_the_second_sweep_reads_kept_products(kind: str) -> None:
    for shape in SMALL:
        block = make_block(*SHAPES[shape], kind=kind)
        m, n, _ = SHAPES[shape]
        state, positive, kept = sweep("cpu", block, rows_to_keep(m, n, 4, 1 << 40))
        weights = make_weights(state, m)
        before = weigh("cpu", block, state, positive, weights, kept)
        kept.zero_()
        after = weigh("cpu", block, state, positive, weights, kept)
        for one, other in zip(before, after, strict=True):
            assert not torch.allclose(one, other)


@compiled_only
@pytest.mark.parametrize("products", [("brgemm", "mm"), ("mm", "brgemm")], ids=" to ".join)
@everywhere
@in_every_dtype
@for_every_kind
def test_one_product_reads_what_another_kept(
    kind: str, dtype: str, shape: str, products: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FASTCLIP_CPU may switch to another matrix product between the sweeps."""
    if (fastclip.build_info() or {})["product"] != "brgemm":
        pytest.skip("this machine has no brgemm")
    block = make_block(*SHAPES[shape], DTYPES[dtype], kind=kind, offset=-3, factors=(True, True))
    dense = Dense(block)
    itemsize = accumulator(block.x.dtype).itemsize
    half = dense.m * dense.n // 2 * itemsize
    for budget in (half, 1 << 40):
        monkeypatch.setenv("FASTCLIP_CPU", products[0])
        keep = rows_to_keep(dense.m, dense.n, itemsize, budget)
        state, positive, kept = sweep("cpu", block, keep)
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        monkeypatch.setenv("FASTCLIP_CPU", products[1])
        results = weigh("cpu", block, state, positive, weights, kept)
        assert_gradients(dense, exact, results, what=f"{keep} rows")


EXCHANGE = """
import sys
from pathlib import Path
import torch
from support.block_cases import SHAPES
from support.block_operators import make_weights, sweep, weigh
from support.dense_block import DTYPES, KINDS, accumulator, make_block
from support.dense_truth import Dense, assert_gradients
import fastclip
from fastclip.engine.kept import rows_to_keep

own, *others = map(Path, sys.argv[1:])
assert fastclip.build_info()["capability"] == own.name.upper()

def cases():
    for kind in KINDS:
        for dtype in DTYPES.values():
            for shape, sizes in SHAPES.items():
                block = make_block(*sizes, dtype, kind=kind, offset=-3, factors=(True, True))
                yield f"{kind}, {dtype}, {shape}", block

if not others:
    swept = {}
    for name, block in cases():
        m, n, itemsize = len(block.x), len(block.y), accumulator(block.x.dtype).itemsize
        keep = rows_to_keep(m, n, itemsize, m * n // 2 * itemsize)
        swept[name] = sweep("cpu", block, keep)
    torch.save(swept, own)
for other in others:
    swept = torch.load(other)
    for name, block in cases():
        dense = Dense(block)
        state, positive, kept = swept[name]
        weights = make_weights(state, dense.m)
        exact = dense.gradients(dense.activations(state, weights.coefficients), weights)
        results = weigh("cpu", block, state, positive, weights, kept)
        assert_gradients(dense, exact, results, what=f"{name}, from {other.name}")
"""


@compiled_only
def test_one_instruction_set_reads_what_another_kept(tmp_path: Path) -> None:
    """A process has one instruction set, but another process may read the products that it kept."""
    names = ("default", "avx2", "avx512")
    # This machine may lack the newest instruction sets.
    available = names[: 1 + names.index(torch.backends.cpu.get_cpu_capability().lower())]

    def run(capability: str, *others: str) -> None:
        # Scripts find `support` through the working directory, which PYTHONSAFEPATH would exclude.
        environment = os.environ | {
            "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "",
        }  # fmt: skip
        files = (str(tmp_path / name) for name in (capability, *others))
        done = subprocess.run(
            [sys.executable, "-c", EXCHANGE, *files], env=environment, capture_output=True,
            text=True, timeout=300, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, available))
        # Each process reads the products of its predecessor, and the first one those of the last.
        list(pool.map(run, available, (available[-1], *available[:-1])))


@pytest.mark.parametrize("m, n", [(1, 1), (15, 16), (17, 5), (5, 17), (1000, 64), (64, 1000)])
def test_rows_to_keep_fit_the_budget(m: int, n: int) -> None:
    long, short = max(m, n), min(m, n)
    everything = -(-long // 16) * 16
    for itemsize in (4, 8):
        for rows in (0, 1, 15, 16, 17, 32, everything - 1, everything, everything + 100):
            keep = rows_to_keep(m, n, itemsize, rows * short * itemsize)
            assert keep == min(rows // 16 * 16, everything)


def test_the_plain_engine_keeps_nothing() -> None:
    with pytest.raises(ValueError, match=r"keep must be 0.*got 16"):
        sweep("torch", make_block(20, 20, 4), keep=16)
