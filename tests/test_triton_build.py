"""Every kernel of the Triton engine compiles for cards that are not here, and fits them.

Shared memory within the card's, nothing spilled, tensor cores where the arithmetic has them, loads
of 16 bytes; registers and shared memory as recorded in `triton_resources.csv`, where the Triton
installed is the one that made it (`python triton_build.py table` makes it anew).
"""

import pytest
from triton_case import needs_triton

pytestmark = needs_triton

ARCHITECTURES = ("sm_90", "sm_80", "sm_100", "sm_89", "gfx942")
TABLE_OF = {"sm_89": "sm_86", "gfx942": "default"}
TILES = ("sweep_kernel", "maxima_kernel", "weigh_kernel")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Of all architectures."""
    # Not above: where Triton is missing there is nothing to import.
    from triton_build import built

    return built(ARCHITECTURES)


def name(row: dict) -> str:
    return f"{row['architecture']} {row['kernel']} {row['case']}: {row}"


def has_product(row: dict) -> bool:
    """Whether tensor cores have something to do: not for fp32, nor where t was kept."""
    kept = (
        row["kernel"] == "weigh_kernel"
        and "again" not in row["case"]
        and ("softmax bf16 D=768 factors" in row["case"])
    )
    return row["kernel"] in TILES and "ieee" not in row["case"] and not kept


def test_every_kernel_is_there(rows: list[dict]) -> None:
    for architecture in ARCHITECTURES:
        kernels = {row["kernel"] for row in rows if row["architecture"] == architecture}
        assert kernels >= {
            *TILES, "longest_kernel", "reference_kernel", "sums_kernel", "maxima_sums_kernel",
            "totals_kernel", "finish_kernel", "complete_kernel", "complete_totals_kernel",
        }  # fmt: skip


def test_shared_memory_fits(rows: list[dict]) -> None:
    from fastclip.triton_kernels.configurations import SHARED_MEMORY

    for row in rows:
        table = TABLE_OF.get(row["architecture"], row["architecture"])
        assert row["shared"] <= SHARED_MEMORY[table], name(row)


def test_nothing_is_spilled(rows: list[dict]) -> None:
    for row in rows:
        assert row["spilled"] == 0 and row["stack"] == 0, name(row)


def test_products_run_on_tensor_cores(rows: list[dict]) -> None:
    for row in rows:
        if has_product(row):
            assert row["mma"] > 0, name(row)
            if row["architecture"] == "sm_90":
                assert row["wgmma"], name(row)


def test_loads_are_wide(rows: list[dict]) -> None:
    """Wherever rows begin on 16 bytes, also where no step divides D."""
    found = [row for row in rows if has_product(row) and "D=1001" not in row["case"]]
    assert found
    for row in found:
        assert row["wide"], name(row)


def test_one_exponential_a_pair(rows: list[dict]) -> None:
    """The first sweep's, for each thread: as many as its pairs."""
    for row in rows:
        if row["kernel"] == "sweep_kernel" and row["architecture"] != "gfx942":
            bm, bn, _ = map(int, row["tile"].split("x"))
            assert row["exponentials"] == bm * bn // (32 * row["warps"]), name(row)


def test_resources_are_the_recorded_ones(rows: list[dict]) -> None:
    import triton
    from triton_build import COLUMNS, recorded

    version, expected = recorded()
    if triton.__version__ != version:
        pytest.skip(f"recorded with Triton {version}, this is {triton.__version__}")
    key = ("architecture", "kernel", "case")
    found = {tuple(r[k] for k in key): {c: str(r[c]) for c in COLUMNS} for r in rows}
    assert found == {tuple(r[k] for k in key): r for r in expected}
