"""The losses of the family equal the usual forms that their papers and peers write."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip import contrast, loss, reference
from fastclip.engine import chunked_block
from fastclip.formulas import nt_xent
from fastclip.loss import (
    clip_loss,
    distill_loss,
    info_nce,
    nt_xent_loss,
    ranking_loss,
    siglip_loss,
    supcon_loss,
)

N, D = 13, 6


@pytest.fixture
def leaves(device: torch.device) -> list[Tensor]:
    x, y = torch.randn(2, N, D, dtype=torch.float64, device=device).unbind()
    scale = torch.tensor(1.7, dtype=torch.float64, device=device)
    return [t.detach().clone().requires_grad_() for t in (x, y + x, scale)]


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor], what: str = "") -> None:
    """Asserts equal values and gradients, with an upstream gradient of either sign."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=what or None)
    g = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype, device=ours.device)
    g = g.reshape(ours.shape) if ours.dim() else torch.ones_like(ours)
    found, right = (
        torch.autograd.grad(value, leaves, g, allow_unused=True, retain_graph=True)
        for value in (ours, theirs)
    )
    for one, other, leaf in zip(found, right, leaves, strict=True):
        one, other = (torch.zeros_like(leaf) if t is None else t for t in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=what or None)


def logits_of(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return scale * x @ y.T


def cross_entropy(logits: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), **options)


def off_diagonal(t: Tensor) -> Tensor:
    return ~torch.eye(len(t), dtype=torch.bool, device=t.device)


def test_both_ways_is_clip(leaves: list[Tensor], engine: str) -> None:
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": engine, "normalize": True}
        ours = info_nce(*leaves, symmetric=True, **options)
        assert_equal(ours, clip_loss(*leaves, **options), leaves, reduction)


def test_one_way_is_a_cross_entropy(leaves: list[Tensor], engine: str) -> None:
    logits = logits_of(*leaves)
    assert_equal(info_nce(*leaves, backend=engine), cross_entropy(logits), leaves)
    smooth = info_nce(*leaves, label_smoothing=0.3, backend=engine)
    assert_equal(smooth, cross_entropy(logits, label_smoothing=0.3), leaves)
    labels = torch.randint(N, (N,), device=logits.device)
    ours = info_nce(*leaves, labels=labels, backend=engine)
    assert_equal(ours, F.cross_entropy(logits, labels), leaves)


def test_a_margin_is_cosfaces(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    shifted = scale * (x @ y.T - 0.35 * torch.eye(N, dtype=x.dtype, device=x.device))
    assert_equal(info_nce(*leaves, margin=0.35, backend=engine), cross_entropy(shifted), leaves)


def test_decoupled(leaves: list[Tensor], engine: str) -> None:
    logits = logits_of(*leaves)
    negatives = logits.masked_fill(~off_diagonal(logits), -math.inf)
    theirs = (negatives.logsumexp(1) - logits.diagonal()).mean()
    assert_equal(info_nce(*leaves, decoupled=True, backend=engine), theirs, leaves)


def test_hardness_is_sentence_transformers(leaves: list[Tensor], engine: str) -> None:
    x, y, _ = leaves
    logits = logits_of(*leaves)
    harder = logits + 1.5 * (x @ y.T).detach() * off_diagonal(logits)
    assert_equal(info_nce(*leaves, hardness=1.5, backend=engine), cross_entropy(harder), leaves)


def test_key_bias_corrects_for_sampling(leaves: list[Tensor], engine: str) -> None:
    q = torch.rand(N, dtype=torch.float64, device=leaves[0].device).requires_grad_()
    ours = info_nce(*leaves, key_bias=-q.log(), backend=engine)
    assert_equal(ours, cross_entropy(logits_of(*leaves) - q.log()), [*leaves, q])


def test_keys_beyond_the_queries_are_a_queue(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    queue = torch.randn(7, D, dtype=x.dtype, device=x.device)
    ours = info_nce(x, torch.cat((y, queue)), scale, backend=engine)
    own, others = (
        contrast(x, keys, scale, offset=offset, backend=engine)
        for keys, offset in ((y, 0), (queue, None))
    )
    theirs = F.softplus(torch.logaddexp(own.rows, others.rows) - own.positives).mean()
    assert_equal(ours, theirs, leaves)


def test_two_views_with_a_label_each_are_nt_xent(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    for decoupled in (False, True):
        options = {"decoupled": decoupled, "backend": engine, "normalize": True}
        labels = torch.arange(N, device=x.device).repeat(2)
        ours = supcon_loss(torch.cat((x, y)), labels, scale, **options)
        assert_equal(ours, nt_xent_loss(x, y, scale, **options), leaves, f"{decoupled=}")


def test_nt_xent_is_simclrs(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    every = F.normalize(torch.cat((x, y)), dim=1)
    logits = (scale * every @ every.T).fill_diagonal_(-math.inf)
    labels = torch.arange(2 * N, device=x.device).roll(N)
    ours = nt_xent_loss(x, y, scale, normalize=True, backend=engine)
    assert_equal(ours, F.cross_entropy(logits, labels), leaves)


@pytest.mark.parametrize("n", [8, 13, 32])
def test_nt_xent_in_halves(
    n: int, engine: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views are cut until their parts are outside of the range, here once or several times."""
    monkeypatch.setattr(nt_xent, "HALVED", range(4, 33))
    x1, x2 = (torch.randn(n, 6, dtype=torch.float64, device=device) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x1, x2, torch.tensor(3.0, device=device).double())]
    for options in ({}, {"decoupled": True, "normalize": True, "reduction": "none"}):
        ours, dense = (
            module.nt_xent_loss(*leaves, **options, **choice)
            for module, choice in ((loss, {"backend": engine}), (reference, {}))
        )
        assert_equal(ours, dense, leaves)


def test_supcon_is_the_papers(leaves: list[Tensor], engine: str) -> None:
    """The code of arXiv 2004.11362 without its factor; an anchor without positives is left out."""
    x, _, scale = leaves
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 9, 0, 2, 3, 3, 8, 1], device=x.device)
    logits = logits_of(x, x, scale)
    others = off_diagonal(logits)
    mask = (labels[:, None] == labels) & others
    log_p = logits - logits.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
    some = mask.any(1)
    theirs = -((mask * log_p.masked_fill(~others, 0)).sum(1)[some] / mask.sum(1)[some]).mean()
    assert_equal(supcon_loss(x, labels, scale, backend=engine), theirs, leaves)


def test_positives_by_id_alone_are_unicls(leaves: list[Tensor], engine: str) -> None:
    ids = torch.tensor([0, 1, 1, 2, 2, 2, 9, 0, 2, 3, 3, 8, 1], device=leaves[0].device)
    targets = (ids[:, None] == ids).to(torch.float64)
    targets = targets / targets.sum(1, keepdim=True)
    logits = logits_of(*leaves)
    rows = -(targets * logits.log_softmax(1)).sum(1)
    columns = -(targets.T * logits.log_softmax(0)).sum(0)
    options = {"same_id": "positive", "backend": engine}
    assert_equal(info_nce(*leaves, ids=(ids, ids), offset=None, **options), rows.mean(), leaves)
    ours = clip_loss(*leaves, ids=ids, reduction="none", **options)
    assert_equal(ours, (rows + columns) / 2, leaves)


def test_siglip_with_ids(leaves: list[Tensor], engine: str) -> None:
    ids = torch.arange(N, device=leaves[0].device) // 2
    logits, same = logits_of(*leaves) - 2.0, ids[:, None] == ids
    pairs = -F.logsigmoid((2 * same.double() - 1) * logits)
    ours = siglip_loss(*leaves, -2.0, ids=ids, same_id="positive", backend=engine)
    assert_equal(ours, pairs.sum() / N, leaves)
    alone = -F.logsigmoid((1 - 2 * off_diagonal(logits).double()) * logits)
    alone = alone.masked_fill(same & off_diagonal(logits), 0)
    ours = siglip_loss(*leaves, -2.0, ids=ids, backend=engine)
    assert_equal(ours, alone.sum() / N, leaves)


def test_ids_that_all_differ_change_nothing(leaves: list[Tensor], engine: str) -> None:
    ids = torch.arange(N, device=leaves[0].device).flip(0)
    for same_id in ("ignore", "positive"):
        for fused, more in ((clip_loss, ()), (siglip_loss, (-1.0,))):
            ours = fused(*leaves, *more, ids=ids, same_id=same_id, backend=engine)
            assert_equal(ours, fused(*leaves, *more, backend=engine), leaves, same_id)


def test_weights_of_one_change_nothing(leaves: list[Tensor], engine: str) -> None:
    ones = torch.ones(N, dtype=torch.float64, device=leaves[0].device)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": engine}
        for fused, more in ((clip_loss, ()), (siglip_loss, (-1.0,))):
            ours = fused(*leaves, *more, weights=ones, **options)
            assert_equal(ours, fused(*leaves, *more, **options), leaves, reduction)


def test_a_weight_of_zero_takes_a_query_out_but_not_its_key(
    leaves: list[Tensor], engine: str
) -> None:
    x, y, scale = leaves
    weights = torch.ones(N, dtype=torch.float64, device=x.device)
    weights[-3:] = 0
    ours = info_nce(x, y, scale, weights=weights, backend=engine)
    assert_equal(ours, info_nce(x[:-3], y, scale, backend=engine), leaves)


def test_the_sum_of_hinges_is_vses(leaves: list[Tensor], engine: str) -> None:
    x, y, _ = leaves
    t = x @ y.T
    own, off = t.diagonal(), off_diagonal(t)
    rows, columns = (F.relu(0.4 + t - d) * off for d in (own[:, None], own))
    ours = ranking_loss(x, y, margin=0.4, backend=engine, reduction="none")
    assert_equal(ours, rows.sum(1) + columns.sum(0), leaves)
    largest = ranking_loss(x, y, margin=0.4, hardest=True, backend=engine, reduction="none")
    assert_equal(largest, rows.amax(1) + columns.amax(0), leaves)


def test_frozen_word_vectors_are_devises(leaves: list[Tensor], engine: str) -> None:
    """The loss of Frome et al.: each image against all other labels' vectors."""
    x, y = leaves[0], leaves[1].detach()
    t = x @ y.T
    theirs = (F.relu(0.1 + t - t.diagonal()[:, None]) * off_diagonal(t)).sum(1).sum()
    options = {"margin": 0.1, "symmetric": False, "reduction": "sum", "backend": engine}
    assert_equal(ranking_loss(x, y, **options), theirs, leaves[:1])


@pytest.mark.parametrize("chunk", [4, 1 << 21])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_first_of_equal_hardest_negatives_is_taken(
    engine: str, symmetric: bool, chunk: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_block, "CHUNK", chunk)
    x = torch.eye(4, 4, dtype=torch.float64, device=device).requires_grad_()
    y = torch.ones(4, 4, dtype=torch.float64, device=device).requires_grad_()
    loss = ranking_loss(
        x, y, margin=0.5, hardest=True, symmetric=symmetric, reduction="sum", backend=engine
    )
    loss.backward()
    # Every similarity is 1, so each line has a hinge of 0.5 against its first negative.
    assert loss.item() == 4 * 0.5 * (1 + symmetric)
    first = torch.tensor([1, 0, 0, 0])
    rows = torch.zeros(4, 4, dtype=torch.float64)
    rows[torch.arange(4), first] += 1
    rows[torch.arange(4), torch.arange(4)] -= 1
    if symmetric:
        rows = rows + rows.T
    torch.testing.assert_close(x.grad.cpu(), rows @ y.detach().cpu())
    torch.testing.assert_close(y.grad.cpu(), rows.T @ x.detach().cpu())


def test_a_line_whose_negatives_all_share_its_id_has_no_hinge(
    leaves: list[Tensor], engine: str
) -> None:
    x, y, _ = leaves
    ids = torch.zeros(N, dtype=torch.int64, device=x.device)
    for hardest in (False, True):
        losses = ranking_loss(x, y, ids=ids, hardest=hardest, reduction="none", backend=engine)
        assert_equal(losses, torch.zeros_like(losses) * (x.sum() + y.sum()), leaves[:2])


def test_distillation_by_itself_is_the_entropy(leaves: list[Tensor], engine: str) -> None:
    """A student that equals its teacher has no gradient; its loss is the entropy."""
    x, y, scale = leaves
    ours = distill_loss(x, y, scale, x, y, scale, backend=engine)
    logits = logits_of(x, y, scale).detach()
    entropies = [-(logits.softmax(k) * logits.log_softmax(k)).sum(k).mean() for k in (1, 0)]
    torch.testing.assert_close(ours.detach(), sum(entropies) / 2)
    for gradient in torch.autograd.grad(ours, leaves):
        assert gradient.abs().max() < 1e-12


def test_a_sharp_teacher_gives_the_labels(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    teacher = torch.eye(N, dtype=x.dtype, device=x.device)
    ours = distill_loss(x, y, scale, teacher, teacher, 1e4, backend=engine)
    assert_equal(ours, clip_loss(x, y, scale, backend=engine), leaves)


def test_a_mean_over_no_lines_is_zero(leaves: list[Tensor], engine: str) -> None:
    x, y, scale = leaves
    apart = torch.arange(N, device=x.device)
    nothing = [
        supcon_loss(x, apart, scale, backend=engine),
        info_nce(x, y, scale, ids=(apart, apart + N), offset=None, same_id="positive",
                 backend=engine),
        info_nce(x, y, scale, weights=torch.zeros(N, device=x.device), backend=engine),
    ]  # fmt: skip
    for value in nothing:
        assert value.item() == 0
        for gradient in torch.autograd.grad(value, leaves, allow_unused=True):
            assert gradient is None or not gradient.any()


@pytest.mark.parametrize("margin", [0.0, -0.1, 0.2])
def test_false_negatives_are_those_of_gist(
    leaves: list[Tensor], engine: str, margin: float
) -> None:
    """With a margin of 0 every negative that is closer than the positive is left out."""
    t = (leaves[0] @ leaves[1].T).detach()
    out = (t > t.diagonal()[:, None] + margin) & off_diagonal(t)
    theirs = cross_entropy(logits_of(*leaves).masked_fill(out, -math.inf))
    ours = info_nce(*leaves, false_negative_margin=margin, backend=engine)
    assert_equal(ours, theirs, leaves)


Twin = Callable[..., Tensor]


def test_dense_twins_have_second_derivatives(leaves: list[Tensor]) -> None:
    labels = torch.arange(N, device=leaves[0].device) // 2
    x, y, scale = leaves
    twins: list[tuple[Twin, tuple]] = [
        (reference.info_nce, (x, y, scale)), (reference.supcon_loss, (x, labels, scale)),
        (reference.nt_xent_loss, (x, y, scale)), (reference.distill_loss, (x, y, scale, y, x, 2.0)),
    ]  # fmt: skip
    for twin, inputs in twins:
        (gradient,) = torch.autograd.grad(twin(*inputs), x, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), x)[0].any()
