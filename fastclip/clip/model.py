"""A thin reference CLIP: a ViT for pictures, a Transformer for captions, one space for both.

The model is small enough to read at once and to train on a CPU. `forward` returns the dict
that open_clip models return, so that `loss(**model(images, tokens), output_dict=True)` works with
every loss of `fastclip.loss`. This file computes no loss and reads no data. Captions arrive as
token ids (`fastclip.clip.tokenizer`).

Letters: `B` batch size, `T` sequence length, `W` width of a tower, `D` width of the shared space.

Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.
"""

import json
import math
import os
from dataclasses import asdict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CLIPConfig
from .tower import AttentionPool, Tower

MAX_SCALE = 100.0  # CLIP's ceiling for exp(logit_scale): beyond it training becomes unstable
METADATA_KEY = "fastclip_config"
HEAD = "matching."  # begins the names of a matching head's weights in a checkpoint


def projection(kind: str, width: int, embed_dim: int) -> nn.Module:
    """Returns one of `fastclip.clip.config.PROJECTIONS`."""
    if kind == "none":
        return nn.Identity()
    return nn.Linear(width, embed_dim, bias=kind == "biased")


class CLIP(nn.Module):
    """Two towers that map pictures and captions to one D-dimensional space, and a learnt scale.

    `logit_scale` is the logarithm of the scale. It starts at ln(1/0.07), as in the paper, unless
    the configuration has another scale. Call `clamp_logit_scale()` after each optimiser step to
    keep it at or below ln 100. `logit_bias`, for SigLIP, is there if the configuration has a bias.

    By default pictures are pooled by one linear map of all patches, captions by their last token.
    The map replaces CLIP's class token. A class token starts as an average over the patches,
    without their positions, and a short training is almost over before it has learnt them. In the
    demo, after 25,000 pairs of emoji, a class token recognised 4 % of the drawings of a vendor that
    was not trained on, the linear map 9 %. `CLIPConfig` has the options that other models need.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = config
        self.patch_embedding = nn.Conv2d(
            3, c.image_width, c.patch_size, stride=c.patch_size, bias=c.patch_bias
        )
        self.image_tower = Tower(
            c.image_width, c.image_layers, c.image_heads, c.tokens, causal=False, mlp=c.image_mlp,
            activation=c.image_activation, eps=c.image_eps, class_token=c.class_token,
            norm_first=c.image_norm_first, final_norm=not c.image_norm_after_pool,
        )  # fmt: skip
        pooled = c.image_width * (c.tokens if c.image_pool == "patches" else 1)
        self.image_projection = projection(c.image_projection, pooled, c.embed_dim)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.text_tower = Tower(
            c.text_width, c.text_layers, c.text_heads, c.context_length, causal=c.causal,
            mlp=c.text_mlp, activation=c.text_activation, eps=c.text_eps,
        )  # fmt: skip
        self.text_projection = projection(c.text_projection, c.text_width, c.embed_dim)
        if c.image_pool == "attention":
            self.image_pool = AttentionPool(
                c.image_width, c.image_heads, c.image_mlp or 4 * c.image_width,
                c.image_activation, c.image_eps,
            )  # fmt: skip
        self.logit_scale = nn.Parameter(torch.tensor(math.log(c.scale)))
        if c.bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(c.bias)))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for linear in (self.image_projection, self.text_projection):
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for tower in (self.image_tower, self.text_tower):
            nn.init.normal_(tower.positions, std=0.02)
            for block in tower.blocks:
                block.initialise(len(tower.blocks))
        if self.config.image_pool == "attention":
            nn.init.normal_(self.image_pool.query, std=self.config.image_width**-0.5)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Returns the features (B, D) of pictures (B, 3, image_size, image_size), float, normalised
        by the configuration's mean and standard deviation (by default to [-1, 1]).

        Args:
            normalize: whether to divide each row by its norm, as `forward` does.

        Raises:
            ValueError: the pictures have another shape.
        """
        return self.pool_image(self.image_tokens(images), normalize)

    def pool_image(self, x: Tensor, normalize: bool = True) -> Tensor:
        """Returns the features (B, D) of the image tower's output (B, T, W)."""
        pool = self.config.image_pool
        if pool == "patches":
            x = x.flatten(1)
        elif pool == "class":
            x = x[:, 0]
        elif pool == "mean":
            x = x[:, int(self.config.class_token) :].mean(dim=1)
        else:
            x = self.image_pool(x)
        if self.config.image_norm_after_pool:
            x = self.image_tower.norm(x)
        features = self.image_projection(x)
        return F.normalize(features, dim=-1) if normalize else features

    def image_tokens(self, images: Tensor) -> Tensor:
        """Returns the image tower's output (B, T, W) for pictures as `encode_image` takes them: the
        class token, if there is one, then the patches."""
        return self.image_tower(self.embed_image(images))

    def embed_image(self, images: Tensor) -> Tensor:
        """Returns the image tower's input (B, T, W): tokens with their positions."""
        size = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {tuple(images.shape)}")
        return self.image_tower.embed(self.patch_embedding(images).flatten(2).transpose(1, 2))

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Returns the features (B, D) of token ids (B, T), T at most `context_length`.

        By default the features are a projection of the tower's output at each row's end-of-text
        token, which has the highest id, as in CLIP. Attention is causal and padding follows that
        token, so that the amount of padding does not change the features. It does with
        `text_pool="last"` or without `causal`: pad rows to `context_length`, as in training.

        Args:
            normalize: whether to divide each row by its norm, as `forward` does.

        Raises:
            ValueError: the ids have another shape, or rows are longer than `context_length`.
        """
        return self.pool_text(self.text_tokens(tokens), tokens, normalize)

    def pool_text(self, x: Tensor, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Returns the features (B, D) of the text tower's output x (B, T, W) for token ids."""
        last = ends_of(self.config, tokens)
        features = self.text_projection(x[torch.arange(len(x), device=x.device), last])
        return F.normalize(features, dim=-1) if normalize else features

    def text_tokens(self, tokens: Tensor) -> Tensor:
        """Returns the text tower's output (B, T, W) for token ids as `encode_text` takes them."""
        return self.text_tower(self.embed_text(tokens))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Returns the text tower's input (B, T, W): token embeddings with their positions."""
        longest = self.config.context_length
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= longest:
            raise ValueError(
                f"tokens must be (B, T) with T from 1 to {longest}, got {tuple(tokens.shape)}"
            )
        return self.text_tower.embed(self.token_embedding(tokens))

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Returns normalised features (B, D), the exponentiated scale, and the bias if there is
        one, by open_clip's names."""
        features = {
            "image_features": self.encode_image(images),
            "text_features": self.encode_text(tokens),
        }
        return features | self.shared_outputs()

    def shared_outputs(self) -> dict[str, Tensor]:
        """Returns the entries of `forward` that all pairs share: the scale, and the bias if any."""
        shared = {"logit_scale": self.logit_scale.exp()}
        return shared if self.config.bias is None else shared | {"logit_bias": self.logit_bias}

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Limits exp(logit_scale) to 100. Call it after each step of the optimiser."""
        self.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def save(
        self, path: str | os.PathLike[str], head: nn.Module | None = None, **notes: str
    ) -> None:
        """Writes weights, configuration and `notes` to a safetensors file, atomically. The weights
        of `head`, which `load` passes over, go to the same file: see `MatchingHead.save`."""
        metadata = {**notes, "format": "pt", METADATA_KEY: json.dumps(asdict(self.config))}
        path = os.fspath(path)
        named = self.state_dict()
        if head is not None:
            named |= {HEAD + name: tensor for name, tensor in head.state_dict().items()}
        weights = {name: tensor.detach().cpu() for name, tensor in named.items()}
        save_file(weights, path + ".part", metadata)
        os.replace(path + ".part", path)  # an interrupted write keeps the earlier file

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "CLIP":
        """Returns the model that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: `save` did not write the file.
        """
        metadata, weights = read_checkpoint(path, device)
        model = cls(CLIPConfig(**json.loads(metadata[METADATA_KEY]))).to(device)
        own = {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)}
        model.load_state_dict(own)
        return model


def ends_of(config: CLIPConfig, tokens: Tensor) -> Tensor:
    """Returns the position (B) of each row's token at which the text tower is read."""
    if config.text_pool == "highest":
        return tokens.argmax(dim=1)
    if config.text_pool == "end":
        return (tokens == config.end_id).int().argmax(dim=1)
    return torch.full_like(tokens[:, 0], tokens.shape[1] - 1)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Returns whether `CLIP.save` wrote the file."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def read_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Returns the metadata and the weights of a file by `CLIP.save`, and raises as `CLIP.load`."""
    try:
        with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise ValueError(f"{path} must be a checkpoint of fastclip's CLIP, got another")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors checkpoint, got: {error}") from None
