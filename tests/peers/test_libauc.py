"""`GlobalClipLoss` and `contrast` give the gradients of LibAUC's global contrastive losses.

A moving average of each line's mean exponential takes the place of the batch's own in the
denominator. LibAUC returns a surrogate, whose gradient is meant; only `losses/contrastive.py` is
loaded, since the package imports graph libraries.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.peers import Case, find
from torch import Tensor

from fastclip import contrast
from fastclip.loss import GlobalClipLoss

TAU, GAMMA, SAMPLES = 0.2, 0.4, 150


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    package = Path(find("libauc").origin).parent
    spec = importlib.util.spec_from_file_location("contrastive", package / "losses/contrastive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def moved(average: Tensor, new: Tensor) -> Tensor:
    """Returns the new averages; a batch without a history starts one."""
    gamma = GAMMA if average.sum() else 1.0
    return (1 - gamma) * average + gamma * new


def batches(case: Case) -> list[tuple[list[Tensor], Tensor]]:
    """Returns the features and the indices of three batches, which share samples."""
    return [(case.features(2), torch.randperm(case.n + 2)[: case.n]) for _ in range(3)]


def test_two_views(case: Case, theirs: ModuleType) -> None:
    n = case.n
    if n == 1:
        pytest.skip("their mean over no negatives is NaN")
    loss = theirs.GCLoss_v1(N=SAMPLES, tau=TAU, gamma=GAMMA, device=torch.device("cpu"))
    loss.u = loss.u.double()
    averages = torch.zeros(SAMPLES, dtype=torch.float64)
    count = 2 * (n - 1)
    for (x, y), index in batches(case):
        expected = loss(x, y, index)
        c = contrast(x, y, 1 / TAU, normalize=True)
        rows = torch.logaddexp(c.rows, contrast(x, None, 1 / TAU, normalize=True).rows)
        columns = torch.logaddexp(c.columns, contrast(y, None, 1 / TAU, normalize=True).rows)
        means = [torch.exp(line) / count for line in (rows, columns)]
        known = [moved(averages[index], mean.detach()) for mean in means]
        averages[index] = sum(known) / 2
        ours = sum(TAU * (m / k - c.positives) for m, k in zip(means, known, strict=True)).mean()
        assert_same_gradients(ours, expected, [x, y])
        torch.testing.assert_close(loss.u.flatten(), averages, rtol=1e-9, atol=1e-12)


def test_images_and_texts(case: Case, theirs: ModuleType) -> None:
    n = case.n
    if n == 1:
        pytest.skip("their mean over no negatives is NaN")
    loss = theirs.GCLoss_v2(N=SAMPLES, tau=TAU, gamma=GAMMA)
    for name in ("u1", "u2", "b1", "b2"):
        setattr(loss, name, getattr(loss, name).double())
    ours = GlobalClipLoss(SAMPLES, GAMMA, eps=0.0, normalize=True).double()
    # Their averages start with a batch that has none; ours start for each sample.
    index = torch.randperm(SAMPLES)[:n]
    for _ in range(3):
        x, y = case.features(2)
        index = index[torch.randperm(n)]
        expected, _ = loss(F.normalize(x), F.normalize(y), index)
        # They sum over negatives, and do not divide by their number.
        assert_same_gradients(TAU * (n - 1) * ours(x, y, 1 / TAU, index), expected, [x, y])
        for name, u, shift in (("images", loss.u1, loss.b1), ("texts", loss.u2, loss.b2)):
            found = getattr(ours, f"log_u_{name}")[index]
            torch.testing.assert_close(found, (u.log() + shift)[index, 0], rtol=1e-9, atol=1e-9)
