"""The figures of the goals: the worst case, errors, memory."""

from dataclasses import replace

import pytest
from support.bench.importing import rows_of_a_case

from bench.report import goals
from bench.report.results import Row

GOALS = {goal.text: goal for goal in goals.CPU_GOALS}


def fast(**changes: object) -> Row:
    return replace(rows_of_a_case()[2], **changes)


def test_the_worst_case_stands_for_all():
    """All sizes must have been measured."""
    figure = GOALS["CLIP float32, N = 32, 128, 512: faster than open_clip"].figure
    rows = [
        fast(m=n, n=n, over_open_clip=times) for n, times in ((32, 1.5), (128, 1.2), (512, 3.0))
    ]
    assert figure(rows) == 1.2
    assert figure(rows[:2]) is None


def test_an_error_is_compared_with_at_least_float32s_own():
    """The dense loss may be almost exact by luck. Errors of several cases are not averaged."""
    figure = GOALS["CLIP float32: rms of gradient errors over the dense loss's"].figure
    dense = replace(rows_of_a_case()[1], err_dx=1e-9, err_dy=1e-9, err_dscale=1e-9)
    own = fast(err_dx=1e-6, err_dy=1e-7, err_dscale=1e-7)
    assert figure([own, dense]) == pytest.approx(1e-6 * 2**23, rel=1e-12)
    other = [replace(row, m=4096, n=4096, err_dx=0.0) for row in (own, dense)]
    assert figure([own, dense, *other]) == pytest.approx(1e-6 * 2**23 / 2**0.5, rel=1e-12)


@pytest.mark.parametrize("dtype, name, rest", [("float32", "float32", 20.0),
                                              ("bfloat16", "bfloat16", 4.0)])  # fmt: skip
def test_half_precision_may_hold_one_matrix_more(dtype, name, rest):
    """A side of 8192 x 512 numbers in float32 has 16 MiB."""
    text = f"{name}, every N measured: MiB beyond inputs, gradients, budget"
    rows = [fast(dtype=dtype, rest_mib=20.0), fast(dtype=dtype, rest_mib=1.0)]
    assert GOALS[text].figure(rows) == rest
