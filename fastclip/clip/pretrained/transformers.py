"""The state dicts of transformers' CLIPModel and SiglipModel."""

from typing import Any

from ..config import CLIPConfig
from . import rules
from .keys import Source, State, joined, one, pair
from .layout import TowerKeys, common_sources, logits, sizes
from .preprocessing import facts_of_preprocessor

NAME = "transformers' CLIPModel or SiglipModel"
CONFIG = "config.json"
# Buffers that older versions store.
HARMLESS = (r"(text|vision)_model\.embeddings\.position_ids",)

BLOCK = {
    "norm_1": "layer_norm1.{}",
    "qkv": ("self_attn.q_proj.{}", "self_attn.k_proj.{}", "self_attn.v_proj.{}"),
    "out": "self_attn.out_proj.{}", "norm_2": "layer_norm2.{}", "up": "mlp.fc1.{}",
    "down": "mlp.fc2.{}",
}  # fmt: skip
IMAGE = TowerKeys(
    "vision_model.embeddings.patch_embedding.{}",
    "vision_model.embeddings.position_embedding.weight", "vision_model.encoder.layers",
    BLOCK, "vision_model.post_layernorm.{}",
)  # fmt: skip
TEXT = TowerKeys(
    "text_model.embeddings.token_embedding.{}", "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers", BLOCK, "text_model.final_layer_norm.{}",
)  # fmt: skip
ACTIVATION = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# The libraries' defaults, which a configuration leaves out.
DEFAULTS = {
    "clip": {
        "vision_config": {"num_attention_heads": 12, "hidden_act": "quick_gelu"},
        "text_config": {
            "num_attention_heads": 8, "hidden_act": "quick_gelu", "eos_token_id": 49407,
        },
    },
    "siglip": {
        "vision_config": {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh"},
        "text_config": {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh"},
    },
}  # fmt: skip
EPSILON = {"clip": 1e-5, "siglip": 1e-6}
SIZES = {
    "vision_config": {
        "hidden_size": "image_width", "num_hidden_layers": "image_layers",
        "image_size": "image_size", "patch_size": "patch_size", "intermediate_size": "image_mlp",
    },
    "text_config": {
        "hidden_size": "text_width", "num_hidden_layers": "text_layers",
        "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
        "intermediate_size": "text_mlp",
    },
}  # fmt: skip


def is_siglip(state: State) -> bool:
    return "vision_model.head.probe" in state


def part_of_config(config: dict[str, Any], kind: str, part: str) -> dict[str, Any]:
    """Returns the configuration of a tower, completed by the defaults. `*_config_dict`, of old
    files, replaces all of it."""
    found = DEFAULTS[kind][part] | {"layer_norm_eps": EPSILON[kind]}
    if kind == "clip" and config.get(f"{part}_dict"):
        return {**(config.get(part) or {}), **found, **config[f"{part}_dict"]}
    return found | (config.get(part) or {})


def facts_of_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Returns the fields of `CLIPConfig` that transformers' configuration gives.

    Raises:
        ValueError: it is the configuration of another model, or has an unknown activation.
    """
    if config.get("model_type") != kind:
        raise ValueError(
            f"the configuration must have model_type {kind!r}, got {config.get('model_type')!r}"
        )
    found: dict[str, Any] = {}
    for tower, part in (("image", "vision_config"), ("text", "text_config")):
        values = part_of_config(config, kind, part)
        act = values["hidden_act"]
        if act not in ACTIVATION:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATION)}, got {act!r}")
        found |= {
            f"{tower}_heads": values["num_attention_heads"],
            f"{tower}_activation": ACTIVATION[act],
            f"{tower}_eps": values["layer_norm_eps"],
            **{ours: values[name] for name, ours in SIZES[part].items() if name in values},
        }
        if part == "text_config" and kind == "clip":
            end = values["eos_token_id"]
            # transformers takes 2, which old files have by mistake, for the highest id.
            found |= {"text_pool": "highest"} if end == 2 else {"text_pool": "end", "end_id": end}
    return found


def facts(state: State, config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what shapes and rules tell, and what the configuration tells."""
    siglip = is_siglip(state)
    found = sizes(state, IMAGE, TEXT, class_token=not siglip)
    head = "text_model.head.weight" if siglip else "visual_projection.weight"
    if head not in state:
        raise ValueError(f"cannot tell the sizes of the model: missing keys: {head}")
    found |= {"embed_dim": state[head].shape[0], **logits(state), **rules.heads(found)}
    if siglip:
        found |= {
            **rules.HALVES, "image_pool": "attention", "image_projection": "none",
            "text_projection": "biased", "image_activation": "gelu_tanh",
            "text_activation": "gelu_tanh", "image_eps": 1e-6, "text_eps": 1e-6,
            "text_pool": "last", "causal": False,
        }  # fmt: skip
    else:
        found |= {
            **rules.OPENAI, **rules.text_of_clip(found), "class_token": True, "patch_bias": False,
            "image_norm_first": True, "image_pool": "class", "causal": True,
        }  # fmt: skip
    if config is None:
        return found, {}
    kind = "siglip" if siglip else "clip"
    told, preprocessor = facts_of_config(config, kind), config.get("preprocessor") or {}
    return found, told | facts_of_preprocessor(preprocessor, kind, found["image_size"])


def sources(config: CLIPConfig, state: State) -> dict[str, Source]:
    found = common_sources(config, IMAGE, TEXT)
    if is_siglip(state):
        head = "vision_model.head"
        found["image_pool.query"] = one(f"{head}.probe")
        for word in ("weight", "bias"):
            found[f"image_pool.qkv.{word}"] = one(f"{head}.attention.in_proj_{word}")
        for ours, theirs in (
            ("out", "attention.out_proj"), ("norm", "layernorm"), ("up", "mlp.fc1"),
            ("down", "mlp.fc2"),
        ):  # fmt: skip
            found |= pair(f"image_pool.{ours}", f"{head}.{theirs}.{{}}")
        return found | pair("text_projection", "text_model.head.{}")
    found["image_tower.class_token"] = one("vision_model.embeddings.class_embedding")
    found |= pair("image_tower.norm_first", "vision_model.pre_layrnorm.{}")  # their spelling
    found["image_projection.weight"] = joined("visual_projection.weight")
    found["text_projection.weight"] = joined("text_projection.weight")
    return found
