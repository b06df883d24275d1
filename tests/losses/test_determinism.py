"""Results are bitwise reproducible; the number of threads changes only their rounding."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.hard_inputs import batch
from support.judge import PRECISIONS, QUANTITIES, Precision, evaluate
from support.losses import LOSSES


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("restore_threads")
def test_repeated_runs_are_bitwise_equal(
    loss: str, engine: str, precision: str, threads: int, device: torch.device
) -> None:
    torch.set_num_threads(threads)
    for reduction, normalize in (("mean", False), ("none", True)):
        results = [
            evaluate(
                LOSSES[loss],
                *batch("random", 521, 64),
                14.3,
                -3.0,
                PRECISIONS[precision],
                device,
                np.float64(1) if reduction == "mean" else np.linspace(-1, 1, 521),
                reduction=reduction,
                normalize=normalize,
                backend=engine,
            )
            for _ in range(3)
        ]
        for name in QUANTITIES:
            for other in results[1:]:
                assert torch.equal(results[0][name], other[name]), f"{name} ({reduction})"


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_changes_only_rounding(
    loss: str, engine: str, device: torch.device
) -> None:
    case = (*batch("random", 521, 64), 14.3, -3.0, Precision(torch.float32, torch.float32), device)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(evaluate(LOSSES[loss], *case, backend=engine))
    for name in QUANTITIES:
        for other in results[1:]:
            torch.testing.assert_close(results[0][name], other[name], rtol=1e-6, atol=3e-8)
