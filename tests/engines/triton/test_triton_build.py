"""Every kernel of the Triton engine compiles for several cards, and fits them.

Shared memory is within the card's, nothing is spilled, arithmetics that have tensor cores use them,
and loads have 16 bytes. Registers and shared memory are those of `triton_resources.csv`, if the
installed Triton is the one that made it (`python triton_build.py table` makes it anew).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.triton_case import needs_triton

# `make test` compiles the usual steps of both losses for one card, `make test-cuda` all of them.
EVERY = ("sm_90", "sm_80", "sm_100", "sm_89", "gfx942")
BUILDS = [("sm_90", "few"), *(pytest.param((n,), marks=pytest.mark.minutes) for n in EVERY)]
pytestmark = needs_triton
on_each = pytest.mark.parametrize("build", BUILDS, ids=" ".join)

TABLE_OF = {"sm_89": "sm_86", "gfx942": "default"}
TILES = {
    "sweep_kernel", "sweep_edges_kernel", "sweep_apart_kernel", "weigh_kernel",
    "weigh_edges_kernel", "weigh_apart_kernel",
}  # fmt: skip
OTHERS = {
    "longest_kernel", "shift_kernel", "sums_kernel", "moments_kernel", "maxima_sums_kernel",
    "finish_kernel", "lines_kernel", "columns_kernel", "weigh_kept_kernel", "complete_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, ...], Future]]:
    """Starts every build that this run's tests need: all are queued at once, two run at a time."""
    # Imported here, since it needs Triton, which may be missing.
    from support.triton_build import built

    here = (item for item in request.session.items if item.module is request.module)
    wanted = dict.fromkeys(item.callspec.params["build"] for item in here)
    pool = ThreadPoolExecutor(2)
    yield {build: pool.submit(built, *build) for build in wanted}
    pool.shutdown(cancel_futures=True)  # a run that ends early waits for no build in the queue


@pytest.fixture
def rows(build: tuple[str, ...], builds: dict[tuple[str, ...], Future]) -> list[dict]:
    """Returns the rows of a build."""
    return builds[build].result()


def name(row: dict) -> str:
    return f"{row['architecture']} {row['kernel']} {row['case']}: {row}"


def has_product(row: dict) -> bool:
    """True if the kernel has a product on tensor cores: IEEE fp32 has none."""
    return row["kernel"] in TILES and "ieee" not in row["case"]


@on_each
def test_every_kernel_is_there(rows: list[dict], build: tuple[str, ...]) -> None:
    kernels = {row["kernel"] for row in rows}
    assert kernels >= (TILES if "few" in build else TILES | OTHERS)


@on_each
def test_shared_memory_fits(rows: list[dict]) -> None:
    from fastclip.triton_kernels.configurations import SHARED_MEMORY

    for row in rows:
        table = TABLE_OF.get(row["architecture"], row["architecture"])
        assert row["shared"] <= SHARED_MEMORY[table], name(row)


@on_each
def test_nothing_is_spilled(rows: list[dict]) -> None:
    """Kernels of four warps, two programs of which share a processor, may spill two registers: they
    were measured to be faster on an H100, by 20 % and more."""
    for row in rows:
        plain = row["kernel"] in ("sweep_kernel", "weigh_kernel")
        most = 2 if plain and row["architecture"] == "sm_90" and row["warps"] == 4 else 0
        assert row["spilled"] <= most and row["stack"] <= 4 * most, name(row)


@on_each
def test_products_run_on_tensor_cores(rows: list[dict]) -> None:
    for row in rows:
        if has_product(row):
            assert row["mma"] > 0, name(row)
            if row["architecture"] == "sm_90":
                assert row["wgmma"], name(row)


@on_each
def test_loads_are_wide(rows: list[dict]) -> None:
    """Loads have 16 bytes if rows begin on 16 bytes, also if no step divides D."""
    found = [row for row in rows if has_product(row) and "D=1001" not in row["case"]]
    assert found
    for row in found:
        assert row["wide"], name(row)


@on_each
def test_stores_are_wide(rows: list[dict], build: tuple[str, ...]) -> None:
    """Weights are stored 16 bytes at a time, or as whole tiles, for any M, N and D."""
    if build[0] == "gfx942":
        pytest.skip("stores are read in NVIDIA's disassembly")
    found = [r for r in rows if r["kernel"].startswith("weigh") or "kept" in r["case"].split()]
    tiles = [row for row in found if row["kernel"] in TILES | {"weigh_kept_kernel"}]
    assert tiles
    for row in tiles:
        widths = row["stores"].split()
        writes_tiles = row["kernel"].startswith("weigh") or "again" not in row["case"]
        assert not any(width.startswith(("8x", "16x")) for width in widths), name(row)
        if writes_tiles and row["kernel"] != "sweep_apart_kernel":
            assert "TMA" in widths or any(width.startswith("128x") for width in widths), name(row)


@on_each
def test_one_exponential_a_pair(rows: list[dict]) -> None:
    """In the first sweep each thread computes one exponential for each of its pairs. If weights are
    kept, ptxas computes 5 of 64 twice on sm_89, and 2 of 128 on sm_90, to save registers."""
    for row in rows:
        if row["kernel"] == "sweep_kernel" and row["architecture"] != "gfx942":
            bm, bn, _ = map(int, row["tile"].split("x"))
            anew = "kept" in row["case"].split() and row["architecture"] in ("sm_89", "sm_90")
            pairs = bm * bn // (32 * row["warps"])
            assert pairs <= row["exponentials"] <= pairs * (1.1 if anew else 1), name(row)


@on_each
def test_resources_are_the_recorded_ones(rows: list[dict], build: tuple[str, ...]) -> None:
    import triton
    from support.triton_build import COLUMNS, recorded

    version, expected = recorded()
    if triton.__version__ != version:
        pytest.skip(f"recorded with Triton {version}, this is {triton.__version__}")
    key = ("architecture", "kernel", "case")
    found = {tuple(r[k] for k in key): {c: str(r[c]) for c in COLUMNS} for r in rows}
    known = {tuple(row[k] for k in key): row for row in expected}
    if "few" in build:  # the table has one row for a kernel that cases share: the first case's
        found = {k: row for k, row in found.items() if k in known}
        assert {kernel for _, kernel, _ in found} >= TILES
    else:
        known = {k: row for k, row in known.items() if row["architecture"] == build[0]}
        assert found.keys() == known.keys()
    assert found == {k: known[k] for k in found}


@pytest.mark.minutes
@pytest.mark.parametrize("build", [("candidates",)], ids=" ".join)
def test_tile_candidates_fit_a_card_too(rows: list[dict]) -> None:
    """The tiles that are timed against the table's spill at most four registers."""
    from fastclip.triton_kernels.configurations import SHAPES, SHARED_MEMORY

    assert {row["kernel"] for row in rows} == {*SHAPES}
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY["sm_90"], row
        assert row["stack"] <= 16 and row["wgmma"] and "16x" not in row["stores"], row
