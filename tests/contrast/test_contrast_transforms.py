"""`contrast` and the losses work with compile, export, transforms, FLOP counters, fake tensors."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from support.contrast_case import OPTIONS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastclip import LineStatistics, clip_loss, contrast, siglip_loss
from fastclip.engine.kept import KEPT_BY

D = 8


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_inputs(m: int, n: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Returns x, y, scale, bias, key_bias, the ids of rows and columns, and labels."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(k, D, generator=generator) for k in (m, n)]
    scalars = torch.tensor(1.5), torch.tensor(-1.0), torch.randn(n, generator=generator)
    leaves = [t.to(device).requires_grad_() for t in (*sides, *scalars)]
    ids = (torch.randint(0, 5, (k,), generator=generator).to(device) for k in (m, n))
    return [*leaves, *ids, torch.randint(0, n, (m,), generator=generator).to(device)]


def loss_of(options: str, **others: object) -> Callable[..., Tensor]:
    """Returns a loss of all statistics that `contrast` computes with these options."""
    given = dict(OPTIONS[options])
    has_ids, has_bias = given.pop("ids", None), given.pop("key_bias", None)
    margin, has_labels = given.pop("margin", None), given.pop("labels", False)
    one_set, _ = given.pop("one_set", False), given.pop("masked", None)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, key_bias: Tensor,
             x_ids: Tensor, y_ids: Tensor, labels: Tensor) -> Tensor:  # fmt: skip
        ids = (y_ids[labels] if has_labels else x_ids, y_ids) if has_ids else None
        c = contrast(
            x, None if one_set else y, scale, bias, labels=labels if has_labels else None,
            ids=x_ids if one_set and has_ids else ids,
            key_bias=key_bias if has_bias else None, false_negative_margin=margin, **given,
            **others,
        )  # fmt: skip
        return sum(torch.tanh(t / 10).nan_to_num(0.0).sum() for t in c if t is not None)

    return loss


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    found = torch.autograd.grad(value, inputs[:5], allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


@pytest.mark.parametrize(
    ("options", "kind", "normalize"),
    [
        ("everything", "softmax", True), ("no positives", "sigmoid", False),
        ("itself and ids", "softmax", True),
    ],
)  # fmt: skip
def test_one_graph_serves_every_size(
    options: str, kind: str, normalize: bool, device: torch.device, fresh_compiler: None
) -> None:
    """With the default engine: tracing takes seconds, and differs between engines in a name."""
    loss = loss_of(options, kind=kind, normalize=normalize)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for m, n in ((5, 9), (8, 6), (40, 31)):
        inputs = make_inputs(m, n, device)
        for ours, eager in zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True):
            torch.testing.assert_close(ours, eager)
        graphs.append(counter.frame_count)
    # M < N and M > N may each have a graph.
    assert graphs[-1] <= graphs[0] + 1


def test_export(engine: str, device: torch.device) -> None:
    class Loss(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return loss_of("everything", backend=engine)(*inputs)

    inputs = make_inputs(12, 15, device)
    program = torch.export.export(Loss(), tuple(inputs))
    other = make_inputs(12, 15, device, seed=1)
    torch.testing.assert_close(program.module()(*other), Loss()(*other))


def info_nce(c: LineStatistics) -> Tensor:
    return F.softplus(c.rows - c.positives).sum()


def labelled(x: Tensor, y: Tensor, **others: object) -> Tensor:
    ids = torch.arange(10, device=x.device) // 2
    labels = 2 * torch.arange(10, device=x.device) % 10
    c = contrast(
        x, y, 2.0, labels=labels, ids=(ids[labels], ids), same_id="positive", means=True,
        normalize=True, **others,
    )  # fmt: skip
    return info_nce(c) + c.row_means.sum() - c.column_positive_means.nan_to_num(0).sum()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, **o: clip_loss(x, y, 2.0, **o),
    "clip, none": lambda x, y, **o: clip_loss(x, y, 2.0, reduction="none", **o).square().sum(),
    "siglip": lambda x, y, **o: siglip_loss(x, y, 2.0, -1.0, normalize=True, **o),
    "contrast": lambda x, y, **o: info_nce(contrast(x, y, 2.0, **o)),
    "labels": lambda x, y, **o: labelled(x, y, **o),
    "itself": lambda x, y, **o: contrast(x + y, None, 2.0, means=True, **o).row_means.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_func_grad_and_vmap(loss: str, engine: str, device: torch.device) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return LOSSES[loss](x, y, backend=engine)

    x, y = torch.randn(2, 3, 10, D, device=device).unbind()
    pairs = map(torch.func.grad(function, (0, 1)), x, y)
    each = [torch.stack(found) for found in zip(*pairs, strict=True)]
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    for one, other in zip(each, torch.autograd.grad(
        sum(function(a, b) for a, b in zip(*leaves, strict=True)), leaves
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        torch.vmap(function)(x, y), torch.stack([function(a, b) for a, b in zip(x, y, strict=True)])
    )
    # All image batches share a text batch; gradients run within vmap, and vmap within a gradient.
    shared = torch.vmap(function, in_dims=(0, None))(x, y[0])
    torch.testing.assert_close(shared, torch.stack([function(a, y[0]) for a in x]))
    by_x, by_y = torch.vmap(torch.func.grad(function, (0, 1)), in_dims=(0, None))(x, y[0])
    for k, a in enumerate(x):
        torch.testing.assert_close((by_x[k], by_y[k]), torch.func.grad(function, (0, 1))(a, y[0]))
    for one, other in zip(torch.vmap(torch.func.grad(function, (0, 1)))(x, y), each, strict=True):
        torch.testing.assert_close(one, other)
    outside = torch.func.grad(lambda x, y: torch.vmap(function)(x, y).sum(), (0, 1))(x, y)
    for one, other in zip(outside, each, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", LOSSES)
def test_unsupported_derivatives_raise(loss: str, engine: str, device: torch.device) -> None:
    x, y = torch.randn(2, 10, D, device=device).unbind()

    def function(x: Tensor) -> Tensor:
        return LOSSES[loss](x, y, backend=engine)

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(function, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            function(dual)
        function(x)  # without a tangent nothing is differentiated
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(function)(x).sum())(x)


def test_vmap_over_labels_and_ids(engine: str, device: torch.device) -> None:
    """Samples share features, or labels, or neither."""
    inputs = make_inputs(6, 7, device)
    x, y = (t.detach() for t in inputs[:2])
    for options in ("everything, labels", "means of positives", "itself, positives by id"):
        loss = loss_of(options, backend=engine)

        def gradient(x: Tensor, y: Tensor, *integers: Tensor, loss: Callable = loss) -> tuple:
            return torch.func.grad(loss, (0, 1))(x, y, *inputs[2:5], *integers)

        others = make_inputs(6, 7, device, seed=1)[5:]
        integers = [torch.stack(both) for both in zip(inputs[5:], others, strict=True)]
        for features in ((x, y), (torch.stack((x, -x)), torch.stack((y, 2 * y)))):
            dims = (None, None) if features[0] is x else (0, 0)
            found = torch.vmap(gradient, in_dims=(*dims, 0, 0, 0))(*features, *integers)
            for k in range(2):
                one = (t if dims[0] is None else t[k] for t in features)
                expected = gradient(*one, *(t[k] for t in integers))
                torch.testing.assert_close(tuple(t[k] for t in found), expected)


def test_fake_and_meta_tensors(engine: str) -> None:
    for options in ("plain", "everything", "everything, labels", "itself, positives by id"):
        inputs = make_inputs(12, 15, torch.device("cpu"))
        expected = gradients(loss_of(options, backend=engine), inputs)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in inputs]
            found = gradients(loss_of(options, backend=engine), fakes)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
    metas = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(loss_of(options), metas)
    assert all(
        one.is_meta and one.shape == other.shape for one, other in zip(found, expected, strict=True)
    )
    value = clip_loss(*(t[:12] for t in metas[:2]), 2.0)
    assert value.is_meta and value.shape == ()


@pytest.mark.parametrize("loss", ["clip", "siglip", "contrast"])
def test_flops_are_counted_in_passes(loss: str, engine: str, device: torch.device) -> None:
    """A pass is 2 M N D. Softmax takes one for the sweep and three to weigh, or two if all products
    were kept; the sigmoid loss takes three in all."""
    n = 64
    for budget in (0, 1 << 20):
        x, y = (torch.randn(n, D, device=device, requires_grad=True) for _ in range(2))
        with FlopCounterMode(display=False) as counter:
            value = LOSSES[loss](x, y, backend=engine, memory_budget=budget)
            forward = counter.get_total_flops()
            value.backward()
        keeps = KEPT_BY[engine].__name__ == "Products" and budget > 0
        passes = (3, 3) if loss == "siglip" else (1, 3 if keeps else 4)
        assert forward == passes[0] * 2 * n * n * D
        assert counter.get_total_flops() == passes[1] * 2 * n * n * D
        x.grad = None
        y.requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            LOSSES[loss](x, y, backend=engine, memory_budget=budget).backward()
        assert counter.get_total_flops() == (passes[1] - 1) * 2 * n * n * D
