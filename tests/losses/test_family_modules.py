"""Modules of the family: open_clip's classes, the losses as modules, and the global loss."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip import loss, reference
from fastclip.loss import (
    ClipLoss,
    CoCaLoss,
    DistillClipLoss,
    GlobalClipLoss,
    InfoNCELoss,
    NTXentLoss,
    RankingLoss,
    SigLipLoss,
    SupConLoss,
    info_nce,
)

N, D, SAMPLES = 9, 6, 24


@pytest.fixture
def leaves(device: torch.device) -> list[Tensor]:
    x, y = torch.randn(2, N, D, dtype=torch.float64, device=device).unbind()
    scale, bias = (torch.tensor(t, dtype=torch.float64, device=device) for t in (3.0, -1.0))
    return [t.detach().clone().requires_grad_() for t in (x, y + x, scale, bias)]


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor], tol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)
    found, right = (
        torch.autograd.grad(
            value, leaves, torch.ones_like(value), allow_unused=True, retain_graph=True
        )
        for value in (ours, theirs)
    )
    for one, other, leaf in zip(found, right, leaves, strict=True):
        one, other = (torch.zeros_like(leaf) if t is None else t for t in (one, other))
        torch.testing.assert_close(one, other, rtol=tol, atol=tol)


def test_representations_name_the_options() -> None:
    common = "normalize=False, across_ranks=False, ring=False, uneven=False"
    own = "reduction='mean', margin=0.2, hardest=True, symmetric=False"
    assert repr(RankingLoss(hardest=True, symmetric=False)) == f"RankingLoss({common}, {own})"
    module = InfoNCELoss(decoupled=True, reduction="sum", across_ranks=True)
    for word in ("decoupled=True", "reduction='sum'", "across_ranks=True", "same_id='ignore'"):
        assert word in repr(module)
    text = repr(GlobalClipLoss(5, 0.7, rho=6.5))
    assert (
        text == f"GlobalClipLoss({common}, data_size=5, gamma=0.7, rho=6.5, eps=1e-14, shared=True)"
    )


MODULES: dict[str, tuple[nn.Module, str, dict[str, Any]]] = {
    "info_nce": (
        InfoNCELoss(margin=0.1, symmetric=True, reduction="none", normalize=True), "info_nce",
        {"margin": 0.1, "symmetric": True, "reduction": "none", "normalize": True},
    ),
    "info_nce, others": (
        InfoNCELoss(hardness=1.0, decoupled=True, false_negative_margin=0.1, memory_budget=0),
        "info_nce", {"hardness": 1.0, "decoupled": True, "false_negative_margin": 0.1},
    ),
    "info_nce, ids": (
        InfoNCELoss(same_id="positive", label_smoothing=0.1, backend="torch"), "info_nce",
        {"same_id": "positive", "label_smoothing": 0.1},
    ),
    "supcon": (SupConLoss(decoupled=True, reduction="sum"), "supcon_loss",
               {"decoupled": True, "reduction": "sum"}),
    "nt_xent": (NTXentLoss(decoupled=True, normalize=True), "nt_xent_loss",
                {"decoupled": True, "normalize": True}),
    "ranking": (RankingLoss(margin=0.4, hardest=True, symmetric=False), "ranking_loss",
                {"margin": 0.4, "hardest": True, "symmetric": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_function(name: str, leaves: list[Tensor]) -> None:
    module, function, options = MODULES[name]
    x, y, scale, _ = leaves
    weights = torch.rand(N, dtype=torch.float64, device=x.device)
    labels = torch.arange(N, device=x.device) % 3
    given: dict[str, Any] = {"weights": weights}
    inputs: tuple[Any, ...] = (x, y, scale)
    if function == "supcon_loss":
        inputs = (x, labels, scale)
    elif function == "ranking_loss":
        inputs, given["ids"] = (x, y), (labels, labels)
    elif name == "info_nce, ids":
        given["ids"] = (labels, labels)
    theirs = getattr(reference, function)(*inputs, **options, **given)
    assert not list(module.parameters()) and not module.state_dict()
    for own in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal(own(*inputs, **given), theirs, leaves[:3])


def test_clip_and_siglip_with_ids(leaves: list[Tensor]) -> None:
    x, y, scale, bias = leaves
    ids = torch.arange(N, device=x.device) // 2
    for same_id in ("ignore", "positive"):
        for reduction in ("mean", "sum", "none"):
            options: dict[str, Any] = {"same_id": same_id, "reduction": reduction}
            found = SigLipLoss(**options)(x, y, scale, bias, output_dict=True, ids=ids)
            theirs = reference.siglip_loss(x, y, scale, bias, ids=ids, **options)
            assert list(found) == ["contrastive_loss"]
            assert_equal(found["contrastive_loss"], theirs, leaves)
            options["label_smoothing"] = 0.1
            module = pickle.loads(pickle.dumps(ClipLoss(**options, normalize=True)))
            theirs = reference.clip_loss(*leaves, ids=ids, **options, normalize=True)
            assert_equal(module(*leaves, ids=ids), theirs, leaves)


def test_classes_of_open_clip_with_weights(leaves: list[Tensor]) -> None:
    x, y, scale, _ = leaves
    weights = torch.rand(N, dtype=torch.float64, device=x.device).requires_grad_()
    every, given = [*leaves, weights], {"weights": weights}
    of_clip = reference.clip_loss(*leaves, **given)
    assert_equal(ClipLoss()(*leaves, **given), of_clip, every)
    assert_equal(SigLipLoss()(*leaves, **given), reference.siglip_loss(*leaves, **given), every)
    words, labels = torch.zeros(1, 7, 11, device=x.device), torch.ones(1, 7, device=x.device)
    contrastive, _ = CoCaLoss(2.0, 0.5)(x, y, words, labels.long(), scale, **given)
    assert_equal(contrastive, 0.5 * of_clip, [x, y, scale, weights])
    teacher = *torch.randn(2, N, 4, dtype=torch.float64, device=x.device).unbind(), 2.0
    contrastive, distilled = DistillClipLoss()(x, y, scale, *teacher, **given)
    assert_equal(contrastive, of_clip, [x, y, scale, weights])
    taught = reference.distill_loss(x, y, scale, *teacher, **given)
    assert_equal(distilled, taught, [x, y, scale, weights])


def test_a_subclass_with_its_own_logits_refuses_what_it_would_ignore(leaves: list[Tensor]) -> None:
    class Own(ClipLoss):
        def get_logits(self, *inputs: Any) -> tuple[Tensor, Tensor]:
            return super().get_logits(*inputs)

    class OwnSigmoid(SigLipLoss):
        def get_logits(self, *inputs: Any) -> Tensor:
            return super().get_logits(*inputs)

    ids = torch.arange(N, device=leaves[0].device)
    weights = torch.ones(N, dtype=torch.float64, device=leaves[0].device)
    for module, given in (
        (Own(), {"weights": weights}), (OwnSigmoid(), {"weights": weights}),
        (Own(), {"ids": ids}), (Own(label_smoothing=0.1), {}), (Own(normalize=True), {}),
        (Own(reduction="sum"), {}), (OwnSigmoid(), {"ids": ids}),
        (OwnSigmoid(normalize=True), {}), (OwnSigmoid(reduction="none"), {}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"their defaults for a subclass.*got another"):
            module(*leaves, **given)


def test_coca(leaves: list[Tensor]) -> None:
    x, y, scale, _ = leaves
    words = torch.randn(4, 7, 11, dtype=torch.float64, device=x.device).requires_grad_()
    labels = torch.randint(11, (4, 7), device=x.device)
    captions = F.cross_entropy(words.permute(0, 2, 1), labels, ignore_index=3) * 2
    every = [*leaves[:3], words]
    found = CoCaLoss(2.0, 0.5, pad_id=3)(x, y, words, labels, scale, output_dict=True)
    assert list(found) == ["contrastive_loss", "caption_loss"]
    theirs = 0.5 * reference.clip_loss(x, y, scale) + captions
    assert_equal(found["contrastive_loss"] + found["caption_loss"], theirs, every)
    alone, caption = CoCaLoss(2.0, 0.0, 3)(x, y, words, labels, scale)
    assert alone.item() == 0 and not alone.requires_grad
    assert_equal(caption, captions, every)


def test_distillation(leaves: list[Tensor], engine: str) -> None:
    x, y, scale, bias = leaves
    teacher = *torch.randn(2, N, 4, dtype=torch.float64, device=x.device).unbind(), 2.0

    class Dense(DistillClipLoss):
        def get_logits(self, *inputs: Any) -> tuple[Tensor, Tensor]:
            return super().get_logits(*inputs)

    theirs = reference.clip_loss(x, y, scale), reference.distill_loss(x, y, scale, *teacher)
    for module in (DistillClipLoss(backend=engine), Dense()):
        found = module(x, y, scale, *teacher, output_dict=True, logit_bias=bias)
        assert list(found) == ["contrastive_loss", "distill_loss"]
        for one, other in zip(found.values(), theirs, strict=True):
            assert_equal(one, other, leaves)
        assert torch.autograd.grad(sum(found.values()), bias)[0].item() == 0
    for module in (Dense(normalize=True), Dense(reduction="sum")):
        with pytest.raises(ValueError, match="their defaults for a dense DistillClipLoss"):
            module(x, y, scale, *teacher)
    with pytest.raises(
        ValueError, match=r"label_smoothing must be 0 for DistillClipLoss, got 0\.1"
    ):
        DistillClipLoss(label_smoothing=0.1)(x, y, scale, *teacher)


class Dense:
    """FastCLIP's estimator as its paper writes it, on dense matrices."""

    def __init__(self, gamma: float, rho: float | None, eps: float) -> None:
        self.gamma, self.rho, self.eps = gamma, rho, eps
        self.u = [torch.zeros(SAMPLES, dtype=torch.float64) for _ in range(2)]

    def __call__(self, x: Tensor, y: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
        scale = scale if self.rho is not None else scale.detach()
        t, off = x @ y.T, ~torch.eye(len(x), dtype=torch.bool)
        own, value, estimate = t.diagonal(), 0, 0
        for u, dim in zip(self.u, (1, 0), strict=True):
            g = ((scale * (t - own.unsqueeze(dim))).exp() * off).sum(dim) / (len(x) - 1)
            new = (1 - self.gamma) * u[indices] + self.gamma * g.detach()
            u[indices] = torch.where(u[indices] == 0, g.detach(), new)
            value = value + (self.eps + u[indices]).log().mean() / 2
            estimate = estimate + (g / (self.eps + u[indices])).mean() / 2
        gradient = estimate - estimate.detach()
        if self.rho is None:
            return value + gradient
        tau = 1 / scale
        return tau * (value + self.rho) + tau.detach() * gradient


@pytest.mark.parametrize("rho", [None, 6.5], ids=["v1", "v3"])
def test_global_loss_over_steps(rho: float | None, engine: str) -> None:
    ours = GlobalClipLoss(SAMPLES, 0.6, rho=rho, eps=1e-3, backend=engine).double()
    theirs = Dense(0.6, rho, 1e-3)
    for _ in range(5):
        indices = torch.randperm(SAMPLES)[:N]
        x, y = (
            F.normalize(torch.randn(N, D, dtype=torch.float64), dim=1).requires_grad_()
            for _ in range(2)
        )
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        inputs = (x, y, scale, indices)
        assert_equal(ours(*inputs), theirs(*inputs), [x, y, scale], 1e-10)
        for buffer, u in zip((ours.log_u_images, ours.log_u_texts), theirs.u, strict=True):
            torch.testing.assert_close(buffer.exp(), u, rtol=1e-12, atol=0)


def test_global_loss_without_memory_is_decoupled(leaves: list[Tensor]) -> None:
    x, y, scale, _ = leaves
    indices = torch.arange(N, device=x.device)
    module = GlobalClipLoss(SAMPLES, gamma=1.0, eps=0.0).to(x.device).double()
    theirs = info_nce(x, y, scale, decoupled=True, symmetric=True) - math.log(N - 1)
    for _ in range(2):
        assert_equal(module(x, y, scale, indices, output_dict=True)["contrastive_loss"], theirs,
                     leaves[:2])  # fmt: skip
    assert torch.autograd.grad(module(x, y, scale, indices), scale, allow_unused=True)[0] is None


def test_evaluation_neither_reads_nor_writes_averages(leaves: list[Tensor]) -> None:
    x, y, scale, _ = (t.detach() for t in leaves)
    indices = torch.arange(N, device=x.device)
    module = GlobalClipLoss(SAMPLES, gamma=0.5).to(x.device)
    fresh = module.eval()(x, y, scale, indices)
    assert module.log_u_images.eq(-math.inf).all()
    module.train()(y, x, 2 * scale, indices)
    before = copy.deepcopy(module.state_dict())
    torch.testing.assert_close(module.eval()(x, y, scale, indices), fresh)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_averages_are_saved_and_loaded(leaves: list[Tensor]) -> None:
    x, y, scale, _ = (t.detach() for t in leaves)
    indices = torch.arange(N, device=x.device) * 2
    module = GlobalClipLoss(SAMPLES, rho=8.0).to(x.device)
    module(x, y, scale, indices)
    assert module.log_u_texts.isfinite().sum() == N
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    other = GlobalClipLoss(SAMPLES, rho=8.0).to(x.device)
    other.load_state_dict(torch.load(saved))
    copies = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))
    right = module(y, x, scale, indices)
    for one in (other, *copies):
        assert torch.equal(one(y, x, scale, indices), right)


def test_averages_of_large_logits_do_not_overflow() -> None:
    x = F.normalize(torch.randn(N, D), dim=1)
    module = GlobalClipLoss(SAMPLES, gamma=0.5)
    for _ in range(2):
        assert module(x, -x, 1e4, torch.arange(N)).isfinite()
    assert module.log_u_images[:N].max() > 1e3 and module.log_u_images[:N].isfinite().all()


def test_averages_stay_out_of_half_precision() -> None:
    x, towers = F.normalize(torch.randn(N, D), dim=1), nn.ModuleList([GlobalClipLoss(SAMPLES)])
    towers[0](x, x, 5.0, torch.arange(N))
    before = towers[0].log_u_images.clone()
    assert torch.equal(towers.bfloat16()[0].log_u_images, before)
    wide = towers.double()[0].log_u_texts.clone()
    assert torch.equal(towers.half()[0].log_u_texts, wide)
    assert towers.float()[0].log_u_texts.dtype == torch.float32


def test_gamma_decays_along_a_cosine() -> None:
    module = GlobalClipLoss(SAMPLES, gamma=0.2, decay_epochs=10)
    assert module.gamma == 1.0
    for epoch, gamma in ((5, 0.6), (10, 0.2), (12, 0.2), (0, 1.0)):
        module.set_epoch(epoch)
        assert module.gamma == pytest.approx(gamma)
    constant = GlobalClipLoss(SAMPLES, gamma=0.2)
    constant.set_epoch(0)
    assert constant.gamma == 0.2


def test_every_public_module_is_tested_here() -> None:
    # Unused imports are errors of the linter.
    assert {name for name in loss.__all__ if name.endswith("Loss")} <= globals().keys()
