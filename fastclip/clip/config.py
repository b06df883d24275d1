"""The configuration of a model: sizes, and the options in which published CLIPs differ.

The defaults are the demo's. `fastclip.clip.pretrained` fills the fields from other libraries'
weights.
"""

import math
from dataclasses import dataclass, fields

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
PROJECTIONS = ("linear", "biased", "none")
CHOICES = {
    "image_activation": ACTIVATIONS,
    "text_activation": ACTIVATIONS,
    "image_pool": ("patches", "class", "mean", "attention"),
    "text_pool": ("highest", "end", "last"),
    "image_projection": PROJECTIONS,
    "text_projection": PROJECTIONS,
    "image_resize": ("crop", "squash"),
    "image_interpolation": ("bicubic", "bilinear"),
}
OPTIONAL = ("bias", "image_mlp", "text_mlp", "end_id")
POSITIVE = ("scale", "image_eps", "text_eps")


def is_number(value: object) -> bool:
    """Returns whether the value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes, options, and the initial scale and bias of the logits. Pictures are RGB squares with
    a side of `image_size` pixels.

    Args:
        image_mlp, text_mlp: hidden width of a block's MLP; None: four times the tower's width.
        image_activation, text_activation: "gelu", "gelu_tanh" (its approximation) or "quick_gelu",
            x * sigmoid(1.702 x), of OpenAI's weights.
        image_eps, text_eps: the epsilon of a tower's layer norms.
        patch_bias: whether the patch embedding has a bias.
        class_token: whether a learnt token precedes the patches.
        image_norm_first: whether a layer norm precedes the image tower's blocks.
        image_pool: "patches" (the projection maps all patches together), "class" (the class
            token), "mean" (of the patches) or "attention" (SigLIP's MAP head).
        image_norm_after_pool: whether the last norm follows the pooling, as in CLIPA.
        image_projection, text_projection: "linear", "biased" or "none".
        causal: whether a token sees only those before it.
        text_pool: "highest" (the token with the highest id, as in CLIP), "end" (the first
            `end_id`) or "last" (the last position, padding included, as in SigLIP).
        image_mean, image_std: per colour, what normalises pictures in [0, 1].
        image_resize: "crop" (shorter side, then the centre) or "squash" (both sides).
        image_interpolation: the filter of resizing: "bicubic" or "bilinear", both with averaging.

    Raises:
        ValueError: a size is not a positive integer, a number is not finite, the patches do not
            tile the picture, the number of heads does not divide a width, or an option is unknown
            or contradicts another.
    """

    embed_dim: int = 256
    image_size: int = 32
    patch_size: int = 8
    image_width: int = 128
    image_layers: int = 2
    image_heads: int = 4
    vocab_size: int = 1536
    context_length: int = 24
    text_width: int = 256
    text_layers: int = 1
    text_heads: int = 4
    scale: float = 1 / 0.07
    bias: float | None = None  # None: the model has no bias
    image_mlp: int | None = None
    image_activation: str = "gelu"
    image_eps: float = 1e-5
    patch_bias: bool = True
    class_token: bool = False
    image_norm_first: bool = False
    image_pool: str = "patches"
    image_norm_after_pool: bool = False
    image_projection: str = "linear"
    text_mlp: int | None = None
    text_activation: str = "gelu"
    text_eps: float = 1e-5
    causal: bool = True
    text_pool: str = "highest"
    end_id: int | None = None
    text_projection: str = "linear"
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_resize: str = "crop"
    image_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            if isinstance(value := getattr(self, name), list):  # of JSON
                object.__setattr__(self, name, tuple(value))
        for field in fields(self):
            self._check(field.name, field.type, getattr(self, field.name))
        for whole, part in (
            ("image_size", "patch_size"),
            ("image_width", "image_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part}, "
                    f"got {getattr(self, whole)} and {getattr(self, part)}"
                )
        if self.image_pool == "class" and not self.class_token:
            raise ValueError("image_pool 'class' needs class_token, got False")
        if self.image_norm_after_pool and self.image_pool not in ("class", "mean"):
            raise ValueError(
                f"image_norm_after_pool needs image_pool 'class' or 'mean', got {self.image_pool!r}"
            )
        if (self.text_pool == "end") != (self.end_id is not None):
            raise ValueError(
                "text_pool 'end' and end_id go together, "
                f"got {self.text_pool!r} and {self.end_id!r}"
            )
        for tower in ("image", "text"):
            width = getattr(self, f"{tower}_width")
            if tower == "image" and self.image_pool == "patches":
                width *= self.tokens
            if getattr(self, f"{tower}_projection") == "none" and width != self.embed_dim:
                raise ValueError(
                    f"without a projection the pooled width must be embed_dim, {self.embed_dim}, "
                    f"got {width} in the {tower} tower"
                )

    @staticmethod
    def _check(name: str, kind: object, value: object) -> None:
        if name in CHOICES:
            if value not in CHOICES[name]:
                choices = ", ".join(map(repr, CHOICES[name]))
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        elif name in OPTIONAL and value is None:
            return
        elif name in ("image_mean", "image_std"):
            numbers = isinstance(value, tuple) and len(value) == 3 and all(map(is_number, value))
            if not numbers or (name == "image_std" and min(value) <= 0):
                rule = "three numbers" if name == "image_mean" else "three positive numbers"
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        elif name in POSITIVE:
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        elif name == "bias":
            if not is_number(value):
                raise ValueError(f"bias must be a number or None, got {value!r}")
        elif name == "end_id":
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"end_id must be a token id or None, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """The length of the image tower's sequence: the patches and the class token."""
        return self.patches + self.class_token
