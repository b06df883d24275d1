"""open_clip's configuration of a model: `open_clip_config.json`, or a file of `model_configs`."""

import re
from typing import Any

from .preprocessing import facts_of_preprocess_cfg

# timm's SigLIP ViTs by size: number of heads, activation. Their norms have an epsilon of 1e-6.
TIMM = {
    "base": (12, "gelu"),
    "large": (16, "gelu"),
    "so400m": (16, "gelu"),
    "giantopt": (16, "gelu_tanh"),
}
TEXT_POOL = {"argmax": "highest", "eos": "end", "last": "last"}
IMAGE_POOL = {"tok": "class", "avg": "mean"}
# Options that change neither features nor keys, or only the keys, which are checked one by one.
READ = {
    "vision_cfg": {
        "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout",
        "no_ln_pre", "pos_embed_type", "final_ln_after_pool", "pool_type", "output_tokens",
        "act_kwargs", "norm_kwargs", "timm_model_name", "timm_model_pretrained", "timm_pool",
        "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path", "attn_pooler_queries",
        "attn_pooler_heads",
    },
    "text_cfg": {
        "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs",
        "width", "heads", "layers", "mlp_ratio", "pad_id", "bos_id", "eos_id", "no_causal_mask",
        "pool_type", "proj_bias", "proj_type", "output_tokens", "act_kwargs", "norm_kwargs",
        "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    },
}  # fmt: skip


def check_options(config: dict[str, Any]) -> None:
    """Raises ValueError if an option is on that this loader does not know."""
    unknown = [
        f"{part}.{name}={value!r}"
        for part, known in READ.items()
        for name, value in config[part].items()
        if value and name not in known and (name, value) != ("text_arch", "clip")
    ]
    if unknown:
        raise ValueError(f"open_clip's configuration has unsupported options: {', '.join(unknown)}")


def activation(quick: bool, kwargs: dict[str, Any] | None) -> str:
    if not kwargs:
        return "quick_gelu" if quick else "gelu"
    if quick or kwargs not in ({"approximate": "tanh"}, {"approximate": "none"}):
        raise ValueError(f"act_kwargs must be those of GELU, got {kwargs}")
    return "gelu_tanh" if kwargs["approximate"] == "tanh" else "gelu"


def epsilon(kwargs: dict[str, Any] | None) -> float:
    if set(kwargs or {}) - {"eps"}:
        raise ValueError(f"norm_kwargs must be eps, got {kwargs}")
    return (kwargs or {}).get("eps", 1e-5)


def square(size: int | list[int]) -> int:
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise ValueError(f"image_size must be a square, got {size}")
    return sides[0]


def image_facts(vision: dict[str, Any], quick: bool) -> dict[str, Any]:
    found = {"image_size": square(vision.get("image_size", 224))}
    if name := vision.get("timm_model_name"):
        match = re.fullmatch(r"vit_(\w+?)_patch\d+_siglip_\d+(\..*)?", name)
        if match is None or match[1] not in TIMM or vision.get("timm_pool") != "map":
            raise ValueError(
                "timm's image tower must be a SigLIP ViT with attention pooling, such as "
                f"vit_base_patch16_siglip_224 with timm_pool 'map', got {name!r} "
                f"with {vision.get('timm_pool')!r}"
            )
        heads, act = TIMM[match[1]]
        return found | {"image_heads": heads, "image_activation": act, "image_eps": 1e-6}
    if not isinstance(vision.get("layers", 12), int):
        raise ValueError(f"the image tower must be a ViT, got a ResNet of {vision['layers']}")
    width, pool = vision.get("width", 768), vision.get("pool_type", "tok")
    if pool not in IMAGE_POOL:
        raise ValueError(f"the image tower's pool_type must be 'tok' or 'avg', got {pool!r}")
    return found | {
        "image_width": width, "image_layers": vision.get("layers", 12),
        "patch_size": vision.get("patch_size", 16),
        "image_heads": width // vision.get("head_width", 64),
        "image_activation": activation(quick, vision.get("act_kwargs")),
        "image_eps": epsilon(vision.get("norm_kwargs")), "image_pool": IMAGE_POOL[pool],
        "image_norm_after_pool": bool(vision.get("final_ln_after_pool")),
        "image_norm_first": not vision.get("no_ln_pre"),
    }  # fmt: skip


def text_facts(text: dict[str, Any], quick: bool) -> dict[str, Any]:
    pool = text.get("pool_type", "argmax")
    if text.get("hf_model_name"):
        raise ValueError(f"the text tower must be open_clip's, got {text['hf_model_name']!r}")
    if pool not in TEXT_POOL:
        raise ValueError(
            f"the text tower's pool_type must be one of {list(TEXT_POOL)}, got {pool!r}"
        )
    found = {
        "context_length": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408), "text_width": text.get("width", 512),
        "text_layers": text.get("layers", 12), "text_heads": text.get("heads", 8),
        "text_activation": activation(quick, text.get("act_kwargs")),
        "text_eps": epsilon(text.get("norm_kwargs")),
        "causal": not text.get("no_causal_mask", False), "text_pool": TEXT_POOL[pool],
    }  # fmt: skip
    if pool == "eos":
        found["end_id"] = text.get("eos_id", 2)
    if text.get("proj_type", "linear") == "none":
        found["text_projection"] = "none"
    return found


def facts_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of `CLIPConfig` that open_clip's configuration gives.

    Raises:
        ValueError: it is no such configuration, or has options that are not supported.
    """
    model = config.get("model_cfg", config)
    if not all(isinstance(model.get(part), dict) for part in READ):
        raise ValueError(
            "open_clip's configuration must have vision_cfg and text_cfg, "
            f"got {', '.join(config) or 'nothing'}"
        )
    check_options(model)
    quick = bool(model.get("quick_gelu"))
    found = {"embed_dim": model["embed_dim"]} if "embed_dim" in model else {}
    found |= image_facts(model["vision_cfg"], quick) | text_facts(model["text_cfg"], quick)
    preprocess = config.get("preprocess_cfg") or {}
    return found | facts_of_preprocess_cfg(preprocess, found["image_size"])
