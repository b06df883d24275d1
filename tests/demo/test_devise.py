"""DeViSE's setting: a frozen text side of random token vectors, and the ranking loss."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import demo_task

from fastclip import reference
from fastclip.clip.bag_of_tokens import freeze_as_bag_of_tokens
from fastclip.clip.model import CLIP, CLIPConfig


def test_text_features_are_sums_of_token_vectors() -> None:
    torch.manual_seed(0)
    config = CLIPConfig(text_layers=2)
    model = CLIP(config)
    freeze_as_bag_of_tokens(model)
    pad, start, end = range(config.vocab_size - 3, config.vocab_size)
    captions = torch.tensor(
        [
            [start, 5, 6, 7, end, pad],
            [start, 7, 5, 6, end, pad],  # the order does not matter
            [start, 5, 6, 8, end, pad],
            [start, 9, 10, 11, 12, end],
        ]
    )
    features = model.encode_text(captions)
    cosines = features @ features.T
    assert cosines[0, 1] == pytest.approx(1, abs=1e-5)
    assert cosines[0, 2] == pytest.approx(2 / 3, abs=0.15)
    assert abs(cosines[0, 3]) < 0.2
    words = model.token_embedding.weight[:13]
    words = (words - words.mean(1, keepdim=True)) / words.std(1, keepdim=True)
    expected = torch.stack([words[[5, 6, 7]].sum(0), words[[9, 10, 11, 12]].sum(0)])
    expected = torch.nn.functional.normalize(model.text_projection(expected), dim=1)
    torch.testing.assert_close(features[[0, 3]], expected, rtol=0, atol=2e-3)


def test_training_leaves_the_text_side_bit_equal(tmp_path: Path) -> None:
    task = demo_task.small()
    before, _ = replace(task, loss="devise").start(0, 24)
    _, after, _ = demo_task.trained_parts(task, 24, loss="devise", steps=5)
    changed = {
        name
        for (name, old), (_, new) in zip(
            before.named_parameters(), after.named_parameters(), strict=True
        )
        if not torch.equal(old, new)
    }
    image = {n for n, _ in before.named_parameters() if n.startswith(("image_", "patch_"))}
    assert changed == image
    after.save(tmp_path / "model.safetensors")
    tokens = task.encode(["grinning face", "red apple"])
    loaded = CLIP.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.encode_text(tokens), before.encode_text(tokens))


def test_the_loss_is_the_hinge_of_pictures_over_all_captions() -> None:
    task = replace(demo_task.small(), loss="devise")
    model, stream = task.start(0, 6)
    batch = next(stream)
    outputs = model(batch.images, batch.tokens)
    x, y = outputs["image_features"], outputs["text_features"]
    assert x.requires_grad and not y.requires_grad
    expected = reference.ranking_loss(x, y, margin=0.1, symmetric=False)
    torch.testing.assert_close(task.batch_loss("fused", 6)(batch, **outputs), expected)


def test_a_head_learns_beside_a_frozen_text_side() -> None:
    task = demo_task.small()
    run, _, _ = demo_task.trained_parts(task, 12, loss="devise", matching="middle", steps=3)
    assert len(set(run.losses)) == 3
