"""Triton's interpreter, as the tests change it, serves a launch whatever came before."""

import pytest
import torch
from support.triton_case import needs_triton

pytestmark = needs_triton


def test_a_launch_after_a_function_called_on_its_own() -> None:
    """Only a launch gives builtins back, so a call outside of one must not count as one."""
    from triton.runtime.errors import InterpreterError

    from fastclip.triton_kernels.constants import INTERPRETED
    from fastclip.triton_kernels.kernels.tf32 import to_tf32_kernel
    from fastclip.triton_kernels.kinds import softmax_fold

    if not INTERPRETED.value:
        pytest.skip("kernels are compiled")
    with pytest.raises(InterpreterError):
        softmax_fold(None)
    x, out = torch.randn(5, 3), torch.zeros(5, 3)
    for _ in range(2):
        to_tf32_kernel[(1,)](x, out, 5, 3, 3, ROWS=8, BK=16)
    assert (out - x).abs().max() <= 2.0**-11 * x.abs().max()
