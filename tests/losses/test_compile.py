"""The losses compile into one graph for all batch sizes, and torch.export exports them."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from support.losses import LOSSES
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastclip.loss import ClipLoss, SigLipLoss, clip_loss, siglip_loss

MODULES = {"clip": ClipLoss, "siglip": SigLipLoss}
SIZES = (5, 8, 13, 40, 131)
D = 12


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_inputs(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, D, generator=generator).to(device, dtype).unbind()
    scale, bias = (torch.tensor(t, device=device) for t in (1.5, -1.0))
    return [t.detach().requires_grad_() for t in (x, y, scale, bias)]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    value = function(*inputs)
    gradients = torch.autograd.grad(value, inputs, torch.ones_like(value))
    return value.detach(), *gradients


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": True}, {"reduction": "none"}, {"memory_budget": 1 << 12}],
    ids=str,
)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_graph_serves_every_batch_size(
    loss: str, engine: str, options: dict, device: torch.device
) -> None:
    def function(*inputs: Tensor) -> Tensor:
        return LOSSES[loss](*inputs, backend=engine, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for n in SIZES:
        inputs = make_inputs(n, device)
        for ours, eager in zip(results(compiled, inputs), results(function, inputs), strict=True):
            torch.testing.assert_close(ours, eager)
        graphs.append(counter.frame_count)
    # Dynamo may compile the first size twice, and a batch too large for the budget to keep any
    # row may have a graph of its own.
    assert graphs[-1] <= graphs[0] + ("memory_budget" in options)


@pytest.mark.parametrize("loss", LOSSES)
def test_dynamic_sizes_are_detected_automatically(
    loss: str, engine: str, device: torch.device
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[loss], backend=counter, fullgraph=True)
    for n in SIZES:
        compiled(*make_inputs(n, device), backend=engine).backward()
        if n == SIZES[1]:  # the first size had its own graph; this graph serves all others
            graphs = counter.frame_count
    assert counter.frame_count == graphs


class Step(nn.Module):
    """Two towers and their loss, compiled together as in a training step."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.image, self.text, self.loss = nn.Linear(7, D), nn.Linear(5, D), loss
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        features = (
            nn.functional.normalize(tower(t), dim=-1)
            for tower, t in ((self.image, images), (self.text, texts))
        )
        out = self.loss(*features, self.scale.exp(), self.bias, output_dict=True)
        return out["contrastive_loss"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", MODULES)
def test_a_training_step_compiles_into_one_graph(
    loss: str, autocast: bool, device: torch.device
) -> None:
    step = Step(MODULES[loss]()).to(device)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 9, 24):
        images, texts = torch.randn(n, 7, device=device), torch.randn(n, 5, device=device)
        found = []
        for function in (step, compiled):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                value = function(images, texts)
            assert value.dtype == torch.float32
            found.append((value, *torch.autograd.grad(value, list(step.parameters()))))
        for eager, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager)


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_both_losses(device: torch.device) -> None:
    def both(*inputs: Tensor) -> Tensor:
        return clip_loss(*inputs) + siglip_loss(*inputs)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for n in (6, 33):
        inputs = make_inputs(n, device)
        expected = results(both, inputs)
        for ours, eager in zip(results(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", MODULES)
def test_a_module_with_a_loss_can_be_exported(loss: str, device: torch.device) -> None:
    step = Step(MODULES[loss]()).to(device).eval()
    sample = (torch.randn(8, 7, device=device), torch.randn(8, 5, device=device))
    batch = torch.export.Dim("batch", min=2, max=4096)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            shapes = ({0: batch}, {0: batch})
            program = torch.export.export(step, sample, dynamic_shapes=shapes)
            for n in (2, 8, 133):
                inputs = (torch.randn(n, 7, device=device), torch.randn(n, 5, device=device))
                torch.testing.assert_close(program.module()(*inputs), step(*inputs))
