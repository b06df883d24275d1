"""transformers' two-tower models with a fused loss: outputs, gradients, tensors that are made."""

from typing import Any

import pytest
import torch
from support.tensor_results import TensorResults
from support.two_towers import NAMES, N, batch_of, model_of
from torch import Tensor, nn

from fastclip.engine import warn_once
from fastclip.integrations.transformers import fuse


class SquareTensors(TensorResults):
    """Counts operations that return an (N, N) tensor."""

    count = 0

    def see(self, tensors: list[Tensor]) -> None:
        self.count += (N, N) in [t.shape for t in tensors]


def step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> tuple[Any, dict, int]:
    """Returns the outputs, the gradients, and the number of (N, N) tensors that were made."""
    model.zero_grad()
    torch.manual_seed(5)  # dropout
    with SquareTensors() as squares:
        outputs = model(**batch, return_loss=True, **options)
        (outputs[0] if isinstance(outputs, tuple) else outputs.loss).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return outputs, gradients, squares.count


def assert_same(ours: Any, theirs: Any) -> None:
    """Asserts that outputs or gradients are equal to rounding, nested ones too."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert_same(list(ours.values()), list(theirs.values()))
    elif isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_without_logits(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    theirs, exact, squares = step(model, batch)
    assert squares >= 4
    fused = fuse(model)
    assert fused is model and type(model).__name__ == name
    ours, found, squares = step(model, batch)
    assert squares == 0
    logits = [key for key in theirs if key.startswith("logits")]
    assert len(logits) == 2 and all(getattr(ours, key) is None for key in logits)
    assert_same(dict(ours), {k: v for k, v in theirs.items() if k not in logits})
    assert sum(g is not None and bool(g.abs().max() > 1e-6) for g in exact.values()) > 20
    assert_same(found, exact)


@pytest.mark.parametrize("name", NAMES)
def test_logits_hidden_states_and_attentions_on_request(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    wanted = {"output_hidden_states": True}
    if name != "AlignModel":  # an EfficientNet has none
        wanted["output_attentions"] = True
        model.set_attn_implementation("eager")
    theirs, exact, _ = step(model, batch, **wanted)
    ours, found, _ = step(fuse(model, keep_logits=True), batch, **wanted)
    # GroupViT does not pass the wish on to its text tower.
    assert any(getattr(theirs[k], "hidden_states", None) for k in theirs if k.endswith("output"))
    assert type(ours) is type(theirs)
    assert_same(dict(ours), dict(theirs))
    assert_same(found, exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_without_loss_returns_their_outputs(name: str) -> None:
    model, batch = model_of(name).eval(), batch_of(name)
    theirs = model(**batch)
    ours = fuse(model)(**batch)
    assert ours.loss is None
    assert_same(dict(ours), dict(theirs))


@pytest.mark.parametrize("name", ["CLIPModel", "GroupViTModel", "VisionTextDualEncoderModel"])
def test_a_tuple_leaves_the_logits_out(name: str) -> None:
    model, batch = model_of(name), batch_of(name)
    theirs, exact, _ = step(model, batch, return_dict=False)
    whole, _, _ = step(fuse(model, keep_logits=True), batch, return_dict=False)
    assert_same(whole, theirs)
    ours, found, squares = step(fuse(model), batch, return_dict=False)
    assert squares == 0
    assert_same(ours, (theirs[0], *theirs[3:]))
    assert_same(found, exact)


def test_arguments_by_position() -> None:
    model, batch = fuse(model_of("CLIPModel").eval()), batch_of("CLIPModel")
    named = model(**batch, return_loss=True).loss
    inputs = batch["input_ids"], batch["pixel_values"], batch["attention_mask"]
    assert model(*inputs, None, True).loss == named
    with pytest.raises(TypeError, match="multiple values"):
        model(*inputs, input_ids=inputs[0], return_loss=True)
    with pytest.raises(AttributeError):
        model(input_ids=inputs[0], return_loss=True)


def test_batches_that_do_not_pair_are_an_error() -> None:
    model, batch = fuse(model_of("CLIPModel")), batch_of("CLIPModel")
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        model(batch["input_ids"][1:], batch["pixel_values"], return_loss=True)


def test_segmentation_is_served_by_their_code() -> None:
    """Its logits are (N, N, height, width)."""
    warn_once._given.clear()
    model, batch = model_of("GroupViTModel"), batch_of("GroupViTModel")
    theirs, exact, _ = step(model, batch, output_segmentation=True)
    with pytest.warns(UserWarning, match="GroupViTModel was called with output_segmentation"):
        ours, found, _ = step(fuse(model), batch, output_segmentation=True)
    assert ours.segmentation_logits.shape[:2] == (N, N)
    assert_same(dict(ours), dict(theirs))
    assert_same(found, exact)


def test_images_without_texts_are_served_by_their_code() -> None:
    """TIPSv2 then returns no loss."""
    model, batch = fuse(model_of("Tipsv2Model").eval()), batch_of("Tipsv2Model")
    outputs = model(pixel_values=batch["pixel_values"], return_loss=True)
    assert outputs.loss is None and outputs.image_embeds is not None
