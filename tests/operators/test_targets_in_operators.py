"""Targets in operators: their strides, the errors of those that do not fit, the dispatcher."""

import pytest
import torch
from support.block_operators import make_weights, operator, sweep, weigh_all
from support.dense_block import Block, make_block
from support.dense_truth import Dense, assert_states
from support.masked_block import occupied
from support.target_cases import with_guide, with_teacher
from torch import Tensor

from fastclip.engine import operators

pytestmark = pytest.mark.usefixtures("on_the_device", "chunks_of_plain_pytorch")

SHIFT, SUM, MOMENT = -3, -2, -1  # the rows of a state that a teacher adds


# ---- strides, errors, the dispatcher -------------------------------------------------------------


def test_targets_may_have_any_strides(engine: str) -> None:
    block = with_teacher(make_block(20, 30, 8), factors=(True, True))
    expected = sweep(engine, block)
    spread = block._replace(
        target_x=torch.stack((block.target_x,) * 2, 2)[..., 0],
        target_y=block.target_y.T.contiguous().T,
        target_factor_x=torch.stack((block.target_factor_x,) * 2, 1)[:, 0],
    )
    for found, exact in zip(sweep(engine, spread), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7, equal_nan=True)


TEACHER = {"target_x": torch.zeros(9, 3), "target_y": torch.zeros(7, 3)}
SCALE = {"target_scale": torch.tensor(2.0)}
LIMITS = {"threshold_x": torch.zeros(9), "threshold_y": torch.zeros(7)}
FEATURES = r"target_x must be \(M, D'\), target_y \(N, D'\) of the features' dtype, or both None"
MISTAKES: dict[str, tuple[str, dict]] = {
    "of rows alone": (FEATURES, {"target_x": TEACHER["target_x"], **SCALE}),
    "of another width": (FEATURES, {**TEACHER, **SCALE, "target_y": torch.zeros(7, 4)}),
    "of another dtype": (FEATURES, {**TEACHER, **SCALE, "target_y": torch.zeros(7, 3).double()}),
    "too few": (FEATURES, {**TEACHER, **SCALE, "target_x": torch.zeros(8, 3)}),
    "empty": (FEATURES, {**SCALE, "target_x": torch.zeros(9, 0), "target_y": torch.zeros(7, 0)}),
    "a factor": (
        r"target_factor_x must be \(M\)", {**TEACHER, **SCALE, "target_factor_x": torch.ones(8)}
    ),
    "neither a guide nor a teacher": ("guide .* or a teacher", TEACHER),
    "both": ("guide .* or a teacher", {**TEACHER, **SCALE, **LIMITS, "guided": True}),
    "a scale alone": ("guide .* or a teacher", SCALE),
    "a guide without features": ("guide .* or a teacher", {**LIMITS, "guided": True}),
    "a guide without thresholds": ("a guide needs threshold_x", {**TEACHER, "guided": True}),
    "many scales": (
        "target_scale must have one element", {**TEACHER, "target_scale": torch.ones(2)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_targets_that_do_not_fit_are_named_in_the_error(engine: str, mistake: str) -> None:
    pattern, changes = MISTAKES[mistake]
    changes = {k: v.to(torch.get_default_device()) if isinstance(v, Tensor) else v
               for k, v in changes.items()}  # fmt: skip
    block = make_block(9, 7, 4)._replace(**changes)
    with pytest.raises(RuntimeError, match=pattern):
        operator("sweep", engine)(*block.arguments, None, None, None, 0)


def test_the_state_of_a_teacher_is_required(engine: str) -> None:
    block = make_block(9, 7, 4)
    state, positive, _ = sweep(engine, block)
    weights = make_weights(state, 9)
    with pytest.raises(RuntimeError, match="with a teacher 3 more rows and 1 more"):
        weigh_all(engine, with_teacher(block), state, positive, weights)


def test_both_sweeps_in_one_go_need_a_block_without_targets(engine: str) -> None:
    block = make_block(9, 7, 4, kind="sigmoid")
    gain = torch.ones((), dtype=torch.float64)
    for targets in (with_teacher(block), with_guide(block)):
        with pytest.raises(RuntimeError, match="must have no ids, thresholds, key_bias or targets"):
            operator("sweep_and_weigh", engine)(*targets.arguments, gain, True, True, False)


def samples(engine: str, block: Block) -> dict[str, tuple]:
    state, positive, kept = sweep(engine, block)
    weights = make_weights(state, len(block.x))
    return {
        "sweep": (*block.arguments, None, occupied(block), None, 0),
        "weigh": (
            *block.arguments, state, positive, kept, weights.coefficients,
            weights.positive_weight, weights.gain, True, True, False, False, torch.float32,
            torch.float32,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("add", [with_teacher, with_guide])
def test_opcheck(engine: str, add: object) -> None:
    for name, sample in samples(engine, add(make_block(20, 33, 5))).items():
        torch.library.opcheck(operator(name, engine), sample)


@pytest.mark.parametrize("add", [with_teacher, with_guide])
def test_vmap_is_a_call_for_each_sample(engine: str, add: object) -> None:
    blocks = [add(make_block(9, 7, 4, seed=seed), seed=seed + 5) for seed in range(3)]
    for name in ("sweep", "weigh"):
        given = [samples(engine, block)[name] for block in blocks]
        expected = [operator(name, engine)(*sample) for sample in given]
        batched = [
            torch.stack(each) if isinstance(each[0], Tensor) else each[0]
            for each in zip(*given, strict=True)
        ]
        dims = tuple(0 if isinstance(t, Tensor) else None for t in batched)
        found = torch.vmap(operator(name, engine), in_dims=dims)(*batched)
        for part, *each in zip(found, *expected, strict=True):
            torch.testing.assert_close(part, torch.stack(each), rtol=0, atol=0, equal_nan=True)


def test_flops_count_the_products_of_targets(engine: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    product, target = 2 * 20 * 33 * 5, 2 * 20 * 33 * 11
    operators.sweep(
        engine, operators.Block(*(operators.Side(torch.zeros(2, 2)),) * 2, torch.ones(()))
    )
    for add in (with_teacher, with_guide):
        given = samples(engine, add(make_block(20, 33, 5)))
        for name, passes in (("sweep", 1), ("weigh", 3)):
            with FlopCounterMode(display=False) as counter:
                operator(name, engine)(*given[name])
            assert counter.get_total_flops() == passes * product + target


def test_the_reference_of_states_fails_for_a_wrong_moment(engine: str) -> None:
    """The check itself: an expectation that is off by a thousandth is noticed."""
    block = with_teacher(make_block(20, 30, 8))
    state, positive, _ = sweep(engine, block)
    state[MOMENT, 4] += 1e-3 * state[SUM, 4]
    with pytest.raises(AssertionError, match="expectations off"):
        assert_states(Dense(block), state, positive)
