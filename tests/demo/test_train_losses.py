"""Every loss of the demo: fused and dense curves agree, across ranks too, and trainings resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import demo_task
from support.ranks.processes import Ranks

from fastclip import loss as fused
from fastclip.clip.model import CLIP
from fastclip.demo.checkpoint import Checkpoint
from fastclip.demo.losses import LOSSES, BatchLoss
from fastclip.demo.train import Task, main


def curve(loss: str, **options: Any) -> list[float]:
    return demo_task.trained(demo_task.small(), 24, loss=loss, steps=6, **options).losses


@pytest.fixture(scope="module")
def curves() -> dict[str, list[float]]:
    return {loss: curve(loss) for loss in LOSSES}


@pytest.mark.parametrize("loss", LOSSES)
def test_fused_and_dense_curves_agree(loss: str, curves: dict[str, list[float]]) -> None:
    assert curve(loss, implementation="dense") == pytest.approx(curves[loss], rel=2e-4)
    assert min(curves[loss]) < curves[loss][0] - 0.05
    # Each loss has a curve of its own, except clip and clip_ids: no batch here has equal captions.
    others = {name: found for name, found in curves.items() if found == curves[loss]}
    assert set(others) <= {loss, "clip", "clip_ids"}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [{}, {"implementation": "dense"}, {"micro_batch": 7}], ids=str)
def test_two_ranks_have_the_curve_of_one_process(
    loss: str, options: dict[str, Any], two: Ranks, curves: dict[str, list[float]]
) -> None:
    options = {"steps": 6, "loss": loss, **options}
    first, second = two.run(demo_task.curve, 24, options)
    assert first == second == pytest.approx(curves[loss], rel=2e-4)
    if not options.get("micro_batch"):
        alone = demo_task.trained(demo_task.small(), 9, **options).losses
        uneven, _ = two.run(demo_task.curve, 9, options)
        assert uneven == pytest.approx(alone, rel=2e-4)


def test_duplicate_captions_are_no_negatives() -> None:
    task = replace(demo_task.small(), loss="clip_ids")
    model, stream = task.start(0, 6)
    batch = next(stream)
    outputs = {name: t.detach() for name, t in model(batch.images, batch.tokens).items()}
    captions = (*batch.captions[:4], batch.captions[1], batch.captions[5])
    found = task.batch_loss("fused", 6)(replace(batch, captions=captions), **outputs)
    ids = torch.tensor([0, 1, 2, 3, 1, 5])
    torch.testing.assert_close(found, fused.clip_loss(*outputs.values(), ids=ids))
    assert found < fused.clip_loss(*outputs.values()) - 1e-3


def test_drawings_have_numbers_of_their_own() -> None:
    task = replace(demo_task.small(), loss="global")
    _, stream = task.start(0, 24)
    loss = task.batch_loss("fused", 24)
    assert loss.averages.data_size == 2 * len(task.emoji.concepts)
    batch = next(stream)
    numbers = loss._pairs(batch, torch.device("cpu")).samples.tolist()
    assert [divmod(number, 2) for number in numbers] == [
        *zip(batch.concepts, batch.vendors, strict=True)
    ]


def test_siglip_starts_from_its_own_scale_and_bias(tmp_path: Path) -> None:
    model, _ = replace(demo_task.small(), loss="siglip").start(0, 8)
    assert model.logit_scale.exp().item() == pytest.approx(10) and model.logit_bias == -10
    model.save(tmp_path / "model.safetensors")
    assert CLIP.load(tmp_path / "model.safetensors").logit_bias == -10
    assert not hasattr(demo_task.small().start(0, 8)[0], "logit_bias")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_resumed_training_equals_an_uninterrupted_one(
    loss: str, tmp_path: Path, curves: dict[str, list[float]]
) -> None:
    """The state has the moving averages of a loss that has them."""
    checkpoint = Checkpoint(tmp_path / "training.pt", {"loss": loss}, {}, every=1)
    stopped = curve(loss, stop=3, checkpoint=checkpoint)
    state = checkpoint.load()
    assert len(state["loss"]) == (2 if loss == "global" else 0)
    assert stopped == curves[loss][:3] and curve(loss, state=state) == curves[loss]


def test_the_command_line_chooses_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    make = BatchLoss.__init__

    def record(self: BatchLoss, loss: str, implementation: str, *others: Any) -> None:
        made.append((loss, implementation))
        make(self, loss, implementation, *others)

    monkeypatch.setattr(BatchLoss, "__init__", record)
    monkeypatch.setattr(Task, "load", lambda _, workers: replace(demo_task.small()))
    options = ["--steps", "2", "--batch-size", "8", "--out", str(tmp_path)]
    main([*options, "--loss", "siglip", "--implementation", "dense"])
    assert made == [("siglip", "dense"), ("siglip", "fused")]
    gap = capsys.readouterr().out.rpartition("at any step: ")[2].split()[0]
    assert float(gap) < 1e-4
    assert CLIP.load(tmp_path / "clip.safetensors").logit_bias < 0
