"""The option `live`: summed over slices that cover the batch, values and gradients (scale
included) equal the full batch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.hard_inputs import batch
from support.judge import PRECISIONS, allowance, error, truth
from support.losses import LOSSES
from torch import Tensor

from fastclip import clip_loss
from fastclip.engine import operators
from fastclip.engine.block import Block
from fastclip.loss import ClipLoss, SigLipLoss

SLICES = ((0, 5), (5, 6), (6, 23))
N, D = 23, 24


def leaves(
    batch_name: str = "random", precision: str = "float64", scale: float = 14.3
) -> list[Tensor]:
    of = PRECISIONS[precision]
    x, y = batch(batch_name, N, D)
    values = ((x, of.x), (y, of.y), (scale, of.scalars), (-3.0, of.scalars))
    return [torch.tensor(v, dtype=dtype).requires_grad_() for v, dtype in values]


def spliced(x: Tensor, start: int, stop: int) -> Tensor:
    """Returns x, of which only rows start to stop have a graph, as in gradient accumulation."""
    dead = x.detach()
    return torch.cat((dead[:start], x[start:stop], dead[stop:]))


def accumulated(loss: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Returns value and gradients, summed over SLICES."""
    total = torch.zeros((), dtype=torch.float64)
    x, y, *scalars = inputs
    for live in SLICES:
        value = loss(spliced(x, *live), spliced(y, *live), *scalars, live=live, **options)
        value.backward()
        total += value.detach()
    return [total, *(leaf.grad for leaf in inputs)]


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_slices_add_up_to_the_full_batch(loss: str, precision: str, engine: str) -> None:
    wrong = []
    for batch_name, scale, normalize in (
        ("random", 14.3, False), ("lengths", 14.3, True), ("separated", 100.0, False),
        ("dominating", 1e3, False),
    ):  # fmt: skip
        inputs = leaves(batch_name, precision, scale)
        found = accumulated(LOSSES[loss], inputs, normalize=normalize, backend=engine)
        of = PRECISIONS[precision]
        exact = truth(loss, *batch(batch_name, N, D), scale, -3.0, of, normalize=normalize)
        names = ("loss", "dx", "dy", "dscale", "dbias")
        for name, value, leaf in zip(names, found, [inputs[2], *inputs], strict=True):
            allowed = 4 * allowance(name, exact, of, leaf.dtype) + 1e-15
            mistake = error(np.asarray(value.double()), np.asarray(getattr(exact, name), float))
            if not mistake <= allowed:
                wrong.append(f"{batch_name} {name}: {mistake:.1e}, allowed {allowed:.1e}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("loss", LOSSES)
def test_reduction_sum_and_a_frozen_tower(loss: str) -> None:
    inputs = leaves()
    inputs[1].requires_grad_(False)
    found = accumulated(LOSSES[loss], inputs, reduction="sum")
    exact = truth(loss, *batch("random", N, D), 14.3, -3.0, PRECISIONS["float64"])
    assert found[2] is None
    for name, value in (("loss", found[0]), ("dx", found[1]), ("dscale", found[3])):
        assert error(np.asarray(value), N * np.asarray(getattr(exact, name), float)) < 1e-12


@pytest.mark.parametrize("module", [ClipLoss, SigLipLoss])
def test_modules_take_live_pairs(module: type[torch.nn.Module]) -> None:
    found = accumulated(module(), leaves())
    whole = leaves()
    module()(*whole).backward()
    for value, leaf in zip(found[1:], whole, strict=True):
        torch.testing.assert_close(value, leaf.grad)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_live_rows_and_columns_are_weighed(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts pairs in all products. The first sweep takes the whole batch for states (CLIP), or the
    live rows alone (SigLIP); then there are two products of the live rows and two of the live
    columns."""
    pairs = []

    def counted(run: Callable[..., Any], products: int) -> Callable[..., Any]:
        def call(engine: str, block: Block, *rest: Any, **options: Any) -> Any:
            m, n = block.sizes()
            pairs.append(products * m * n)
            return run(engine, block, *rest, **options)

        return call

    monkeypatch.setattr(operators, "sweep", counted(operators.sweep, 1))
    monkeypatch.setattr(operators, "weigh", counted(operators.weigh, 2))
    x, y, *scalars = leaves()
    LOSSES[loss](x, y, *scalars, live=(3, 7)).backward()
    assert sum(pairs) == N * (N if loss == "clip" else 4) + 2 * 2 * 4 * N


@pytest.mark.parametrize("live", [(0, 0), (3, 2), (-1, 4), (0, N + 1), (0.5, 2), 3, (1, 2, 3)])
def test_a_wrong_slice_is_refused(live: object) -> None:
    with pytest.raises(ValueError, match=r"live must be .*stop <= 23 pairs, got"):
        clip_loss(*leaves(), live=live)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"backend": "reference"}])
def test_options_that_exclude_live_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="live pairs must be reduced"):
        clip_loss(*leaves(), live=(0, 4), **options)

    class Own(ClipLoss):
        def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
            return super().get_ground_truth(device, num_logits).flip(0)

    with pytest.raises(ValueError, match="live must be None"):
        Own()(*leaves(), live=(0, 4))


def test_live_in_a_compiled_function() -> None:
    """The loss with `live` breaks the graph."""
    x, y, *scalars = leaves()
    step = torch.compile(lambda *a: clip_loss(*a, live=(2, 9)) * 2, backend="aot_eager")
    step(x, y, *scalars).backward()
    other = leaves()
    (clip_loss(*other, live=(2, 9)) * 2).backward()
    torch.testing.assert_close(x.grad, other[0].grad)
