"""Our losses are pytorch-metric-learning's: two views, labels, a memory of batches, triplets."""

from types import ModuleType

import pytest
import torch
from support.peers import Case, assert_same, peer
from torch import Tensor

from fastclip import contrast
from fastclip.loss import SupConLoss, nt_xent_loss, ranking_loss, supcon_loss


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return peer("pytorch_metric_learning.losses")


def test_two_views(case: Case, theirs: ModuleType) -> None:
    assert_same(
        lambda x, y, t: nt_xent_loss(x, y, t, normalize=True),
        lambda x, y, t: theirs.SelfSupervisedLoss(theirs.NTXentLoss(temperature=1 / t))(x, y),
        case.leaves(2),
    )


@pytest.mark.parametrize("classes", [2, 7, 1000])
def test_labels(classes: int, case: Case, theirs: ModuleType) -> None:
    n = case.n
    if n < 3:
        pytest.skip("their loss of a batch without positives and negatives is 0")
    labels = torch.randint(classes, (n,)) - 3
    labels[0], labels[1], labels[2] = 5, 5, 6  # a positive and a negative at least
    assert_same(
        lambda x, t: supcon_loss(x, labels, t, normalize=True),
        lambda x, t: theirs.SupConLoss(temperature=1 / t)(x, labels),
        case.leaves(1),
    )


def test_the_module_in_float32(case: Case, theirs: ModuleType) -> None:
    labels = torch.arange(case.n) % max(1, case.n // 3)
    if case.n < 17:
        pytest.skip("their loss of a batch without positives and negatives is 0")
    assert_same(
        lambda x: SupConLoss(normalize=True)(x, labels, 10.0),
        lambda x: theirs.SupConLoss(temperature=0.1)(x, labels),
        case.features(1, dtype=torch.float32),
        rtol=2e-4, atol=5e-5,
    )  # fmt: skip


def test_lines_without_positives_do_not_count(theirs: ModuleType) -> None:
    labels = torch.tensor([4, 9, 4, 7, 7, 7, 1])
    (x,) = Case(7, 5, 10.0, "random").features(1)
    theirs = theirs.SupConLoss(temperature=0.1)
    assert_same(
        lambda x: supcon_loss(x, labels, 10.0, normalize=True), lambda x: theirs(x, labels), [x]
    )
    lines = supcon_loss(x, labels, 10.0, normalize=True, reduction="none")
    torch.testing.assert_close(lines.sum() / 5, theirs(x, labels))


@pytest.mark.parametrize("queued", [1, 5])
def test_a_memory_of_batches(queued: int, case: Case, theirs: ModuleType) -> None:
    """Lines are a part of the batch, columns the memory with the batch's other part."""
    n, d = case.n, case.d
    size, classes = 40, 6
    labels, memory_labels = torch.randint(classes, (n,)), torch.randint(classes, (size,))
    labels[0], memory_labels[-2], memory_labels[-1] = 5, 4, 5  # a positive and a negative at least
    (memory,) = (t.detach() for t in case.features(1, n=size))
    enqueued = torch.arange(n + queued) >= n

    def expected(x: Tensor, t: Tensor) -> Tensor:
        loss = theirs.CrossBatchMemory(theirs.SupConLoss(temperature=1 / t), d, memory_size=size)
        loss.embedding_memory, loss.label_memory = torch.zeros_like(memory), memory_labels.clone()
        loss.embedding_memory[queued:] = memory[queued:]
        loss.has_been_filled = True
        both = torch.cat((x, memory[:queued])), torch.cat((labels, memory_labels[:queued]))
        return loss(*both, enqueue_mask=enqueued)

    def ours(x: Tensor, t: Tensor) -> Tensor:
        c = contrast(
            x, memory, t, offset=None, ids=(labels, memory_labels), same_id="positive", means=True,
            columns=False, normalize=True,
        )  # fmt: skip
        some = c.row_positives > -torch.inf
        pairs = torch.logaddexp(c.rows[some], c.row_positives[some])
        return (pairs - c.row_positive_means[some]).mean()

    assert_same(ours, expected, case.leaves(1))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_triplets(
    margin: float, hardest: bool, symmetric: bool, case: Case, theirs: ModuleType
) -> None:
    """Their triplets are each line's positive with each negative, or with the hardest one."""
    ties = case.d == 1 or case.sort == "duplicates"
    if ties and (hardest or not margin):
        pytest.skip("which of equal similarities has the gradient depends on rounding")
    distance = peer("pytorch_metric_learning.distances").CosineSimilarity()
    miner = peer("pytorch_metric_learning.miners").BatchHardMiner(distance=distance)
    triplets = theirs.TripletMarginLoss(
        margin, distance=distance, triplets_per_anchor="all",
        reducer=peer("pytorch_metric_learning.reducers").SumReducer(),
    )  # fmt: skip
    # One object for both sides would mean that the sides are the same.
    labels, of_others = torch.arange(case.n), torch.arange(case.n)

    def expected(x: Tensor, y: Tensor) -> Tensor:
        total = 0
        for a, b in ((x, y), (y, x))[: 1 + symmetric]:
            found = miner(a, labels, b, of_others) if hardest else None
            total = total + triplets(a, labels, found, b, of_others)
        return total / case.n

    assert_same(
        lambda x, y: ranking_loss(
            x, y, margin=margin, hardest=hardest, symmetric=symmetric, normalize=True
        ),
        expected,
        case.features(2),
    )
