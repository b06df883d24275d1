"""The tensors of a CLIP that a matching head reads, for each of three depths of fusion."""

from __future__ import annotations

from torch import Tensor, nn

from .model import CLIP

FUSIONS = ("early", "middle", "late")


class WithViews(nn.Module):
    """A CLIP that also returns what a head reads of each side; the towers run once.

    `forward` returns the model's outputs with image_view and text_view: the towers' inputs for
    `early`, their outputs for `middle`, the features for `late`.
    """

    def __init__(self, model: CLIP, fusion: str) -> None:
        super().__init__()
        self.model, self.fusion = model, fusion

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features and view of pictures."""
        embedded = self.model.embed_image(images)
        x = self.model.image_tower(embedded)
        features = self.model.pool_image(x)
        return features, (embedded, x, features)[FUSIONS.index(self.fusion)]

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features and view of captions."""
        embedded = self.model.embed_text(tokens)
        x = self.model.text_tower(embedded)
        features = self.model.pool_text(x, tokens)
        return features, (embedded, x, features)[FUSIONS.index(self.fusion)]

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        (x, image_view), (y, text_view) = self.image(images), self.text(tokens)
        outputs = {"image_features": x, "text_features": y, **self.model.shared_outputs()}
        return outputs | {"image_view": image_view, "text_view": text_view}
