"""A matching head tells whether a picture and a caption are a pair, from both towers at once.

The features of a CLIP meet in one product. The head looks at both sides together, at one of three
depths: `early` reads the towers' inputs, `middle` their outputs, `late` their features. It is
trained on pairs and on hard negatives of the contrastive loss, and orders the nearest candidates of
a search anew.

Letters as in `model.py`; `P` patches.

ViLBERT, arXiv 1908.02265 (the task); ALBEF, arXiv 2107.07651 (`middle`, hard negatives); BLIP,
arXiv 2201.12086; ViLT, arXiv 2102.03334 (`early`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..retrieval import sample_negatives
from .config import CLIPConfig
from .model import CLIP, HEAD, METADATA_KEY, ends_of, read_checkpoint
from .tower import TransformerBlock
from .views import FUSIONS, WithViews

FUSION_KEY = "fastclip_matching"


class MatchingHead(nn.Module):
    """One logit for a pair: positive if picture and caption match.

    - `early`: a Transformer over the embedded patches and the embedded words, joined.
    - `middle`: words attend to words, then to patches, in turn; both are the towers' outputs.
    - `late`: an MLP over both features and their product.

    The head shares a CLIP's towers and holds only what comes on top. `early` and `middle` read the
    result at the end of the caption, as the text tower does. Words after it are masked.

    Args:
        config: of the CLIP.
        fusion: one of `FUSIONS`.
        layers: Transformer blocks of `early` and `middle`.

    Raises:
        ValueError: there is no such fusion, or the number of layers is below 1.
    """

    def __init__(self, config: CLIPConfig, fusion: str, layers: int = 2) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")
        least = 2 if fusion == "middle" else 1  # every second layer reads the picture
        if layers < least:
            raise ValueError(f"layers must be at least {least} for {fusion!r}, got {layers}")
        self.config, self.fusion, self.layers = config, fusion, layers
        if fusion == "late":
            width = config.embed_dim
            self.hidden = nn.Linear(3 * width, width)
        else:
            width = config.image_width
            self.from_image = self._entry(width, width)
            self.from_text = self._entry(config.text_width, width)
            self.blocks = nn.ModuleList(
                TransformerBlock(width, config.image_heads, causal=False) for _ in range(layers)
            )
            # As in the towers: with smaller weights a short training would be over before attention
            # told the patches apart.
            for block in self.blocks:
                block.initialise(layers)
            self.norm = nn.LayerNorm(width)
        self.logit = nn.Linear(width, 1)

    @staticmethod
    def _entry(width: int, to: int) -> nn.Sequential:
        # Embedded words are small (0.02): without the norm the map's bias would hide them.
        linear = nn.Linear(width, to)
        nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.LayerNorm(width), linear)

    def forward(self, image_view: Tensor, text_view: Tensor, tokens: Tensor) -> Tensor:
        """Returns the logits (B) of B pairs.

        Args:
            image_view, text_view: the views of `WithViews`, row by row: (B, P, W) and (B, T, W), or
                features (B, D) for `late`.
            tokens: the captions' token ids (B, T).

        Raises:
            ValueError: the numbers of rows differ.
        """
        rows = [len(t) for t in (image_view, text_view, tokens)]
        if len(set(rows)) > 1:
            raise ValueError(
                "pictures, captions and tokens must have the same number of rows, got "
                f"{', '.join(map(str, rows))}"
            )
        if self.fusion == "late":
            # Unit vectors, scaled so that their entries have a variance of one, as layers expect.
            x, y = (view * view.shape[1] ** 0.5 for view in (image_view, text_view))
            return self.logit(F.gelu(self.hidden(torch.cat((x, y, x * y), dim=1))))[:, 0]
        ends = ends_of(self.config, tokens)
        words = torch.arange(tokens.shape[1], device=tokens.device) <= ends[:, None]
        patches, x = self.from_image(image_view), self.from_text(text_view)
        if self.fusion == "early":
            x = torch.cat((patches, x), dim=1)
            words = F.pad(words, (patches.shape[1], 0), value=True)
            ends = ends + patches.shape[1]
        for index, block in enumerate(self.blocks):
            if self.fusion == "middle" and index % 2:
                x = block(x, source=patches)
            else:
                x = block(x, mask=words[:, None, None])
        return self.logit(self.norm(x[torch.arange(len(x), device=x.device), ends]))[:, 0]

    def match(self, model: CLIP, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the logits (B) of pictures and captions as the model's `forward` takes them."""
        views = WithViews(model, self.fusion)(images, tokens)
        return self(views["image_view"], views["text_view"], tokens)

    def save(self, path: str | os.PathLike[str], model: CLIP, **notes: str) -> None:
        """Writes the model and the head to one file. `CLIP.load` reads the model, `load` the
        head."""
        shape = json.dumps({"fusion": self.fusion, "layers": self.layers})
        model.save(path, self, **{FUSION_KEY: shape}, **notes)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MatchingHead:
        """Returns the head that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: `save` did not write the file.
        """
        metadata, weights = read_checkpoint(path, device)
        if FUSION_KEY not in metadata:
            raise ValueError(f"{path} must hold a matching head, got a CLIP alone")
        config = CLIPConfig(**json.loads(metadata[METADATA_KEY]))
        head = cls(config, **json.loads(metadata[FUSION_KEY])).to(device)
        own = {n.removeprefix(HEAD): t for n, t in weights.items() if n.startswith(HEAD)}
        head.load_state_dict(own)
        return head


def matching_loss(
    head: MatchingHead, outputs: Mapping[str, Tensor], tokens: Tensor, *, seed: int,
    ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the binary cross-entropy of B pairs and of 2B negatives, the mean of both kinds.

    Each picture gets a negative caption and each caption a negative picture, drawn from the softmax
    of the contrastive logits, so that wrong pairs that look right are drawn more often. A pair
    counts twice, so that a logit of zero stands for an even chance.

    Args:
        outputs: of `WithViews` with the head's fusion, for B pairs.
        tokens: the captions' token ids (B, T).
        seed: of the draw; another one in each step.
        ids: (B), integers: pairs with equal ids, such as those of equal captions, are no negatives.

    Raises:
        ValueError: a pair has no negative.
    """
    x, y, scale = (
        outputs[name].detach() for name in ("image_features", "text_features", "logit_scale")
    )
    rows, columns = sample_negatives(
        x, y, scale, ids=None if ids is None else (ids, ids), seed=seed
    )
    if bool((torch.cat((rows, columns)) < 0).any()):
        raise ValueError(f"every pair must have a negative, got {len(x)} pairs and one without")
    own = torch.arange(len(x), device=x.device)
    images, texts = torch.cat((own, own, columns)), torch.cat((own, rows, own))
    logits = head(outputs["image_view"][images], outputs["text_view"][texts], tokens[texts])
    matches = (images == texts).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, matches, 0.75 * (1 + matches))
