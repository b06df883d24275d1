"""The thin CLIP: features, scale, errors, checkpoint files, tokenizer, zero-shot classes."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastclip import clip
from fastclip.clip.model import CLIP, CLIPConfig
from fastclip.clip.tokenizer import Tokenizer
from fastclip.clip.zero_shot import class_features, classify
from fastclip.loss import ClipLoss

SMALL = CLIPConfig(
    embed_dim=24,
    image_size=16,
    patch_size=8,
    image_width=32,
    image_layers=2,
    image_heads=2,
    vocab_size=300,
    context_length=10,
    text_width=16,
    text_layers=2,
    text_heads=2,
)
END = SMALL.vocab_size - 1


def some_pairs(count: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, END, (count, 6))
    tokens[:, -1] = END
    return torch.rand(count, 3, 16, 16) * 2 - 1, tokens


def test_the_package_offers_its_public_names() -> None:
    assert clip.CLIP is CLIP
    offered = [getattr(clip, name).__name__ for name in clip.__all__]
    assert offered == [
        "CLIP", "CLIPConfig", "load_pretrained", "MatchingHead", "WithViews",
        "freeze_as_bag_of_tokens", "matching_loss", "Tokenizer", "class_features", "classify",
    ]  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'CLAP'"):
        clip.CLAP  # noqa: B018 -- the access raises


def test_forward_feeds_the_loss_as_open_clip_models_do() -> None:
    model = CLIP(SMALL)
    out = model(*some_pairs(5))
    assert set(out) == {"image_features", "text_features", "logit_scale"}
    assert out["image_features"].shape == out["text_features"].shape == (5, 24)
    for name in ("image_features", "text_features"):
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(5))
    torch.testing.assert_close(out["logit_scale"], torch.tensor(1 / 0.07))
    loss = ClipLoss()(**out, output_dict=True)["contrastive_loss"]
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_normalised_features_are_the_raw_ones_normalised() -> None:
    model = CLIP(SMALL)
    images, tokens = some_pairs(3)
    for encode, given in ((model.encode_image, images), (model.encode_text, tokens)):
        raw = encode(given, normalize=False)
        assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
        torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=1), encode(given))


def test_padding_does_not_change_features_and_words_do() -> None:
    model = CLIP(SMALL).eval()
    tokens = some_pairs(4)[1]
    padding = torch.zeros(4, 4, dtype=torch.long)
    padded = model.encode_text(torch.cat([tokens, padding], dim=1))
    torch.testing.assert_close(padded, model.encode_text(tokens))
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % END
    assert (model.encode_text(other) - padded).abs().max() > 1e-3


def test_every_patch_and_its_position_matter() -> None:
    model = CLIP(SMALL).eval()
    images = some_pairs(1)[0]
    before = model.encode_image(images)
    for row in (0, 8):
        for column in (0, 8):
            changed = images.clone()
            changed[..., row : row + 8, column : column + 8] *= -1
            assert (model.encode_image(changed) - before).abs().max() > 1e-4
    assert (model.encode_image(images.roll(8, dims=3)) - before).abs().max() > 1e-4


def test_scale_stops_at_one_hundred() -> None:
    model = CLIP(SMALL)
    torch.nn.init.constant_(model.logit_scale, 7.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    torch.nn.init.constant_(model.logit_scale, 1.5)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 1.5


def test_wrong_inputs_are_named() -> None:
    model = CLIP(SMALL)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 16, 16\), got \(2, 3, 16, 15\)"):
        model.encode_image(torch.zeros(2, 3, 16, 15))
    with pytest.raises(ValueError, match=r"T from 1 to 10, got \(2, 11\)"):
        model.encode_text(torch.zeros(2, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 16 and"):
        replace(SMALL, patch_size=5)
    with pytest.raises(ValueError, match="text_layers must be a positive integer, got 0"):
        replace(SMALL, text_layers=0)


def test_a_loaded_checkpoint_is_the_saved_model(tmp_path: Path) -> None:
    model = CLIP(SMALL)
    images, tokens = some_pairs(2)
    path = tmp_path / "clip.safetensors"
    model.save(path, steps="7")
    assert [file.name for file in tmp_path.iterdir()] == ["clip.safetensors"]
    loaded = CLIP.load(path)
    assert loaded.config == SMALL
    for name, value in model(images, tokens).items():
        assert torch.equal(loaded(images, tokens)[name], value)
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy.encode_image(images), model.encode_image(images))


def test_an_error_names_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CLIP.load(tmp_path / "absent.safetensors")
    (tmp_path / "words").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="words must be a safetensors checkpoint, got"):
        CLIP.load(tmp_path / "words")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other must be a checkpoint of fastclip's CLIP"):
        CLIP.load(tmp_path / "other")


def test_decoding_returns_the_captions(tmp_path: Path) -> None:
    captions = ["Grinning Face", "grinning cat face", "Curaçao flag", "keycap: #", "日本 ✔"]
    tokenizer = Tokenizer.train(captions, 320)
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    tokens = tokenizer.encode(captions, 64)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == [caption.lower() for caption in captions]
    assert (tokens[:, 0] == tokenizer.start).all()
    # The text tower takes the highest id of a row as its end.
    assert tokenizer.end == tokenizer.vocab_size - 1 == tokens.max()
    assert (tokens == tokenizer.end).sum(dim=1).tolist() == [1] * len(captions)
    ends = tokens.argmax(dim=1)
    for row, end in zip(tokens, ends.tolist(), strict=True):
        assert (row[end + 1 :] == tokenizer.pad).all()
    # Rows are as long as the longest caption.
    assert ends.max() == tokens.shape[1] - 1
    assert (
        Tokenizer.train(captions, 320).encode(["face"], 64).tolist()
        == tokenizer.encode(["face"], 64).tolist()
    )


def test_names_of_special_tokens_in_a_caption_are_text() -> None:
    tokenizer = Tokenizer.train(["a face"], 300)
    tokens = tokenizer.encode(["a <end> of <pad> <start>"], 64)
    assert (tokens == tokenizer.end).sum() == 1
    assert tokenizer.decode(tokens) == ["a <end> of <pad> <start>"]


def test_long_captions_are_cut_and_unseen_ones_still_encode() -> None:
    tokenizer = Tokenizer.train(["a face"], 300)
    tokens = tokenizer.encode(["face " * 20, "\u0000 ☃ <end> Zebra"], 12)
    assert tokens.shape == (2, 12)
    assert tokens[:, -1].tolist() == [tokenizer.end] * 2
    assert tokenizer.decode(tokenizer.encode(["☃ Zebra"], 32)) == ["☃ zebra"]
    with pytest.raises(ValueError, match="vocab_size must be at least 259, got 258"):
        Tokenizer.train(["a face"], 258)


class Compass(torch.nn.Module):
    """A model with known answers: texts lie on the axes of a plane, pictures in the plane."""

    axes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.axes[tokens[:, 0]]

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.flatten(1)[:, :2], dim=1)


def test_zero_shot_classes_are_the_nearest_in_a_plane() -> None:
    def encode(prompts: list[str]) -> Tensor:
        return torch.tensor([[("east", "north", "west").index(p.split()[-1])] for p in prompts])

    classes = class_features(
        Compass(),
        encode,
        {"rising": ["east"], "between": ["north", "west"]},
        templates=("{}", "the {}"),
    )
    # The features of a class's two names are averaged, and the mean is normalised.
    torch.testing.assert_close(classes, torch.tensor([[1.0, 0.0], [-(0.5**0.5), 0.5**0.5]]))
    pictures = torch.tensor([[3.0, 1.0], [0.0, 5.0], [-1.0, -1.0], [1.0, -2.0], [2.0, 1.0]])
    assert classify(Compass(), pictures[:, :, None, None], classes).tolist() == [0, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="'void' has no prompt"):
        class_features(Compass(), encode, {"void": []})
