"""Steps of training with transformers' fused models: ranks, compilation, precision."""

from typing import Any

import pytest
import torch
from support.peers import find
from support.ranks import two_towers
from support.ranks.processes import Ranks
from support.two_towers import batch_of, model_of
from torch import Tensor, nn

from fastclip.integrations.transformers import fuse


@pytest.fixture(scope="module", autouse=True)
def transformers() -> None:
    find("transformers")


def assert_same(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


def of_one_process(name: str, rows: int) -> tuple[dict[str, Tensor], float]:
    """The gradients and the loss of transformers' own code."""
    model = two_towers.without_dropout(name)
    return two_towers.gradients(model, two_towers.rows_of(name, 0, rows))


@pytest.mark.parametrize(
    "name", ["CLIPModel", "SiglipModel", "AlignModel", "ClapModel", "Tipsv2Model"]
)
@pytest.mark.parametrize("ends", [[0, 5, 10], [0, 7, 10], [0, 9, 10]], ids=str)
def test_ranks_have_the_gradients_of_one_process(two: Ranks, name: str, ends: list[int]) -> None:
    exact, value = of_one_process(name, ends[-1])
    found = two.run(two_towers.under_ddp, name, ends, {})
    for gradients, _ in found:
        assert_same(gradients, exact)
    assert sum(share for _, share in found) / 2 == pytest.approx(value, rel=1e-9)


def test_equal_batches_without_exchanged_sizes(two: Ranks) -> None:
    """The whole step is compiled."""
    exact, value = of_one_process("CLIPModel", 10)
    found = two.run(two_towers.under_ddp, "CLIPModel", [0, 5, 10], {"uneven": False}, True)
    for gradients, _ in found:
        assert_same(gradients, exact)
    assert sum(share for _, share in found) / 2 == pytest.approx(value, rel=1e-9)


def test_unequal_batches_without_exchanged_sizes_are_an_error(two: Ranks) -> None:
    for error in two.outcomes(two_towers.under_ddp, "CLIPModel", [0, 7, 10], {"uneven": False}):
        assert "ValueError" in str(error) and "7" in str(error) and "3" in str(error)


def test_ranks_apart_are_theirs(two: Ranks) -> None:
    ends = [0, 7, 10]
    ours, theirs = (
        two.run(two_towers.under_ddp, "CLIPModel", ends, options)
        for options in ({"across_ranks": False}, None)
    )
    for (found, value), (exact, expected) in zip(ours, theirs, strict=True):
        assert_same(found, exact)
        assert value == pytest.approx(expected, rel=1e-9)
    assert abs(ours[0][1] - of_one_process("CLIPModel", 10)[1]) > 0.1


def test_a_rank_may_evaluate_alone(two: Ranks) -> None:
    values, nothing = two.run(two_towers.evaluated, "CLIPModel")
    _, exact = of_one_process("CLIPModel", two_towers.B_EACH)
    assert nothing is None and values == pytest.approx([exact, exact], rel=1e-9)


def test_fsdp(two: Ranks) -> None:
    assert max(two.run(two_towers.under_fsdp, "SiglipModel")) < 1e-10


def test_compiled_whole() -> None:
    model, batch = fuse(model_of("CLIPModel").eval()), batch_of("CLIPModel")
    exact, value = two_towers.gradients(model, batch)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    outputs = compiled(**batch, return_loss=True)
    outputs.loss.backward()
    assert outputs.logits_per_text is None and float(outputs.loss) == pytest.approx(value)
    assert_same({n: p.grad for n, p in model.named_parameters()}, exact)


def test_compiled_before_it_is_fused() -> None:
    """A compiled module runs the model that it holds."""
    model, batch = model_of("CLIPModel").eval(), batch_of("CLIPModel")
    compiled = torch.compile(model, backend="eager")
    assert compiled(**batch, return_loss=True).logits_per_text is not None
    fuse(model)
    assert compiled(**batch, return_loss=True).logits_per_text is None


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_loses_no_more_than_theirs(name: str, dtype: torch.dtype) -> None:
    """The truth is float64 on the features of the half-precision towers."""
    model, batch = model_of(name, torch.float32).eval(), batch_of(name, dtype=torch.float32)
    # Confident models: at this scale logits are rounded to steps of 0.25 in bfloat16.
    model.logit_scale.data.fill_(4.0)

    def run() -> tuple[Any, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            outputs = model(**batch, return_loss=True)
        outputs.loss.backward()
        return outputs, model.logit_scale.grad

    theirs, their_gradient = run()
    fuse(model)
    ours, our_gradient = run()
    assert ours.loss.dtype == torch.float32
    features = [t.detach().double() for t in (ours.image_embeds, ours.text_embeds)]
    assert torch.equal(ours.image_embeds, theirs.image_embeds)
    bias = getattr(model, "logit_bias", None)
    exact, gradient = truth(features, model.logit_scale, bias)
    errors = [abs(float(o.loss - exact)) for o in (ours, theirs)]
    of_gradients = [abs(float(g.squeeze() - gradient)) for g in (our_gradient, their_gradient)]
    assert errors[0] <= errors[1] + 1e-6 * float(exact)
    assert of_gradients[0] <= of_gradients[1] + 1e-5 * float(gradient.abs())


def truth(features: list[Tensor], log_scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the scale's logarithm in float64."""
    images, texts = features
    log_scale = log_scale.detach().double().squeeze().requires_grad_()
    logits = log_scale.exp() * texts @ images.T
    own = torch.arange(len(logits))
    if bias is None:
        halves = (nn.functional.cross_entropy(t, own) for t in (logits, logits.T))
        value = sum(halves) / 2
    else:
        signs = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
        value = -nn.functional.logsigmoid(signs * (logits + bias.detach().double())).sum(1).mean()
    return value.detach(), torch.autograd.grad(value, log_scale)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    """Their loss has the model's dtype, ours float32."""
    model, batch = model_of("CLIPModel", dtype).eval(), batch_of("CLIPModel", dtype=dtype)
    theirs = model(**batch, return_loss=True).loss
    ours = fuse(model)(**batch, return_loss=True).loss
    ours.backward()
    assert theirs.dtype == dtype and ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=2e-2)
    assert all(p.grad.dtype == dtype for p in model.parameters())


def test_gradient_checkpointing() -> None:
    model, batch = model_of("CLIPModel"), batch_of("CLIPModel")
    torch.manual_seed(3)
    exact, _ = two_towers.gradients(model, batch)
    exact = {n: g.clone() for n, g in exact.items()}
    model.zero_grad()
    fuse(model).gradient_checkpointing_enable()
    torch.manual_seed(3)
    found, _ = two_towers.gradients(model, batch)
    assert_same(found, exact)
