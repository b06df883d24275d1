"""Tiny models of transformers' two-tower classes, and batches for them."""

from typing import Any

import torch
from support.peers import peer
from torch import Tensor, nn

# A batch's size is none of the models' sizes, so that an (N, N) tensor can be told apart.
N = 13
_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "attention_dropout": 0.1,
}  # fmt: skip
_TEXT = {
    **_TOWER,
    "vocab_size": 50,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 49,
}
_BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 10, "pad_token_id": 0,
    "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
_VISION = {**_TOWER, "image_size": 16, "patch_size": 8}
_GROUPS = {
    **_TOWER, "image_size": 16, "patch_size": 4, "depths": [1, 1], "num_group_tokens": [4, 2],
    "num_output_groups": [4, 2],
}  # fmt: skip
_CLAP_AUDIO = {
    "spec_size": 32, "window_size": 4, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2],
    "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 16,
    "patch_embeds_hidden_size": 8, "num_hidden_layers": 2, "projection_dim": 12,
}  # fmt: skip
_EFFICIENTNET = {
    "image_size": 32, "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
    "kernel_sizes": [3, 3], "num_block_repeats": [1, 1], "expand_ratios": [1, 6],
    "depthwise_padding": [], "hidden_dim": 20, "dropout_rate": 0.1,
}  # fmt: skip

# The parts of each class's config; batches have images of this size, unless they say otherwise.
_CONFIGS: dict[str, dict[str, Any]] = {
    "CLIPModel": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 12},
    "MetaClip2Model": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 12},
    "CLIPSegModel": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 12},
    "ChineseCLIPModel": {"text_config": _BERT, "vision_config": _VISION, "projection_dim": 12},
    "AltCLIPModel": {
        "text_config": {**_BERT, "project_dim": 16}, "vision_config": _VISION,
        "projection_dim": 12,
    },
    "SiglipModel": {"text_config": {**_TEXT, "projection_size": 16}, "vision_config": _VISION},
    "Siglip2Model": {
        "text_config": {**_TEXT, "projection_size": 16},
        "vision_config": {**_TOWER, "num_patches": 16, "patch_size": 4},
    },
    "BlipModel": {
        "text_config": {**_TEXT, "encoder_hidden_size": 16, "sep_token_id": 0},
        "vision_config": _VISION, "projection_dim": 12,
    },
    "GroupViTModel": {
        "text_config": _TEXT, "vision_config": _GROUPS, "projection_dim": 12,
        "projection_intermediate_dim": 20,
    },
    "OwlViTModel": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 12},
    "Owlv2Model": {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 12},
    "ClapModel": {"text_config": _BERT, "audio_config": _CLAP_AUDIO, "projection_dim": 12},
    "AlignModel": {"text_config": _BERT, "vision_config": _EFFICIENTNET, "projection_dim": 48},
    "Tipsv2Model": {"text_config": _TEXT, "vision_config": _VISION},
}  # fmt: skip
NAMES = sorted([*_CONFIGS, "VisionTextDualEncoderModel"])


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns a seeded model of a class, in train mode; its dropouts act."""
    transformers = peer("transformers")
    torch.manual_seed(0)
    if name == "VisionTextDualEncoderModel":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            transformers.ViTConfig(**_VISION), transformers.BertConfig(**_BERT), projection_dim=12
        )
    else:
        config = getattr(transformers, name.removesuffix("Model") + "Config")(**_CONFIGS[name])
    model = getattr(transformers, name)(config)
    for p in model.parameters():
        # Initial weights are so small that all features are nearly the same.
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return model.to(dtype).train()


def batch_of(name: str, n: int = N, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 49, (n, 6), generator=generator)
    tokens[:, -1] = 49
    batch = {"input_ids": tokens, "attention_mask": torch.ones(n, 6, dtype=torch.int64)}
    if name == "ClapModel":
        shape, image = (n, 1, 128, 8), "input_features"
    elif name == "Siglip2Model":
        shape, image = (n, 16, 48), "pixel_values"
        batch["pixel_attention_mask"] = torch.ones(n, 16, dtype=torch.int64)
        batch["spatial_shapes"] = torch.tensor([[4, 4]] * n)
    else:
        side = 32 if name == "AlignModel" else 16
        shape, image = (n, 3, side, side), "pixel_values"
    return batch | {image: torch.randn(shape, generator=generator, dtype=dtype)}
