"""open_clip's model and training loop learn the same with our losses as with its own."""

import logging
import re
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from support.installation import ROOT
from support.open_clip_import import import_open_clip
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastclip.loss

BATCH, STEPS = 12, 6
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
NAMES = ("ClipLoss", "SigLipLoss")


@pytest.fixture(scope="module")
def open_clip() -> ModuleType:
    return import_open_clip()


class Recorder(nn.Module):
    """Calls a loss and records every value."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.values: list[float] = []

    def forward(self, **arguments: Any) -> dict[str, Tensor]:
        out = self.loss(**arguments)
        self.values.append(out["contrastive_loss"].item())
        return out


class Batches(list):
    """A list of (images, texts) with the attributes of open_clip's data loaders."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(5)
        size = VISION["image_size"]
        super().__init__(
            (
                torch.randn(BATCH, 3, size, size, generator=generator),
                torch.randint(
                    1, TEXT["vocab_size"], (BATCH, TEXT["context_length"]), generator=generator
                ),
            )
            for _ in range(3)
        )
        self[:] = [self[i % 3] for i in range(count)]  # repeated, so that something is learnt
        self.num_batches, self.num_samples = count, count * BATCH
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        pass


class Gradients(torch.optim.AdamW):
    """Records the gradients of each step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.of_steps: list[list[Tensor]] = []

    def step(self, closure: None = None) -> None:
        self.of_steps.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step(closure)


class Run(NamedTuple):
    values: list[float]  # of the loss
    parameters: list[Tensor]  # after the last step
    gradients: dict[str, Tensor]  # of the first step


def train(
    open_clip: ModuleType,
    loss: nn.Module,
    precision: str,
    accum_freq: int,
    scaled: bool,
    nonscalar: bool,
    siglip: bool,
    most: float | None = 1.0,  # the norm that gradients are clipped to
) -> Run:
    """A run of open_clip's `train_one_epoch`."""
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=24, vision_cfg=VISION, text_cfg=TEXT, output_dict=True,
        init_logit_bias=-3.0 if siglip else None, nonscalar_logit_scale=nonscalar,
    )  # fmt: skip
    recorder = Recorder(loss)
    arguments = Namespace(
        device="cpu", precision=precision, accum_freq=accum_freq, distill=False,
        skip_scheduler=True, grad_clip_norm=most, horovod=False, rank=0, local_rank=0, world_size=1,
        batch_size=BATCH, log_every_n_steps=1, wandb=False, log_local=False,
    )  # fmt: skip
    optimizer = Gradients(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    data = {"train": Batches(STEPS * accum_freq)}
    train_one_epoch(model, data, recorder, 0, optimizer, scaler, None, None, arguments)
    names = [name for name, _ in model.named_parameters()]
    gradients = dict(zip(names, optimizer.of_steps[0], strict=True))
    return Run(recorder.values, [p.detach().float() for p in model.parameters()], gradients)


@pytest.mark.parametrize(
    ("precision", "accum_freq", "scaled", "nonscalar", "tolerance"),
    [
        ("fp32", 1, False, False, 1e-4),
        ("fp32", 1, True, True, 1e-4),
        ("fp32", 3, False, False, 1e-4),
        ("amp_bf16", 1, False, False, 3e-2),
        ("amp_bf16", 2, True, True, 3e-2),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_curves_overlap(
    name: str,
    precision: str,
    accum_freq: int,
    scaled: bool,
    nonscalar: bool,
    tolerance: float,
    open_clip: ModuleType,
    caplog: pytest.LogCaptureFixture,
    device: torch.device,
) -> None:
    if device.type != "cpu":
        pytest.skip("the towers are trained on the CPU")
    caplog.set_level(logging.ERROR)
    way = (precision, accum_freq, scaled, nonscalar, name == "SigLipLoss")
    ours, parameters, _ = train(open_clip, getattr(fastclip.loss, name)(), *way)
    theirs, wanted, _ = train(open_clip, getattr(open_clip.loss, name)(), *way)
    assert len(ours) == len(theirs) == STEPS * accum_freq
    assert ours == pytest.approx(theirs, rel=tolerance)
    # Training did change something. Without half precision, the final parameters agree, too.
    assert ours[-1] < 0.97 * ours[0]
    if precision == "fp32":
        for one, other in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def wrapper_of_the_page() -> type[nn.Module]:
    """The module of docs/big-batches.md that passes `live` on from open_clip's loop."""
    page = Path(ROOT / "docs" / "big-batches.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Live" in c)
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    return names["Live"]


@pytest.mark.parametrize("name", NAMES)
def test_live_in_the_accumulation_loop(
    name: str, open_clip: ModuleType, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    """The towers' gradients are those of open_clip's own loop. It takes those of scale and bias
    once for each micro-batch."""
    if device.type != "cpu":
        pytest.skip("the towers are trained on the CPU")
    caplog.set_level(logging.ERROR)
    # With two micro-batches CLIP takes as many passes as with kept products.
    accum_freq, runs, flops = 3, [], []
    ours = getattr(fastclip.loss, name)
    for loss in (
        wrapper_of_the_page()(ours(), accum_freq),
        ours(),
        getattr(open_clip.loss, name)(),
    ):
        with FlopCounterMode(display=False) as counter:
            way = ("fp32", accum_freq, False, False, name == "SigLipLoss")
            runs.append(train(open_clip, loss, *way, most=None))
        flops.append(counter.get_total_flops())
    live, _, theirs = runs
    for parameter, true in theirs.gradients.items():
        times = accum_freq if parameter.startswith("logit_") else 1
        mistake = (times * live.gradients[parameter] - true).norm()
        # Some gradients are zero but for rounding.
        assert mistake <= 1e-4 * true.norm() + 1e-6, (parameter, mistake, true.norm())
    whole = [sum(live.values[k : k + accum_freq]) for k in range(0, len(live.values), accum_freq)]
    assert whole == pytest.approx(theirs.values[::accum_freq], rel=1e-3)
    assert flops[0] < flops[1]
