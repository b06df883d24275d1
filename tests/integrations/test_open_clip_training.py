"""open_clip's model and training loop learn the same with our losses as with its own."""

import logging
from argparse import Namespace
from types import ModuleType
from typing import Any

import pytest
import torch
from support.open_clip_import import import_open_clip
from torch import Tensor, nn

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


def train(
    open_clip: ModuleType,
    loss: nn.Module,
    precision: str,
    accum_freq: int,
    scaled: bool,
    nonscalar: bool,
) -> tuple[list[float], list[Tensor]]:
    """Returns the losses of a run of open_clip's `train_one_epoch` and the final parameters."""
    from open_clip_train.train import train_one_epoch

    torch.manual_seed(0)
    siglip = "SigLip" in type(loss).__name__
    model = open_clip.model.CLIP(
        embed_dim=24, vision_cfg=VISION, text_cfg=TEXT, output_dict=True,
        init_logit_bias=-3.0 if siglip else None, nonscalar_logit_scale=nonscalar,
    )  # fmt: skip
    recorder = Recorder(loss)
    arguments = Namespace(
        device="cpu", precision=precision, accum_freq=accum_freq, distill=False,
        skip_scheduler=True, grad_clip_norm=1.0, horovod=False, rank=0, local_rank=0, world_size=1,
        batch_size=BATCH, log_every_n_steps=1, wandb=False, log_local=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    data = {"train": Batches(STEPS * accum_freq)}
    train_one_epoch(model, data, recorder, 0, optimizer, scaler, None, None, arguments)
    return recorder.values, [p.detach().float() for p in model.parameters()]


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
    way = (precision, accum_freq, scaled, nonscalar)
    ours, parameters = train(open_clip, getattr(fastclip.loss, name)(), *way)
    theirs, wanted = train(open_clip, getattr(open_clip.loss, name)(), *way)
    assert len(ours) == len(theirs) == STEPS * accum_freq
    assert ours == pytest.approx(theirs, rel=tolerance)
    # Training did change something. Without half precision, the final parameters agree, too.
    assert ours[-1] < 0.97 * ours[0]
    if precision == "fp32":
        for one, other in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
