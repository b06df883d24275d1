"""Results are right for any batch size, feature size and strides."""

import functools
from collections.abc import Callable

import pytest
import torch
from support.hard_inputs import batch
from support.judge import PRECISIONS, QUANTITIES, allowance, error, evaluate, plain, truth
from support.losses import LOSSES
from support.oracle import Truth
from torch import Tensor

from fastclip.loss import clip_loss

SIZES = (1, 2, 3, 127, 128, 129, 251, 257, 521)
FEATURES = (1, 7, 64, 96, 512, 832, 1152)
SHAPES = [(n, d) for n in SIZES for d in (7, 64)]
SHAPES += [(n, d) for n in (3, 129) for d in FEATURES if d not in (7, 64)]
SHAPES += [(2311, 8)]  # several chunks in every engine


@functools.cache
def judges(
    loss: str, n: int, d: int, precision: str, device: torch.device
) -> tuple[Truth, dict[str, Tensor]]:
    case = (*batch("random", n, d), 14.3, -3.0, PRECISIONS[precision])
    return truth(loss, *case), evaluate(plain(loss), *case, device)


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_shape_is_accurate(
    loss: str,
    engine: str,
    precision: str,
    n: int,
    d: int,
    device: torch.device,
    assert_accurate: Callable[..., None],
) -> None:
    p = PRECISIONS[precision]
    case = (*batch("random", n, d), 14.3, -3.0, p)
    exact, torchs = judges(loss, n, d, precision, device)
    ours = evaluate(LOSSES[loss], *case, device, backend=engine)
    for name in QUANTITIES:
        eps = allowance(name, exact, p, ours[name].dtype)
        assert_accurate(ours[name], torchs[name], getattr(exact, name), eps, name)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_batch_of_one_pair(backend: str, precision: str, device: torch.device) -> None:
    case = (*batch("random", 1, 9), 100.0, -3.0, PRECISIONS[precision])
    ours = evaluate(clip_loss, *case, device, backend=backend)
    for name in QUANTITIES:
        assert not ours[name].any(), name


N, D = 70, 12
# Each function makes an (N, D) view of a larger contiguous tensor.
VIEWS: dict[str, tuple[tuple[int, int], Callable[[Tensor], Tensor]]] = {
    "transposed": ((D, N), lambda t: t.T),
    "sliced columns": ((N, D + 5), lambda t: t[:, 3 : 3 + D]),
    "second half of the columns": ((N, 2 * D), lambda t: t.chunk(2, dim=1)[1]),
    "every second row": ((2 * N, D), lambda t: t[::2]),
    "every second column": ((N, 2 * D), lambda t: t[:, ::2]),
    "storage offset": ((N * D + 1, 1), lambda t: t[1:].view(N, D)),
    "expanded rows": ((1, D), lambda t: t.expand(N, D)),
    "expanded columns": ((N, 1), lambda t: t.expand(N, D)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_strides_do_not_change_results(
    loss: str, backend: str, dtype: torch.dtype, view: str, device: torch.device
) -> None:
    shape, take = VIEWS[view]
    results = []
    for layout in (lambda t: t, Tensor.contiguous):
        generator = torch.Generator().manual_seed(1)
        base = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        other = torch.randn((N, D), generator=generator).to(device, dtype).requires_grad_()
        value = LOSSES[loss](layout(take(base)), other, 1.0, backend=backend)
        value = value + LOSSES[loss](other, layout(take(base)), 1.0, backend=backend)
        value.backward()
        results.append((value, base.grad, other.grad))
    for strided, contiguous in zip(*results, strict=True):
        torch.testing.assert_close(strided, contiguous)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_upstream_gradient_may_have_any_strides(
    loss: str, backend: str, device: torch.device
) -> None:
    x, y = (torch.tensor(t, device=device, requires_grad=True) for t in batch("random", N, D))
    per_pair = LOSSES[loss](x, y, 14.3, reduction="none", backend=backend)
    g = torch.randn(2 * N, dtype=torch.float64, device=device)[::2]
    strided = torch.autograd.grad(per_pair, (x, y), g, retain_graph=True)
    copied = torch.autograd.grad(per_pair, (x, y), g.contiguous(), retain_graph=True)
    torch.testing.assert_close(strided, copied)
    expanded = torch.autograd.grad(per_pair.sum(), (x, y))  # upstream stride zero
    total = LOSSES[loss](x, y, 14.3, reduction="sum", backend=backend)
    torch.testing.assert_close(expanded, torch.autograd.grad(total, (x, y)))
    torch.testing.assert_close(per_pair.sum(), total)


def test_batches_grow_and_shrink(engine: str, device: torch.device) -> None:
    # Buffers and labels of another size must not be reused.
    for n in (5, 300, 2, 64, 5):
        case = (*batch("random", n, 16), 14.3, -3.0, PRECISIONS["float32"])
        ours = evaluate(clip_loss, *case, device, backend=engine)
        assert error(ours["dx"], truth("clip", *case).dx) < 1e-6
