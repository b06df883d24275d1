"""Small models of other libraries with random weights, and the comparison with ours."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from support.peers import peer
from torch import Tensor, nn

from fastclip.clip import CLIP

SIZE, LENGTH, VOCABULARY = 32, 12, 99
NATIVE = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": SIZE, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16,
    },
    "text_cfg": {
        "context_length": LENGTH, "vocab_size": VOCABULARY, "width": 40, "heads": 5, "layers": 3,
    },
}  # fmt: skip
SIGLIP_TEXT = {
    "context_length": LENGTH, "vocab_size": VOCABULARY, "width": 48, "heads": 4, "layers": 2,
    "mlp_ratio": 3.5, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}  # fmt: skip


def disturb(model: nn.Module) -> nn.Module:
    """Adds noise to all parameters, so that biases, norms and zero weights matter, too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def open_clip_model(config: dict[str, Any], custom: bool = False, **options: Any) -> nn.Module:
    module = peer("open_clip.model")
    torch.manual_seed(0)
    kind = module.CustomTextCLIP if custom else module.CLIP
    return disturb(kind(**{**config, **options}, output_dict=True))


def small_timm() -> str:
    """Registers timm's SigLIP ViT "base" in a small size and returns its name."""
    timm: ModuleType = peer("timm")

    def vit_base_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith(("pretrained", "cache"))}
        model = timm.models.vision_transformer.VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=12, mlp_ratio=3.0,
            class_token=False, **{"global_pool": "map", **kwargs},
        )  # fmt: skip
        model.default_cfg = {}
        return model

    name = vit_base_patch8_siglip_32.__name__
    vit_base_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
    if not timm.is_model(name):
        timm.models.register_model(vit_base_patch8_siglip_32)
    return name


def siglip_config(**text: Any) -> dict[str, Any]:
    """Returns open_clip's configuration of a small SigLIP."""
    return {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": SIZE, "timm_model_name": small_timm(), "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": SIGLIP_TEXT | text,
    }  # fmt: skip


def inputs(end: int = VOCABULARY - 1) -> tuple[Tensor, Tensor]:
    """Returns four pictures, and texts whose first `end` is followed by padding."""
    torch.manual_seed(2)
    tokens = torch.randint(1, VOCABULARY - 1, (4, LENGTH))
    for row, length in enumerate((3, 7, 11, 9)):
        tokens[row, length:] = 0
        tokens[row, length] = end
    return torch.randn(4, 3, SIZE, SIZE), tokens


@torch.no_grad()
def assert_same_features(
    ours: CLIP, theirs: nn.Module, image: Callable[[nn.Module, Tensor], Tensor],
    text: Callable[[nn.Module, Tensor], Tensor], end: int = VOCABULARY - 1,
) -> None:  # fmt: skip
    """Asserts that both models have the same features, scale and bias: in float32, and in float64,
    where another epsilon of a norm or another activation shows.

    image, text: compute their features, not normalised.
    """
    images, tokens = inputs(end)
    for dtype, limit in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        mine, other = (copy.deepcopy(model).eval().to(dtype) for model in (ours, theirs))
        for encode, expected, given in (
            (mine.encode_image, image(other, images.to(dtype)), images.to(dtype)),
            (mine.encode_text, text(other, tokens), tokens),
        ):  # fmt: skip
            assert expected.dtype == dtype
            close = {"rtol": 0, "atol": limit * float(expected.abs().max())}
            torch.testing.assert_close(encode(given, normalize=False), expected, **close)
            unit = nn.functional.normalize(expected, dim=-1)
            torch.testing.assert_close(encode(given), unit, rtol=0, atol=limit)
            # Rows differ, so that a wrong pooling or mask is seen.
            assert (unit[0] - unit[1]).abs().max() > 1e-2
        out = mine(images.to(dtype), tokens)
        torch.testing.assert_close(out["logit_scale"], other.logit_scale.exp().reshape(()))
        bias = getattr(other, "logit_bias", None)
        assert ("logit_bias" in out) == (bias is not None)
        if bias is not None:
            torch.testing.assert_close(out["logit_bias"], bias.reshape(()))
