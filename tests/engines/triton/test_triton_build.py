"""Every kernel of the Triton engine compiles for cards that are not here, and fits them.

Shared memory within the card's, nothing spilled, tensor cores where the arithmetic has them, loads
of 16 bytes; registers and shared memory as recorded in `triton_resources.csv`, where the Triton
installed is the one that made it (`python triton_build.py table` makes it anew).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from support.triton_case import needs_triton

# `make test` has the time for one card and usual steps of both losses, `make test-cuda` for all.
EVERY = ("sm_90", "sm_80", "sm_100", "sm_89", "gfx942")
BUILDS = [("sm_90", "few"), *(pytest.param((n,), marks=pytest.mark.minutes) for n in EVERY)]
pytestmark = needs_triton
on_each = pytest.mark.parametrize("build", BUILDS, ids=" ".join)

TABLE_OF = {"sm_89": "sm_86", "gfx942": "default"}
TILES = {
    "sweep_kernel", "sweep_edges_kernel", "maxima_kernel", "weigh_kernel", "weigh_edges_kernel",
    "weigh_apart_kernel",
}  # fmt: skip
OTHERS = {
    "longest_kernel", "shift_kernel", "sums_kernel", "moments_kernel", "maxima_sums_kernel",
    "finish_kernel", "lines_kernel", "columns_kernel", "weigh_kept_kernel", "complete_kernel",
}  # fmt: skip


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, ...], Future]]:
    """Every build that this run's tests ask for: queued at once, and two run at a time."""
    # Not above: where Triton is missing there is nothing to import.
    from support.triton_build import built

    here = (item for item in request.session.items if item.module is request.module)
    wanted = dict.fromkeys(item.callspec.params["build"] for item in here)
    pool = ThreadPoolExecutor(2)
    yield {build: pool.submit(built, *build) for build in wanted}
    pool.shutdown(cancel_futures=True)  # a run that ends early waits for no build in the queue


@pytest.fixture
def rows(build: tuple[str, ...], builds: dict[tuple[str, ...], Future]) -> list[dict]:
    """The rows of a build."""
    return builds[build].result()


def name(row: dict) -> str:
    return f"{row['architecture']} {row['kernel']} {row['case']}: {row}"


def has_product(row: dict) -> bool:
    """Whether tensor cores have something to do: not for fp32."""
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
    """But for two registers of what was measured to be faster so on an H100, by 20 % and more: four
    warps, two programs of which share a processor."""
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
    """Wherever rows begin on 16 bytes, also where no step divides D."""
    found = [row for row in rows if has_product(row) and "D=1001" not in row["case"]]
    assert found
    for row in found:
        assert row["wide"], name(row)


@on_each
def test_stores_are_wide(rows: list[dict], build: tuple[str, ...]) -> None:
    """Weights, made, read or kept: 16 bytes at a time, or whole tiles, whatever M, N and D are."""
    if build[0] == "gfx942":
        pytest.skip("stores are read in NVIDIA's disassembly")
    found = [r for r in rows if r["kernel"].startswith("weigh") or "kept" in r["case"].split()]
    tiles = [row for row in found if row["kernel"] in TILES | {"weigh_kept_kernel"}]
    assert tiles
    for row in tiles:
        widths = row["stores"].split()
        writes_tiles = row["kernel"].startswith("weigh") or "again" not in row["case"]
        assert not any(width.startswith(("8x", "16x")) for width in widths), name(row)
        if writes_tiles and row["kernel"] != "maxima_kernel":
            assert "TMA" in widths or any(width.startswith("128x") for width in widths), name(row)


@on_each
def test_one_exponential_a_pair(rows: list[dict]) -> None:
    """The first sweep's, for each thread: as many as its pairs. Where weights are kept ptxas makes
    5 of 64 anew on sm_89, 2 of 128 on sm_90, instead of holding them in registers."""
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
    if "few" in build:  # of kernels that cases share, the table names the first
        found = {k: row for k, row in found.items() if k in known}
        assert {kernel for _, kernel, _ in found} >= TILES
    else:
        known = {k: row for k, row in known.items() if row["architecture"] == build[0]}
        assert found.keys() == known.keys()
    assert found == {k: known[k] for k in found}


@pytest.mark.minutes
@pytest.mark.parametrize("build", [("candidates",)], ids=" ".join)
def test_tile_candidates_fit_a_card_too(rows: list[dict]) -> None:
    """Those that are timed beside the table's: none spills more than four registers."""
    from fastclip.triton_kernels.configurations import SHAPES, SHARED_MEMORY

    assert {row["kind"] for row in rows} == {*SHAPES}
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY["sm_90"], row
        assert row["stack"] <= 16 and row["wgmma"] and "16x" not in row["stores"], row
