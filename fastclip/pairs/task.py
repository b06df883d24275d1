"""The inputs of a training on one's own pairs: options, pairs, tokenizer, model sizes."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..clip.model import CLIP, CLIPConfig
from ..clip.tokenizer import Tokenizer
from ..demo.checkpoint import Checkpoint, place_of
from ..demo.losses import INITIAL, BatchLoss
from ..demo.workers import Workers
from .batches import Batches
from .check import readable
from .command_line import SIZES
from .evaluate import HeldOut
from .images import Augmentation
from .pair import LeftOut, Pair, fingerprint, hold_out
from .vocabulary import tokenizer_of, tokenizer_text

# The options that determine the loss curve, beside the pairs and the tokenizer.
DECISIVE = (
    "steps", "batch_size", "micro_batch", "lr", "weight_decay", "loss", "implementation", "seed",
    "crop", "flip", "held_out", *SIZES,
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """The inputs of a training: options, pairs, tokenizer, model sizes, device."""

    args: argparse.Namespace
    trained: list[Pair]
    held_out: list[Pair]
    left_out: LeftOut
    tokenizer: Tokenizer
    tokenizer_text: str
    config: CLIPConfig
    device: torch.device
    workers: Workers

    @classmethod
    def load(
        cls, args: argparse.Namespace, pairs: Sequence[Pair], left_out: LeftOut,
        device: torch.device, workers: Workers,
    ) -> "Task":  # fmt: skip
        """Checks the images and learns the tokenizer.

        Raises:
            OSError, ValueError: no pair is usable, or an option does not fit the pairs. All ranks
                raise the same error.
        """
        usable = readable(pairs, args.image_size, left_out, workers, args.workers)
        if not usable:
            reasons = "; ".join(left_out.lines())
            raise ValueError(f"pairs must hold an image with a caption, {args.pairs} has none"
                             + (f": {reasons}" if reasons else ""))  # fmt: skip
        trained, held_out = hold_out(usable, args.held_out)
        if not trained:
            raise ValueError(
                f"held-out share must leave pairs to train on, got {args.held_out} of {len(usable)}"
            )
        text = workers.from_first(lambda: tokenizer_text(args.tokenizer, args.vocab_size, trained))
        tokenizer = tokenizer_of(text)
        return cls(
            args, trained, held_out, left_out, tokenizer, text,
            config_of(args, tokenizer.vocab_size), device, workers,
        )  # fmt: skip

    def encode(self, captions: Sequence[str]) -> Tensor:
        return self.tokenizer.encode(captions, self.config.context_length).to(self.device)

    def start(self) -> tuple[CLIP, Batches, BatchLoss]:
        """Returns an untrained model, its batches, and the loss of this rank's share of them.

        Raises:
            ValueError: the batch size does not fit the pairs, or the model the memory.
        """
        args = self.args
        stream = Batches(
            self.trained, self.encode, args.batch_size, args.seed, args.image_size,
            Augmentation(args.crop, args.flip), device=self.device,
            rows=self.workers.rows(args.batch_size), processes=args.workers,
        )  # fmt: skip
        torch.manual_seed(args.seed)
        try:
            model = CLIP(self.config).to(self.device)
        except (RuntimeError, TypeError) as error:  # the latter for a size beyond 64 bits
            reason = str(error).splitlines()[0].rpartition("] err == 0. ")[2]
            raise ValueError(f"the model must fit into memory: {reason}") from None
        samples = len(self.trained)
        loss = BatchLoss(args.loss, args.implementation, samples, args.batch_size, self.workers)
        return model, stream, loss.to(self.device)

    def checkpoint(self) -> Checkpoint:
        settings = {name: getattr(self.args, name) for name in DECISIVE}
        settings["pairs"] = fingerprint(self.trained, self.tokenizer_text)
        place = place_of(self.workers.size, self.args.device)
        return Checkpoint(
            self.args.out / "training.pt", settings, place, self.args.checkpoint_every
        )

    def held_out_set(self, count: int | None = None) -> HeldOut:
        return HeldOut.of(self.held_out[:count], self.args.image_size)


def config_of(args: argparse.Namespace, vocab_size: int) -> CLIPConfig:
    sizes = {name: getattr(args, name) for name in SIZES}
    return CLIPConfig(**sizes, vocab_size=vocab_size, **INITIAL.get(args.loss, {}))
