"""The tokenizer of a training, learnt from its captions or given, as the text of its file."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..clip.tokenizer import Tokenizer
from .pair import Pair


def tokenizer_text(given: Path | None, vocab_size: int, trained: Sequence[Pair]) -> str:
    """Returns the text of the tokenizer's file, which is given or learnt.

    Raises:
        OSError, ValueError: it cannot be read, or is no tokenizer of fastclip.
    """
    if given is None:
        captions = (caption for pair in trained for caption in pair.captions)
        tokenizer = Tokenizer.train(captions, vocab_size)
    else:
        tokenizer = _read_tokenizer(given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        tokenizer.save(path)
        return path.read_text(encoding="utf-8")


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer must be a file, got no such file: {path}")
    try:
        tokenizer = Tokenizer(path)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{path} must be a tokenizer.json of fastclip: {error}") from None
    last_three = tuple(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    if (tokenizer.pad, tokenizer.start, tokenizer.end) != last_three:  # CLIP's has others
        raise ValueError(f"{path} must be a tokenizer.json of fastclip, got another one")
    return tokenizer


def tokenizer_of(text: str) -> Tokenizer:
    """Returns the tokenizer of a file that another machine may have."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(text, encoding="utf-8")
        return Tokenizer(path)
