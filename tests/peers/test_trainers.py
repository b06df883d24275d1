"""`cached_step` in trainers that own the backward, and with a model that draws from numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.peers import find, peer
from support.ranks import trainers
from support.ranks.processes import Ranks
from torch import Tensor, nn

from fastclip import cached_step
from fastclip.loss import clip_loss


@pytest.mark.parametrize("world", ["one", "two"])
def test_accelerate_with_accumulation(world: str, request: pytest.FixtureRequest) -> None:
    """The division by the number of steps, and DDP's exchange, happen once."""
    find("accelerate")
    ranks: Ranks = request.getfixturevalue(world)
    whole, cached = (ranks.run(trainers.accelerated, cached) for cached in (False, True))
    for (exact, once), (found, exchanges) in zip(whole, cached, strict=True):
        assert exchanges == once == (world == "two")
        assert trainers.worst(found, exact) < 1e-12


@pytest.mark.parametrize("no_sync", [False, True])
def test_lightning_with_manual_optimisation(two: Ranks, no_sync: bool) -> None:
    """Three micro-batches. Lightning exchanges with each backward; no_sync leaves the last."""
    find("pytorch_lightning")
    for error, exchanges in two.run(trainers.with_lightning, no_sync):
        assert error < 1e-12 and exchanges == (1 if no_sync else 3)


class Speech(nn.Module):
    """Wav2Vec2 in train mode masks features with numpy's generator (SpecAugment)."""

    def __init__(self) -> None:
        super().__init__()
        transformers = peer("transformers")
        torch.manual_seed(0)
        self.audio = transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8),
                num_feat_extract_layers=2, num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=2, mask_time_prob=0.3, mask_time_length=4,
                layerdrop=0.2,
            )
        ).double()  # fmt: skip
        self.text = nn.Linear(7, 32).double()

    def forward(self, waves: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
        speech = self.audio(waves).last_hidden_state.mean(1)
        return F.normalize(speech, dim=-1), F.normalize(self.text(texts), dim=-1), 14.3


def test_wav2vec2_in_train_mode() -> None:
    model = Speech().train()
    generator = torch.Generator().manual_seed(1)
    waves = torch.randn(10, 900, generator=generator, dtype=torch.float64)
    texts = torch.randn(10, 7, generator=generator, dtype=torch.float64)

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)

    seed()
    parts = [model(*rows) for rows in zip(waves.split(4), texts.split(4), strict=True)]
    value = clip_loss(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), 14.3)
    exact = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    seed()
    assert cached_step(model, clip_loss, waves, texts, micro_batch=4) == value
    assert sum(g is not None for g in exact) > 20
    for p, gradient in zip(model.parameters(), exact, strict=True):
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-13)


def test_clip_model_of_transformers() -> None:
    """Its outputs have other names, nested entries and no scale."""
    transformers = peer("transformers")
    sizes = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 6},
            vision_config={**sizes, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    ).double()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "pixel_values": torch.randn(10, 3, 16, 16, generator=generator, dtype=torch.float64),
        "input_ids": torch.randint(50, (10, 6), generator=generator),
        "attention_mask": torch.ones(10, 6, dtype=torch.int64),
    }
    names = {"image_features": "image_embeds", "text_features": "text_embeds"}

    def loss(**towers: Tensor) -> Tensor:
        return clip_loss(**towers, logit_scale=model.logit_scale.exp())

    whole = model(**batch)
    value = loss(image_features=whole.image_embeds, text_features=whole.text_embeds)
    exact = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    found = cached_step(model, loss, **batch, micro_batch=4, outputs=names)
    torch.testing.assert_close(found, value.detach())
    assert model.logit_scale.grad != 0
    for p, gradient in zip(model.parameters(), exact, strict=True):
        if gradient is not None:
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match=r"got CLIPOutput with logits_per_image, .*text_embeds"):
        cached_step(model, loss, **batch, micro_batch=4)
