"""Tokenizers: captions to token ids and back.

A thin wrapper of the `tokenizers` package that adds CLIP's `<start> ... <end>` and padding. The
demo's is a byte-level BPE: any text can be encoded, since every byte is a token, and text is
lower-cased, as in CLIP. Those of CLIP and SigLIP can be read, too.

Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from . import byte_pairs
from .cleaning import CLEANING
from .config import CLIPConfig

# The special tokens get the last ids, in this order. <end> has the highest one, by which the text
# tower finds the end of a caption.
SPECIAL = ("<pad>", "<start>", "<end>")


@dataclass(frozen=True)
class Form:
    """A form of tokenizer, told by its special tokens.

    start, end: their names; no start in SigLIP's.
    pad: the name or the id of the padding.
    cleaning: of `fastclip.clip.cleaning`.
    fill: whether rows are as long as the context. SigLIP pools the last position, so that the
        padding belongs to a text.
    lacks: a token that tokenizers of this form do not have.
    """

    start: str | None
    end: str
    pad: str | int
    cleaning: str
    fill: bool
    lacks: str | None = None

    def has(self, bpe: tokenizers.Tokenizer) -> bool:
        names = [name for name in (self.start, self.end, self.pad) if isinstance(name, str)]
        other = self.lacks is not None and bpe.token_to_id(self.lacks) is not None
        return None not in map(bpe.token_to_id, names) and not other


FORMS = (
    Form("<start>", "<end>", "<pad>", "none", False),
    Form(*byte_pairs.SPECIAL, 0, "clip", False),
    Form("<start_of_text>", "<end_of_text>", 0, "clip", False),
    Form(None, "<eos>", "<pad>", "lower", True),  # SigLIP 2: Gemma's
    Form(None, "</s>", "</s>", "canonical", True, lacks="<s>"),  # SigLIP; others begin with <s>
)


class Tokenizer:
    """Converts captions to token ids. `Tokenizer.train` learns one, `Tokenizer(path)` reads it.

    Attributes:
        start, end, pad: ids of special tokens; start is None in SigLIP's.
        fill: whether rows are padded to the context length.
    """

    def __init__(self, path: str | PathLike[str], clean: str | None = None) -> None:
        """Reads a tokenizer of fastclip, CLIP or SigLIP.

        Args:
            path: a tokenizer.json; the JSON file that `save` wrote; OpenAI's
                bpe_simple_vocab_16e6.txt.gz; or a folder with tokenizer.json, or with vocab.json
                and merges.txt.
            clean: what is done to texts first: "clip", "canonical" (SigLIP), "lower" (SigLIP 2) or
                "none". None: what the model of this form was trained with.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no tokenizer, or one of another form.
        """
        self._set(read(Path(path)), clean)

    def _set(self, bpe: tokenizers.Tokenizer, clean: str | None = None) -> None:
        self._bpe = bpe
        # A caption's "<end>" is text; else it would cut the caption short in the text tower.
        bpe.encode_special_tokens = True
        form = next((form for form in FORMS if form.has(bpe)), None)
        if form is None:
            forms = "; ".join(" ".join(filter(None, (form.start, form.end))) for form in FORMS)
            raise ValueError(f"the tokenizer must have the special tokens of one of: {forms}")
        clean = form.cleaning if clean is None else clean
        if clean not in CLEANING:
            raise ValueError(f"clean must be one of {', '.join(CLEANING)}, got {clean!r}")
        self._clean = CLEANING[clean]
        self.start = None if form.start is None else bpe.token_to_id(form.start)
        self.end: int = bpe.token_to_id(form.end)
        self.pad: int = form.pad if isinstance(form.pad, int) else bpe.token_to_id(form.pad)
        self.fill = form.fill
        self.vocab_size: int = bpe.get_vocab_size()
        self._words_end = form.cleaning == "clip"
        if self._words_end:
            # Whatever the file says, so that all files of this vocabulary give the same ids.
            bpe.normalizer, bpe.pre_tokenizer = None, byte_pairs.words()
            bpe.decoder = decoders.ByteLevel()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from captions until there are `vocab_size` tokens or nothing to merge.

        Raises:
            ValueError: the vocabulary cannot hold the 256 bytes and the three special tokens.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(SPECIAL):
            raise ValueError(
                f"vocab_size must be at least {len(alphabet) + len(SPECIAL)}, got {vocab_size}"
            )
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        # A space is added before the first word, so that a word is the same token everywhere.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            captions,
            trainers.BpeTrainer(
                vocab_size=vocab_size - len(SPECIAL),
                initial_alphabet=alphabet,
                show_progress=False,
            ),
        )
        bpe.add_special_tokens(list(SPECIAL))
        tokenizer = cls.__new__(cls)
        tokenizer._set(bpe)
        return tokenizer

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one JSON file."""
        self._bpe.save(fspath(path))

    def encode(
        self, captions: Sequence[str], context_length: int, fill: bool | None = None
    ) -> Tensor:
        """Returns captions as rows of ids, `<start> ... <end> <pad>...`.

        Args:
            context_length: the most tokens of a row. A longer caption is cut before its `<end>`.
            fill: whether rows have `context_length` tokens; None: the attribute's value.

        Returns:
            (len(captions), T) int64; T is the length of the longest row, at most `context_length`.

        Raises:
            ImportError: a caption needs the package ftfy, which is not installed.
        """
        # The rows below add the special tokens.
        first = [] if self.start is None else [self.start]
        room = context_length - len(first) - 1
        cleaned = [self._clean(caption) for caption in captions]
        rows = [
            [*first, *encoding.ids[:room], self.end]
            for encoding in self._bpe.encode_batch(cleaned, add_special_tokens=False)
        ]
        filled = self.fill if fill is None else fill
        longest = context_length if filled else max(map(len, rows), default=0)
        return torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows]).long()

    def decode(self, tokens: Tensor) -> list[str]:
        """Returns the captions of rows of ids, in lower case, without the special tokens."""
        rows = tokens.tolist()
        rows = [row[: row.index(self.end)] if self.end in row else row for row in rows]
        rows = [[k for k in row if k not in (self.start, self.pad)] for row in rows]
        texts = self._bpe.decode_batch(rows)
        if self._words_end:
            return [text.replace(byte_pairs.END_OF_WORD, " ").removesuffix(" ") for text in texts]
        return [text.removeprefix(" ") for text in texts]

    def check_fits(self, config: CLIPConfig) -> None:
        """Raises ValueError if a model's text tower was trained with another vocabulary.

        CLIP finds the end of a text by its id. SigLIP's tokenizers may have a few tokens that the
        model lacks.
        """
        if config.text_pool == "last":
            fits = abs(self.vocab_size - config.vocab_size) <= config.vocab_size // 100
        else:
            end = config.vocab_size - 1 if config.text_pool == "highest" else config.end_id
            fits = self.end == end and self.vocab_size <= config.vocab_size
        if not fits:
            raise ValueError(
                f"the tokenizer must be the model's, of {config.vocab_size} tokens, got one of "
                f"{self.vocab_size} tokens whose texts end with {self.end}"
            )


def read(path: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a file or a folder; `Tokenizer` says which.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no tokenizer.
    """
    if path.is_dir():
        if (path / "tokenizer.json").is_file() or not (path / "merges.txt").is_file():
            return read(path / "tokenizer.json")
        return byte_pairs.read(path / "merges.txt", path / "vocab.json")
    try:
        if path.suffix in (".gz", ".txt"):
            return byte_pairs.read(path)
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} must hold a tokenizer, got: {error}") from None
