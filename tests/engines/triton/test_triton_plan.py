"""Passes, traffic and memory of the Triton engine, counted with the plan that it launches by.

Every pair is in exactly one chunk. Softmax takes 4 passes; the sigmoid, and kept weights, take 3.
Work space is within its bounds at N = 1M. Traffic takes a small fraction of the FLOPs' time.
"""

from itertools import product
from types import SimpleNamespace

import pytest
from support.triton_case import cover, needs_triton

pytestmark = needs_triton

NS = (1, 31, 256, 2048, 8192, 32768, 65536, 1 << 20)
# One H200 on paper: the bf16 FLOPs per second that are aimed at, and the bytes of its memory.
FLOPS, BYTES = 660e12, 4.8e12


def config(kernel: str = "tile", architecture: str = "sm_90"):
    from fastclip.triton_kernels.configurations import TABLE

    return TABLE[architecture][kernel, "half", "wide"]


def passes(cost, n: int, d: int) -> float:
    return cost.flops / (2 * n * n * d)


@pytest.mark.parametrize("m, n", [(n, n) for n in NS] + [(256, 32768), (8192, 65536), (1, 70000)])
def test_every_pair_is_in_one_chunk(m: int, n: int) -> None:
    from fastclip.triton_kernels import plan

    for kept_rows in (0, 100, m + 5):
        for chunks in (
            plan.sweep_chunks(n, config("sweep"), 1, 0, m),
            plan.sweep_chunks(n, config(), 2, 0, m),
            list(plan.weigh_chunks(m, n, config("weigh"), 2, kept_rows)),
        ):
            assert sum(c.rows * c.columns for c in chunks) == m * n
            assert cover([(c.start, c.stop) for c in chunks], m)
            assert cover([(c.column_start, c.column_stop) for c in chunks], n)
            for c in chunks:
                assert 0 < c.tiles < 2**31
                assert not c.kept or c.stop <= kept_rows


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80", "interpreter"])
@pytest.mark.parametrize("kernel", ["sweep", "weigh", "both"])
def test_every_tile_is_plain_or_of_the_edges(kernel: str, architecture: str) -> None:
    """By the kernels' own arithmetic every tile is taken once, for any offset, and a plain tile is
    whole and has no positive."""
    from fastclip.triton_kernels.plan import Chunk

    bm, bn, *_ = config(kernel, architecture)
    sizes = [(3 * bm, 5 * bn), (3 * bm + 1, 2 * bn - 1), (bm - 1, 4 * bn), (6 * bm, bn), (1, 1)]
    for m, n in sizes:
        chunk = Chunk(0, m, 0, n, bm, bn)
        near = [k * step + by for k in (-3, -1, 0, 1, 2) for step in (bm, bn) for by in (-1, 0, 1)]
        for offset in sorted({-m, -m + 1, n - 1, n, *near}):
            skipped = chunk.skipped(offset)
            where = (m, n, offset, skipped, bm, bn)
            plain = [plain_place(tile, *where) for tile in range(chunk.plain_tiles(skipped))]
            edges = [edge_place(tile, *where) for tile in range(chunk.tiles - len(plain))]
            every = product(range(chunk.tiles_m), range(chunk.tiles_n))
            assert sorted(plain + edges) == list(every)
            for i, j in plain:
                assert (i + 1) * bm <= m and (j + 1) * bn <= n
                first = i * bm + offset - j * bn  # where the diagonal enters the tile
                assert first >= bn or first + bm <= 0
            if skipped < n // bn:
                assert skipped <= bm // bn + 2, "few tiles need masks"


def place(tile: int, tiles_m: int, tiles_n: int, group: int = 2) -> tuple[int, int]:
    first, within = divmod(tile, group * tiles_n)
    height = min(tiles_m - first * group, group)
    return first * group + within % height, within // height


def first_skipped(row: int, n: int, offset: int, skipped: int, bm: int, bn: int) -> int:
    return min(max(row * bm + offset, 0) // bn, n // bn - skipped)


def plain_place(
    tile: int, m: int, n: int, offset: int, skipped: int, bm: int, bn: int
) -> tuple[int, int]:
    i, j = place(tile, m // bm, n // bn - skipped)
    return i, j + skipped * (j >= first_skipped(i, n, offset, skipped, bm, bn))


def edge_place(
    tile: int, m: int, n: int, offset: int, skipped: int, bm: int, bn: int
) -> tuple[int, int]:
    if tile < m // bm * skipped:
        i, j = divmod(tile, skipped)
        return i, j + first_skipped(i, n, offset, skipped, bm, bn)
    tile -= m // bm * skipped
    on_the_right = -(-m // bm) if n % bn else 0
    return (tile, n // bn) if tile < on_the_right else (m // bm, tile - on_the_right)


@pytest.mark.parametrize("n", NS)
def test_memory_is_bounded(n: int) -> None:
    from support import triton_cost

    from fastclip.triton_kernels import plan

    for itemsize in (2, 4):
        sweep = triton_cost.sweep_cost(n, n, 512, config(), itemsize, layers=2)
        row_of_tiles = 2 * 4 * (plan.cdiv(n, 128) * 128 + n)
        assert sweep.work_space <= max(plan.PARTIAL_BYTES, row_of_tiles)
        rows, columns = plan.weight_shape(n, n, itemsize)
        stride = plan.cdiv(columns, 16) * 16
        assert itemsize * rows * stride <= max(plan.WEIGHT_BYTES, 128 * stride * itemsize)
        weigh = triton_cost.weigh_cost(n, n, 512, config(), itemsize)
        # Weights, one chunk of dx and all of dy in fp32; only dy grows with N.
        assert weigh.work_space <= plan.WEIGHT_BYTES + 4 * 512 * (rows + n)
        both = triton_cost.weigh_cost(n, n, 512, config("both"), itemsize, fold=True)
        assert both.work_space <= weigh.work_space + plan.PARTIAL_BYTES


def test_memory_of_a_large_step() -> None:
    """A step of 65,536 x 768 in bf16 takes less than 1 GB beside features and gradients."""
    from support import triton_cost

    n, d = 65536, 768
    assert triton_cost.sweep_cost(n, n, d, config("sweep"), 2, layers=1).work_space <= 128 << 20
    assert triton_cost.weigh_cost(n, n, d, config(), 2).work_space < 0.5e9


@pytest.mark.parametrize("n", [n for n in NS if n > 1])
def test_passes(n: int) -> None:
    from support import triton_cost

    d = 768
    first = passes(triton_cost.sweep_cost(n, n, d, config("sweep"), 2, 1), n, d)
    second = {
        needs: passes(
            triton_cost.weigh_cost(n, n, d, config(), 2, needs_x=needs[0], needs_y=needs[1]), n, d
        )
        for needs in ((True, True), (True, False), (False, False))
    }
    assert first == 1 and second == {(True, True): 3, (True, False): 2, (False, False): 1}
    assert passes(triton_cost.weigh_cost(n, n, d, config(), 2, kept_rows=n), n, d) == 2
    assert passes(triton_cost.weigh_cost(n, n, d, config("both"), 2, fold=True), n, d) == 3


@pytest.mark.parametrize("n, d", [(32768, 768), (65536, 768), (1 << 20, 512)])
def test_traffic_is_hidden_behind_the_products(n: int, d: int) -> None:
    """On paper bytes take less than half the time of the FLOPs, and partial sums a few percent."""
    from support import triton_cost

    from fastclip.triton_kernels import plan

    for cost in (
        triton_cost.sweep_cost(n, n, d, config("sweep"), 2, 1),
        triton_cost.weigh_cost(n, n, d, config(), 2),
        triton_cost.weigh_cost(n, n, d, config("both"), 2, fold=True),
    ):
        assert cost.bytes / BYTES < 0.5 * cost.flops / FLOPS
    chunks = plan.sweep_chunks(n, config("sweep"), 1, 0, n)
    partial = 8 * sum(c.partials for c in chunks)
    assert partial / BYTES < 0.05 * 2 * n * n * d / FLOPS


def test_a_dense_loss_moves_far_more() -> None:
    """Writing and reading its fp32 logits twice moves more than four times as much as a whole first
    sweep."""
    from support import triton_cost

    n, d = 32768, 768
    assert 16 * n * n > 4 * triton_cost.sweep_cost(n, n, d, config("sweep"), 2, 1).bytes


def test_cards_and_their_tables() -> None:
    from fastclip.triton_kernels.configurations import SHARED_MEMORY, TABLE, architecture

    expected = {
        (8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100",
        (10, 3): "sm_100", (12, 0): "sm_86", (13, 0): "default",
    }  # fmt: skip
    assert {card: architecture(card) for card in expected} == expected
    assert {*SHARED_MEMORY} == {*TABLE} - {"interpreter"}
    assert len({frozenset(table) for table in TABLE.values()}) == 1, "one set of keys for all"


def test_autotuning_is_opt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the variable turns it on, and it runs once for each kernel, dtype and D."""
    import torch

    from fastclip.triton_kernels import configurations

    cpu = torch.device("cpu")
    default = configurations.TABLE["interpreter"]["tile", "half", "wide"]
    every = configurations.candidates(default, "weigh")
    best = every[2]
    timed = []

    def time(run: object, candidate: object) -> float:
        timed.append(candidate)
        return 1.0 if candidate == best else 2.0

    monkeypatch.setattr(configurations, "_table", lambda _: configurations.TABLE["interpreter"])
    monkeypatch.setattr(configurations, "INTERPRETED", SimpleNamespace(value=False))
    monkeypatch.setattr(configurations, "TIMES", {})
    monkeypatch.setattr(configurations, "_time", time)
    arguments = (cpu, torch.bfloat16, False, 768, 8, "weigh", lambda config: None)
    monkeypatch.delenv(configurations.AUTOTUNE, raising=False)
    assert configurations.choose(*arguments) == default and not timed
    monkeypatch.setenv(configurations.AUTOTUNE, "1")
    assert configurations.choose(*arguments) == best
    tried = len(timed)
    assert tried == len(every) > 10
    assert configurations.choose(*arguments) == best and len(timed) == tried


def test_candidates_of_a_card() -> None:
    """Candidates are high and wide tiles, two programs a processor, other stages, orders, loads."""
    from fastclip.triton_kernels.configurations import candidates

    for kernel in ("sweep", "weigh"):
        found = candidates(config(kernel), kernel)
        assert found[0] == config(kernel) and len(set(found)) == len(found)
        shapes = {(c.bm, c.bn, c.warps) for c in found}
        assert shapes >= {(256, 128, 8), (128, 256, 8), (128, 128, 4)}
        assert {c.stages for c in found} == {3, 4} and {c.group for c in found} == {4, 8, 16}
        assert {c.descriptors for c in found} == {True, False}
