"""Our losses are lightly's losses: two views, a bank of negatives, decoupled."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.peers import Case, assert_same, peer
from torch import Tensor

from fastclip import contrast
from fastclip.loss import NTXentLoss, nt_xent_loss


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("lightly.loss")


def test_two_views(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda x, y, t: nt_xent_loss(x, y, t, normalize=True),
        lambda x, y, t: theirs.NTXentLoss(temperature=1 / t)(x, y),
        case.leaves(2),
    )


def test_the_module_in_float32(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda x, y: NTXentLoss(normalize=True)(x, y, 10.0),
        theirs.NTXentLoss(temperature=0.1),
        case.features(2, dtype=torch.float32),
        rtol=2e-4, atol=5e-5,
    )  # fmt: skip


def test_decoupled_views(case: Case, theirs: ModuleType) -> None:
    if case.n == 1:
        pytest.skip("their loss of one pair is -inf")
    assert_same(
        lambda x, y, t: nt_xent_loss(x, y, t, decoupled=True, normalize=True),
        lambda x, y, t: theirs.DCLLoss(temperature=1 / t)(x, y),
        case.leaves(2),
    )


def test_positives_with_weights(case: Case, theirs: ModuleType) -> None:
    if case.n == 1:
        pytest.skip("their loss of one pair is -inf")
    sigma = 0.5

    def ours(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        c = contrast(x, y, t, normalize=True)
        similarity = (c.positives / t).detach()
        positives = (2 - len(x) * torch.softmax(similarity / sigma, 0)) * c.positives
        rows = torch.logaddexp(c.rows, contrast(x, None, t, normalize=True).rows)
        columns = torch.logaddexp(c.columns, contrast(y, None, t, normalize=True).rows)
        return ((rows + columns) / 2 - positives).mean()

    with pytest.warns(UserWarning, match="copy construct"):  # their weights
        assert_same(
            ours,
            lambda x, y, t: theirs.DCLWLoss(temperature=1 / t, sigma=sigma)(x, y),
            case.leaves(2),
        )


@pytest.mark.parametrize("size", [1, 40])
def test_a_bank_of_negatives(size: int, case: Case, theirs: ModuleType) -> None:
    bank = F.normalize(torch.randn(size, case.d, dtype=torch.float64))

    def ours(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        # The batch's own pairs are no negatives.
        positives = t * (F.normalize(x) * F.normalize(y)).sum(1)
        queue = contrast(x, bank, t, offset=None, columns=False, normalize=True)
        return F.softplus(queue.rows - positives, threshold=60).mean()

    def expected(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        loss = theirs.NTXentLoss(temperature=1 / t, memory_bank_size=(size, case.d))
        loss.memory_bank.bank = bank.clone()
        return loss(x, y)

    assert_same(ours, expected, case.leaves(2))
