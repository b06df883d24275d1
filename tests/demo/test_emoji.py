"""The emoji data set: complete and licensed; its split, batches and scores."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from fastclip.clip.tokenizer import Tokenizer
from fastclip.demo import emoji as emoji_data
from fastclip.demo.emoji import FOLDER, SIZE, VENDORS, Emoji
from fastclip.demo.emoji.batches import Batches, augment, on_white
from fastclip.demo.emoji.evaluate import CATEGORY_WORDS, per_class_accuracy, retrieval
from fastclip.demo.emoji.rebuild import VOCABULARY
from fastclip.demo.emoji.split import Split, split


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    return emoji_data.load()


@pytest.fixture(scope="module")
def parts(emoji: Emoji) -> Split:
    return split(emoji.concepts)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(emoji_data.TOKENIZER)


def test_all_concepts_are_there_in_both_vendors_drawings(emoji: Emoji) -> None:
    assert len(emoji.concepts) == 1906
    assert emoji.drawings.shape == (1906, len(VENDORS), 4, SIZE, SIZE)
    assert emoji.drawings.dtype == torch.uint8
    opaque = (emoji.drawings[:, :, 3] > 128).float().mean(dim=(2, 3))
    assert opaque.min() > 0.02  # the thinnest is a plus or minus sign
    # The vendors' drawings differ: no sheet is a copy of the other.
    same = (emoji.drawings[:, 0] == emoji.drawings[:, 1]).flatten(1).all(dim=1)
    assert same.sum() == 0
    assert emoji.drawings.flatten(3)[:, :, 3].float().mean() < 230  # backgrounds are transparent


def test_names_and_categories_are_those_of_the_picture(emoji: Emoji) -> None:
    by_code = {concept.code: concept for concept in emoji.concepts}
    assert len(by_code) == 1906
    assert by_code["1F600"].name == "grinning face"
    assert by_code["1F43C"].captions == ("panda face",)
    assert by_code["1F980"].category == "Animals & Nature"
    counts = Counter(concept.category for concept in emoji.concepts)
    assert set(counts) == set(CATEGORY_WORDS)
    assert min(counts.values()) >= 80
    # A known colour in a known place: the frog is green, the tomato red, with either vendor.
    order = [concept.code for concept in emoji.concepts]
    for code, channel in (("1F438", 1), ("1F345", 0), ("1F499", 2)):
        for drawing in emoji.drawings[order.index(code)].float():
            colour = (drawing[:3] * drawing[3:]).mean(dim=(1, 2))
            assert colour.argmax() == channel


def test_no_skin_tones(emoji: Emoji) -> None:
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    assert not any(tones & set(concept.code.split("-")) for concept in emoji.concepts)
    assert not any("skin" in concept.subcategory for concept in emoji.concepts)


def test_licences_are_beside_the_data() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("LICENSE*")}
    assert "Apache License" in texts["LICENSE-noto-emoji.txt"]
    assert "SIL OPEN FONT LICENSE" in texts["LICENSE-noto-emoji.txt"]
    assert "Attribution 4.0 International" in texts["LICENSE-twemoji.txt"]
    assert "Section 8" in texts["LICENSE-twemoji.txt"]
    assert "Cal Henderson" in texts["LICENSE-emoji-data.txt"]
    data = {p.name for p in FOLDER.iterdir() if p.suffix in (".png", ".json")}
    assert data == {"google.png", "twitter.png", "concepts.json", "tokenizer.json"}
    for name in (data | set(texts)) - {"LICENSE.txt"}:
        assert name in texts["LICENSE.txt"]
    assert "Changes made" in texts["LICENSE.txt"]


def test_equal_drawings_or_names_are_look_alikes(emoji: Emoji) -> None:
    numbers = [concept.look_alike for concept in emoji.concepts]
    seen: dict[bytes, int] = {}
    for vendor in range(len(VENDORS)):
        seen.clear()
        for number, drawing in zip(numbers, emoji.drawings[:, vendor], strict=True):
            assert seen.setdefault(drawing.numpy().tobytes(), number) == number
    names: dict[str, int] = {}
    for concept in emoji.concepts:
        assert names.setdefault(concept.name, concept.look_alike) == concept.look_alike
    by_name = {concept.name: concept.look_alike for concept in emoji.concepts}
    assert by_name["norway flag"] == by_name["bouvet island flag"]
    assert by_name["norway flag"] != by_name["iceland flag"]
    assert len(set(numbers)) == 1870


def test_split_keeps_its_sides_apart(emoji: Emoji, parts: Split) -> None:
    assert sorted(parts.held_out + tuple(parts.vendors)) == sorted(parts.members)
    assert sorted(i for m in parts.members.values() for i in m) == list(range(1906))
    held = {i for group in parts.held_out for i in parts.members[group]}
    trained = {i for group in parts.vendors for i in parts.members[group]}
    assert not held & trained
    for vendor in range(len(VENDORS)):
        drawn = {emoji.drawings[i, vendor].numpy().tobytes() for i in trained}
        assert not any(emoji.drawings[i, vendor].numpy().tobytes() in drawn for i in held)
    names = {caption for i in trained for caption in emoji.concepts[i].captions}
    assert not any(caption in names for i in held for caption in emoji.concepts[i].captions)
    assert 0.14 < len(parts.held_out) / len(parts.members) < 0.16
    assert 0.19 < len(parts.one_vendor) / len(parts.members) < 0.21
    by_vendor = Counter(parts.vendors[group] for group in parts.one_vendor)
    assert set(by_vendor) == {(0,), (1,)} and abs(by_vendor[(0,)] - by_vendor[(1,)]) <= 9
    # Every category is tested in proportion.
    shares = Counter(emoji.concepts[parts.members[g][0]].category for g in parts.held_out)
    wholes = Counter(emoji.concepts[m[0]].category for m in parts.members.values())
    assert all(abs(shares[c] / wholes[c] - 0.15) < 0.01 for c in wholes)


def test_no_caption_is_in_two_groups(emoji: Emoji, parts: Split) -> None:
    groups: dict[str, set[int]] = {}
    for concept in emoji.concepts:
        for caption in concept.captions:
            groups.setdefault(caption, set()).add(concept.look_alike)
    assert not {caption: found for caption, found in groups.items() if len(found) > 1}
    # A name belongs to the concept whose Unicode name it is.
    by_code = {concept.code: concept.captions for concept in emoji.concepts}
    assert by_code["1F408"][0] == "cat" and by_code["1F431"] == ("cat face",)
    stream = Batches(emoji, parts, lambda texts: torch.zeros(len(texts), 1), len(parts.vendors), 7)
    for batch in itertools.islice(stream, 12):  # each batch is a whole epoch
        assert len(set(batch.captions)) == len(batch.captions)


def test_the_tokenizer_is_learnt_from_the_trained_captions(
    emoji: Emoji, parts: Split, tmp_path: Path
) -> None:
    trained = [emoji.concepts[i] for group in parts.vendors for i in parts.members[group]]
    learnt = sorted(caption for concept in trained for caption in concept.captions)
    Tokenizer.train(learnt, VOCABULARY).save(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == emoji_data.TOKENIZER.read_bytes()


def test_no_batch_holds_a_false_negative(emoji: Emoji, parts: Split, tokenizer: Tokenizer) -> None:
    held = {i for group in parts.held_out for i in parts.members[group]}
    stream = Batches(emoji, parts, lambda texts: tokenizer.encode(texts, 32), 512, seed=3)
    members, vendors = set(), Counter()
    for batch in itertools.islice(stream, 12):
        groups = [emoji.concepts[i].look_alike for i in batch.concepts]
        assert len(set(groups)) == len(groups) == 512
        for index, vendor, caption in zip(
            batch.concepts, batch.vendors, batch.captions, strict=True
        ):
            concept = emoji.concepts[index]
            assert index not in held
            assert vendor in parts.vendors[concept.look_alike]
            assert any(text in caption for text in concept.captions)
        assert batch.images.shape == (512, 3, SIZE, SIZE)
        assert batch.images.min() >= -1 and batch.images.max() <= 1
        assert tokenizer.decode(batch.tokens) == list(batch.captions)
        members |= set(batch.concepts)
        vendors.update(batch.vendors)
    # Four epochs hold nearly every trained concept, and both vendors about equally often.
    assert len(members) > 0.95 * (1906 - len(held))
    assert 0.45 < vendors[0] / vendors.total() < 0.55


def test_batches_depend_on_the_seed_alone(emoji: Emoji, parts: Split, tokenizer: Tokenizer) -> None:
    def first(seed: int) -> torch.Tensor:
        stream = Batches(emoji, parts, lambda texts: tokenizer.encode(texts, 32), 64, seed)
        return next(stream).images

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    for size in (1, len(parts.vendors) + 1):
        with pytest.raises(ValueError, match=rf"from 2 to {len(parts.vendors)}, got {size}"):
            Batches(emoji, parts, lambda texts: tokenizer.encode(texts, 32), size, 0)


def test_augmentation_moves_the_drawing_and_changes_its_background() -> None:
    drawing = torch.zeros(1, 4, SIZE, SIZE, dtype=torch.uint8)
    drawing[:, 0, 10:22, 10:22] = 255  # a red square
    drawing[:, 3, 10:22, 10:22] = 255
    white = on_white(drawing)
    assert white[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert white[0, :, 16, 16].tolist() == [1.0, -1.0, -1.0]
    shown = augment(drawing.expand(64, -1, -1, -1), torch.Generator().manual_seed(0))
    corners, middles = shown[:, :, 0, 0], shown[:, :, 16, 16]
    assert corners.std(dim=0).min() > 0.3 and corners.mean(dim=0).abs().max() < 0.4
    assert middles[:, 0].min() > 0.35 and middles[:, 1:].max() < -0.6
    red = shown[:, 0] - shown[:, 1] - corners[:, :1, None] + corners[:, 1:2, None]
    columns = (red.abs().mean(dim=1) * torch.arange(SIZE)).sum(1) / red.abs().mean(dim=1).sum(1)
    assert columns.min() < 14.7 and columns.max() > 16.3 and columns.min() > 12


def test_recall_and_accuracy_of_small_cases() -> None:
    answers = torch.eye(4)
    queries = torch.tensor(
        [[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [0.9, 0.8, 0.1, 0], [0.9, 0.8, 0.7, 0.6]]
    )
    found = retrieval([queries, torch.eye(4)], answers)
    assert found["image to text R@1"].value == (0.25 + 1) / 2
    assert found["image to text R@5"].value == found["image to text R@5"].chance == 1
    assert found["text to image R@1"].queries == 8
    # A model that gives all inputs the same features, or has diverged, gets chance.
    for value in (1.0, torch.nan):
        same = torch.full((4, 4), value)
        score = retrieval([same], same)["text to image R@1"]
        assert score.value == score.chance == 0.25
    labels = torch.tensor([0, 0, 0, 1])
    assert per_class_accuracy(torch.zeros(4, dtype=torch.long), labels) == 0.5
    assert per_class_accuracy(labels, labels) == 1.0
