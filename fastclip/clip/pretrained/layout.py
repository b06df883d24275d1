"""How a library names the parts of one tower, and the sizes that their shapes tell."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import CLIPConfig
from .keys import Source, State, listed, one, pair


@dataclass(frozen=True)
class TowerKeys:
    """The keys of a tower. `{}` stands for "weight" and "bias".

    embedding: of the patches or the tokens.
    blocks: what precedes the number of a block.
    block: for each part of `TransformerBlock`, the keys after that number; several are joined.
    """

    embedding: str
    positions: str
    blocks: str
    block: Mapping[str, str | tuple[str, ...]]
    norm: str

    def anchors(self) -> list[str]:
        """Returns the keys whose shapes tell the sizes."""
        up = self.block["up"]
        assert isinstance(up, str)
        return [
            self.embedding.format("weight"),
            self.positions,
            f"{self.blocks}.0.{up.format('weight')}",
        ]

    def layers(self, state: State) -> int:
        found = re.compile(re.escape(self.blocks) + r"\.(\d+)\.")
        return len({match[1] for match in map(found.match, state) if match})

    def sources(self, tower: str, layers: int) -> dict[str, Source]:
        """Returns the sources of our tower, apart from its embedding."""
        found = {f"{tower}.positions": one(self.positions), **pair(f"{tower}.norm", self.norm)}
        for k in range(layers):
            for ours, theirs in self.block.items():
                names = (theirs,) if isinstance(theirs, str) else theirs
                keys = tuple(f"{self.blocks}.{k}.{name}" for name in names)
                found |= pair(f"{tower}.blocks.{k}.{ours}", keys)
        return found


def sizes(state: State, image: TowerKeys, text: TowerKeys, class_token: bool) -> dict[str, Any]:
    """Returns the fields of `CLIPConfig` that shapes tell.

    Raises:
        ValueError: a key is missing or has another rank, or the picture is no square.
    """
    anchors = [*image.anchors(), *text.anchors()]
    if missing := [key for key in anchors if key not in state]:
        raise ValueError(f"cannot tell the sizes of the model: missing keys: {listed(missing)}")
    ranks = [4, None, 2, 2, None, 2]
    for key, rank in zip(anchors, ranks, strict=True):
        shape = tuple(state[key].shape)
        if len(shape) != rank and (rank or len(shape) < 2):
            raise ValueError(f"{key} must have {rank or 2} dimensions, got {shape}")
    patch, image_positions, image_up, tokens, text_positions, text_up = (
        state[key].shape for key in anchors
    )
    patches = image_positions[-2] - class_token
    side = math.isqrt(max(patches, 0))
    if side == 0 or side * side != patches or patch[2] != patch[3]:
        raise ValueError(
            "pictures and patches must be squares, got "
            f"{image.positions} for {patches} patches of {patch[2]} x {patch[3]} pixels"
        )
    return {
        "image_size": side * patch[2], "patch_size": patch[2], "image_width": patch[0],
        "image_layers": image.layers(state), "image_mlp": image_up[0], "vocab_size": tokens[0],
        "context_length": text_positions[-2], "text_width": tokens[1],
        "text_layers": text.layers(state), "text_mlp": text_up[0],
    }  # fmt: skip


def logits(state: State) -> dict[str, Any]:
    """Returns the fields of the scale and the bias of the logits."""
    found = {}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        found["scale"] = math.exp(state["logit_scale"].item())
    if "logit_bias" in state and state["logit_bias"].numel() == 1:
        found["bias"] = state["logit_bias"].item()
    return found


def common_sources(config: CLIPConfig, image: TowerKeys, text: TowerKeys) -> dict[str, Source]:
    """Returns the sources of what every form has."""
    patch = pair("patch_embedding", image.embedding)
    if not config.patch_bias:
        del patch["patch_embedding.bias"]
    found = {
        **patch,
        "token_embedding.weight": one(text.embedding.format("weight")),
        "logit_scale": one("logit_scale"),
        **image.sources("image_tower", config.image_layers),
        **text.sources("text_tower", config.text_layers),
    }
    if config.bias is not None:
        found["logit_bias"] = one("logit_bias")
    return found
