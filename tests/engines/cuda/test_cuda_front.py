"""The CUDA engine's torch front: its settings, chunks, kept rows, allocations and errors.

The emulated engine runs on CPU tensors.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import cuda_case
from support.block_operators import make_weights, operator, sweep, weigh, weigh_all
from support.dense_block import Block, make_block
from support.gpu_engine_case import library_products, prepare
from support.masked_block import make_masked_block, occupied
from torch.profiler import ProfilerActivity, profile

from fastclip.loss import clip_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        prepare("cuda", CPU, patch)
        yield


# ---- FASTCLIP_CUDA_TILES -------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", ["", "library"])
def test_tiles_of_the_library_are_the_default(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block(9, 7, 4)
    monkeypatch.delenv("FASTCLIP_CUDA_TILES", raising=False)
    expected = sweep("cuda", block)
    monkeypatch.setenv("FASTCLIP_CUDA_TILES", tiles)
    assert torch.equal(sweep("cuda", block)[0], expected[0])


def test_an_unknown_kind_of_tiles_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_CUDA_TILES", "big")
    expected = r"FASTCLIP_CUDA_TILES must be 'library' or 'fused', got 'big'"
    with pytest.raises(ValueError, match=expected):
        clip_loss(torch.eye(3), torch.eye(3), 1.0, backend="cuda")


def test_fused_tiles_that_were_not_built_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_CUDA_TILES", "fused")
    with pytest.raises(RuntimeError, match=r"FASTCLIP_CUDA_TILES=fused, but .* without the fused"):
        sweep("cuda", make_block(9, 7, 4))


# ---- chunks and kept rows ------------------------------------------------------------------------


def products(block: Block, keep: int, rows: int, columns: int) -> tuple[int, int]:
    """Returns the number of torch's matrix products in either sweep, with chunks of this shape."""
    told = occupied(block)
    with cuda_case.chunks(rows, columns):
        with library_products() as first:
            state, positive, kept = operator("sweep", "cuda")(
                *block.arguments, None, told, None, keep
            )
        weights = make_weights(state, len(block.x))
        with library_products() as second:
            weigh("cuda", block, state, positive, weights, kept)
    return len(first), len(second)


@pytest.mark.parametrize("m, n", [(70, 67), (40, 100), (100, 40)])
@pytest.mark.parametrize("keep", [0, 16, 48, 112])
def test_kept_products_are_not_made_again(m: int, n: int, keep: int) -> None:
    """The memory of `keep` rows of the shorter side's length holds `kept_rows` rows of length N."""
    block = make_block(m, n, 8)
    kept_rows = min(keep * min(m, n) // n, m)
    kept, others = (math.ceil(rows / 32) * math.ceil(n / 32) for rows in (kept_rows, m - kept_rows))
    first, second = products(block, keep, 32, 32)
    assert first == kept + others
    assert second == others + 2 * (kept + others)


def test_the_shape_of_chunks_is_restored() -> None:
    block = make_block(70, 67, 8)
    before = products(block, 0, 1 << 20, 1 << 20)
    with cuda_case.chunks(32, 32), library_products() as made:
        sweep("cuda", block)
    assert len(made) == 9
    with library_products() as made:
        sweep("cuda", block)
    assert len(made) == before[0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_work_space_is_far_smaller_than_the_logits(dtype: torch.dtype) -> None:
    """It has the size of one chunk."""
    m, n, chunk = 500, 600, 64
    block = make_block(m, n, 8, dtype, kind="sigmoid", factors=(True, True))
    gain = torch.ones((), dtype=torch.float64)
    activities = [ProfilerActivity.CPU]
    with cuda_case.chunks(chunk, chunk), profile(activities=activities, profile_memory=True) as p:
        state, positive, kept = sweep("cuda", block)
        weigh("cuda", block, state, positive, make_weights(state, m), kept)
        operator("sweep_and_weigh", "cuda")(*block.arguments, gain, True, True, True)
    allocated = [e.self_cpu_memory_usage for e in p.events() if e.self_cpu_memory_usage > 0]
    assert allocated and max(allocated) < m * n * 4 / 10


# ---- operands ------------------------------------------------------------------------------------


def test_operands_of_another_device_are_an_error() -> None:
    """For example a scale that was left on the CPU: a GPU cannot read its address."""
    block = make_block(9, 7, 4, kind="sigmoid")
    state, positive, kept = sweep("cuda", block)
    weights = make_weights(state, 9)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def call(name: str, *arguments: object) -> None:
        with pytest.raises(RuntimeError, match="operands must be on one device, cpu, got meta"):
            operator(name, "cuda").redispatch(keys, *arguments)

    meta = torch.ones(9, device="meta")
    ids, lines = meta.int(), torch.ones(7)
    for changes in (
        {"y": block.y.to("meta")}, {"factor_x": meta}, {"scale": meta[0]}, {"bias": meta[0]},
        {"ids_x": ids, "ids_y": lines.int()}, {"threshold_x": meta, "threshold_y": lines},
        {"key_bias": meta[:7]},
    ):  # fmt: skip
        call("sweep", *block._replace(**changes).arguments, None, None, None, 0)
    call("sweep", *block.arguments, meta[0], None, None, 0)
    told = torch.ones(1, 16, dtype=torch.bool, device="meta")
    call("sweep", *block.arguments, None, told, None, 0)
    levels = torch.ones(16, dtype=torch.float64, device="meta")
    call("sweep", *block._replace(kind="hinge").arguments, None, None, levels, 0)
    between = [state, positive, kept, weights.coefficients, weights.positive_weight, weights.gain]
    for k in range(len(between)):
        others = [*between[:k], between[k].to("meta"), *between[k + 1 :]]
        call(
            "weigh", *block.arguments, *others, True, True, False, False, torch.float32,
            torch.float32,
        )  # fmt: skip
    call("finish", state[:, :9], meta.double(), block.scale, None, "softmax")


def test_states_may_have_any_strides() -> None:
    """A slice of a wider tensor, and elements with gaps between them."""
    block = make_block(9, 7, 4)
    state, positive, _ = sweep("cuda", block)
    weights = make_weights(state, 9)
    expected = weigh("cuda", block, state, positive, weights)
    wide = torch.cat((state, state), 1)[:, :16]
    apart = torch.stack((state, state), 2)[..., 0]
    for other in (wide, apart):
        assert not other.is_contiguous()
        for result, truth in zip(
            weigh("cuda", block, other, positive, weights), expected, strict=True
        ):
            assert torch.equal(result, truth)
    losses = operator("finish", "cuda")(state[:, :9], positive, block.scale, None, "softmax")
    spread = operator("finish", "cuda")(
        apart[:, :9], torch.stack((positive, positive), 1)[:, 0], block.scale, None, "softmax"
    )
    for result, truth in zip(spread, losses, strict=True):
        assert torch.equal(result, truth) or torch.equal(result.isnan(), truth.isnan())


def test_options_may_have_any_strides() -> None:
    """Elements with gaps between them, and a bias of any dtype."""
    block = make_masked_block(9, 7, 4, ids=4, margin=-0.2, key_bias=1.0, same_id_positive=True)
    block = block._replace(key_bias=block.key_bias.bfloat16())
    names = ("ids_x", "ids_y", "threshold_x", "threshold_y", "key_bias")
    spread = block._replace(
        **{name: torch.stack((getattr(block, name),) * 2, 1)[:, 0] for name in names}
    )
    expected = sweep("cuda", block)
    told = torch.stack((occupied(block),) * 2, 2)[..., 0]
    assert not told.is_contiguous() and not spread.ids_x.is_contiguous()
    results = operator("sweep", "cuda")(*spread.arguments, None, told, None, 0)
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)
    state, positive, _ = expected
    weights = make_weights(state, 9)
    spread_weights = replace(weights, coefficients=weights.coefficients.T.contiguous().T)
    for result, truth in zip(
        weigh_all("cuda", spread, state.T.contiguous().T, positive, spread_weights),
        weigh_all("cuda", block, state, positive, weights), strict=True,
    ):  # fmt: skip
        assert torch.equal(result, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positives_by_id_take_no_product_of_their_own(dtype: torch.dtype) -> None:
    options = {"ids": 4, "margin": 0.1, "key_bias": 1.0, "same_id_positive": True}
    block = make_masked_block(70, 40, 8, dtype, **options)
    assert products(block, 0, 1 << 20, 1 << 20) == (1, 3)


# ---- errors --------------------------------------------------------------------------------------

IDS = {"ids_x": torch.zeros(9, dtype=torch.int32), "ids_y": torch.zeros(7, dtype=torch.int32)}
LIMITS = {"threshold_x": torch.zeros(9), "threshold_y": torch.zeros(7)}
MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "wide ids": (
        r"ids_x must be \(M\), ids_y \(N\), int32", {**IDS, "ids_x": torch.zeros(9).long()}
    ),
    "ids of rows alone": ("int32, or both None, got .9. Int and None", {"ids_x": IDS["ids_x"]}),
    "too few ids": ("int32, or both None", {**IDS, "ids_y": IDS["ids_x"]}),
    "wide thresholds": (
        r"threshold_x must be \(M\), threshold_y \(N\), float32",
        {**LIMITS, "threshold_y": torch.zeros(7).double()},
    ),
    "thresholds of columns alone": (
        "float32, or both None", {"threshold_y": LIMITS["threshold_y"]}
    ),
    "an integral bias": (
        r"key_bias must be \(N\), floating point, got .7. Int", {"key_bias": IDS["ids_y"]}
    ),
    "a bias of rows": (r"key_bias must be \(N\)", {"key_bias": torch.zeros(9)}),
    "positives by id without ids": (
        "positives by id need ids_x and ids_y", {"same_id_positive": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_options_that_do_not_fit_are_named_in_the_error(mistake: str) -> None:
    pattern, changes = MISTAKES[mistake]
    block = make_block(9, 7, 4)._replace(**changes)
    with pytest.raises(RuntimeError, match=pattern):
        operator("sweep", "cuda")(*block.arguments, None, None, None, 0)


def test_occupied_must_have_every_line() -> None:
    block = make_block(9, 7, 4)._replace(**IDS, same_id_positive=True)
    rule = r"occupied must be \(1, M \+ N\), with positives by id \(2, M \+ N\), bool, got"
    for told in (torch.ones(1, 16, dtype=torch.bool), torch.ones(2, 16, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match=rule):
            operator("sweep", "cuda")(*block.arguments, None, told, None, 0)


def test_a_state_without_positives_by_id_is_an_error() -> None:
    block = make_block(9, 7, 4)
    state, positive, _ = sweep("cuda", block)
    weights = make_weights(state, 9)
    with pytest.raises(RuntimeError, match=r"with positives by id state \(4, M \+ N\)"):
        weigh("cuda", block._replace(**IDS, same_id_positive=True), state, positive, weights)


@pytest.mark.parametrize("changes", [IDS, LIMITS, {"key_bias": torch.zeros(7)}], ids=list)
def test_both_sweeps_in_one_go_need_a_plain_block(changes: dict[str, Any]) -> None:
    block = make_block(9, 7, 4, kind="sigmoid")._replace(**changes)
    rule = "swept and weighed in one go must have no ids, thresholds, key_bias or targets"
    with pytest.raises(RuntimeError, match=rule):
        operator("sweep_and_weigh", "cuda")(*block.arguments, torch.ones(()), True, True, False)
