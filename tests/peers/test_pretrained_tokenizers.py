"""Tokenizers of CLIP and SigLIP give the ids of open_clip's and transformers'."""
# ruff: noqa: RUF001 -- texts with signs that look like others are the point

import gzip
import json
from pathlib import Path

import pytest
import torch
from support.peers import peer
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from fastclip.clip import Tokenizer
from fastclip.clip.byte_pairs import MERGES
from fastclip.clip.cleaning import mended

TEXTS = [
    "a photo of a cat.", "A PHOTO of two Dogs!!!", "", "   spaced \t\n out   text ",
    "it's we'll I'd", "2023: 1,000 items (50%)", "don't-stop_me now", "Größe café naïve ÅNGSTRÖM",
    "ΑΣ ΟΔΟΣ", "日本語の写真 と 한국어", "emoji 😀👍🏽 flags 🇩🇪", "ï»¿ donâ€™t",
    "fish &amp; chips &lt;3 &amp;amp; more", "“curly” ‘quotes’ – dash…", "ﬁne ligature",
    "ＦＵＬＬ　width", "İstanbul ǅ", "zero\u200bwidth", "e\u0301 combining", "word " * 100,
    "x" * 300, "a/b\\c @#$%^&*()", "²³ ½ ⅷ", "𝔘𝔫𝔦", "control \x07 \x1b[31mred",
    "&eacute;t&eacute; &#128512;", "<b>bold</b> &nbsp; text",
]  # fmt: skip


@pytest.fixture(scope="module")
def merges() -> Path:
    return Path(peer("open_clip").__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


def assert_same_ids(ours: Tokenizer, length: int) -> None:
    theirs = peer("open_clip").tokenizer.SimpleTokenizer(context_length=length)(TEXTS)
    found = ours.encode(TEXTS, length, fill=True)
    for text, a, b in zip(TEXTS, found, theirs, strict=True):
        assert torch.equal(a, b), text
    shortest = ours.encode(TEXTS[:2], length)
    assert shortest.shape[1] < length
    assert torch.equal(shortest, theirs[:2, : shortest.shape[1]])


def test_ids_of_the_file_of_merges(merges: Path) -> None:
    ours = Tokenizer(merges)
    assert (ours.vocab_size, ours.start, ours.end, ours.pad) == (49408, 49406, 49407, 0)
    assert_same_ids(ours, 77)
    assert_same_ids(ours, 9)
    assert ours.decode(ours.encode(["A photo of  2 cats"], 77)) == ["a photo of 2 cats"]


def test_ids_of_the_files_of_transformers(merges: Path, tmp_path: Path) -> None:
    """tokenizer.json, and vocab.json with merges.txt."""
    with gzip.open(merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(line.split()) for line in lines)]
    vocabulary = {t: k for k, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    kind = peer("transformers").CLIPTokenizer
    theirs = kind(vocab=vocabulary, merges=[tuple(line.split()) for line in lines])
    theirs.save_pretrained(tmp_path)
    assert_same_ids(Tokenizer(tmp_path / "tokenizer.json"), 77)
    plain = "a photo of a red fox, 2 tails"
    ids = theirs(plain)["input_ids"]
    assert Tokenizer(tmp_path).encode([plain], 77)[0].tolist() == ids
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines), encoding="utf-8")
    assert_same_ids(Tokenizer(tmp_path), 77)


def test_plain_text_needs_no_mending() -> None:
    """ftfy and html change no text that the short way leaves alone."""
    open_clip = peer("open_clip").tokenizer
    for text in [*TEXTS, *(chr(k) + "a" for k in range(32, 127))]:
        if text.isascii() and text.isprintable() and "&" not in text:
            assert open_clip.basic_clean(text) == text.strip() == mended(text).strip()


PIECES = ["a", "photo", "of", "cat", "dog", "café", "don", "t", "s", "red", "2", "."]


@pytest.mark.parametrize(
    ("special", "pad", "clean"),
    [(("<pad>", "</s>", "<unk>"), "</s>", "canonicalize"),
     (("<pad>", "<eos>", "<bos>", "<unk>"), "<pad>", "lower")],
)  # fmt: skip
def test_ids_of_siglip(special: tuple[str, ...], pad: str, clean: str, tmp_path: Path) -> None:
    """SigLIP's vocabularies cannot be had here: small ones of their form stand in."""
    end = special[1]
    pieces = [*special, "▁", *(f"▁{p}" for p in PIECES), *"abcdefghijklmnopqrstuvwxyz"]
    unknown = special.index("<unk>")
    fast = Fast(models.Unigram([(p, -1.0 - k) for k, p in enumerate(pieces)], unknown))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.add_special_tokens(list(special))
    from tokenizers.processors import TemplateProcessing

    fast.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, fast.token_to_id(end))]
    )
    kind = peer("transformers").PreTrainedTokenizerFast
    theirs = kind(tokenizer_object=fast, pad_token=pad, eos_token=end, unk_token="<unk>")
    theirs.save_pretrained(tmp_path)
    hf = peer("open_clip").tokenizer
    ours = Tokenizer(tmp_path / "tokenizer.json")
    clean_text = hf.get_clean_fn(clean)
    for length in (16, 5):
        expected = theirs(
            [text.lower() if clean == "lower" else clean_text(text) for text in TEXTS],
            return_tensors="pt", max_length=length, padding="max_length", truncation=True,
        ).input_ids  # fmt: skip
        assert torch.equal(ours.encode(TEXTS, length), expected)
    if clean == "canonicalize":
        wrapped = hf.HFTokenizer(str(tmp_path), context_length=16, clean=clean)
        assert torch.equal(ours.encode(TEXTS, 16), wrapped(TEXTS))
    assert (ours.start, ours.end, ours.fill) == (None, 1, True)
