"""open_clip's state dicts: native ViTs, and SigLIP's, whose image tower is timm's ViT.

Texts lie at the top (`CLIP`) or under `text.` (`CustomTextCLIP`).
"""

from typing import Any

from ..config import CLIPConfig
from . import rules
from .keys import Source, State, one, pair
from .layout import TowerKeys, common_sources, logits, sizes
from .open_clip_config import facts_of_config

NAME = "an open_clip model with a ViT"
CONFIG = "open_clip_config.json"
# Masks that some versions store.
HARMLESS = (r"(text\.|visual\.)?attn_mask",)

NATIVE_BLOCK = {
    "norm_1": "ln_1.{}", "qkv": "attn.in_proj_{}", "out": "attn.out_proj.{}",
    "norm_2": "ln_2.{}", "up": "mlp.c_fc.{}", "down": "mlp.c_proj.{}",
}  # fmt: skip
TIMM_BLOCK = {
    "norm_1": "norm1.{}", "qkv": "attn.qkv.{}", "out": "attn.proj.{}",
    "norm_2": "norm2.{}", "up": "mlp.fc1.{}", "down": "mlp.fc2.{}",
}  # fmt: skip
NATIVE = TowerKeys(
    "visual.conv1.{}", "visual.positional_embedding", "visual.transformer.resblocks",
    NATIVE_BLOCK, "visual.ln_post.{}",
)  # fmt: skip
TIMM = TowerKeys(
    "visual.trunk.patch_embed.proj.{}", "visual.trunk.pos_embed", "visual.trunk.blocks",
    TIMM_BLOCK, "visual.trunk.norm.{}",
)  # fmt: skip


def is_timm(state: State) -> bool:
    return any(key.startswith("visual.trunk.") for key in state)


def prefix(state: State) -> str:
    return "text." if any(key.startswith("text.") for key in state) else ""


def text_keys(state: State) -> TowerKeys:
    at = prefix(state)
    return TowerKeys(
        f"{at}token_embedding.{{}}", f"{at}positional_embedding", f"{at}transformer.resblocks",
        NATIVE_BLOCK, f"{at}ln_final.{{}}",
    )  # fmt: skip


def projections(state: State) -> dict[str, str]:
    """Returns which projections there are. A missing one counts as linear, and its key is then
    reported, unless the configuration says that there is none."""
    text = f"{prefix(state)}text_projection"
    found = {"text_projection": "biased" if f"{text}.bias" in state else "linear"}
    if is_timm(state):
        head = "visual.head.proj"
        found["image_projection"] = "none"
        if f"{head}.weight" in state:
            found["image_projection"] = "biased" if f"{head}.bias" in state else "linear"
    return found


def embed_dim(state: State, found: dict[str, Any]) -> int:
    """Returns the width of the shared space, as far as the keys of a projection tell it."""
    text = f"{prefix(state)}text_projection"
    for key, dim in (
        ("visual.proj", 1), ("visual.head.proj.weight", 0), (text, 1), (f"{text}.weight", 0)
    ):  # fmt: skip
        if key in state and state[key].dim() == 2:
            return state[key].shape[dim]
    return found["image_width"] if is_timm(state) else found["text_width"]


def facts(state: State, config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what shapes and rules tell, and what the configuration tells."""
    timm = is_timm(state)
    found = sizes(state, TIMM if timm else NATIVE, text_keys(state), class_token=not timm)
    found |= {"embed_dim": embed_dim(state, found), **logits(state), **projections(state)}
    found |= rules.heads(found)
    if timm:
        found |= {
            **rules.HALVES, "image_pool": "attention", "image_eps": 1e-6,
            "image_activation": "gelu_tanh" if found["image_width"] == 1536 else "gelu",
        }  # fmt: skip
        if found["vocab_size"] in rules.SIGLIP_TEXT_ACTIVATION and prefix(state):
            activation = rules.SIGLIP_TEXT_ACTIVATION[found["vocab_size"]]
            found |= {"text_activation": activation, "text_eps": 1e-6}
            found |= {"text_pool": "last", "causal": False}
    else:
        norm_first = "visual.ln_pre.weight" in state
        found |= {
            **rules.OPENAI, **rules.text_of_clip(found), "class_token": True, "patch_bias": False,
            "image_norm_first": norm_first,
        }  # fmt: skip
        if norm_first:  # CLIPA pools otherwise, and has no such norm
            found["image_pool"] = "class"
    return found, {} if config is None else facts_of_config(config)


def sources(config: CLIPConfig, state: State) -> dict[str, Source]:
    timm, at = is_timm(state), prefix(state)
    found = common_sources(config, TIMM if timm else NATIVE, text_keys(state))
    if timm:
        pool = "visual.trunk.attn_pool"
        found["image_pool.query"] = one(f"{pool}.latent")
        for word in ("weight", "bias"):
            keys = (f"{pool}.q.{word}", f"{pool}.kv.{word}")
            found[f"image_pool.qkv.{word}"] = Source(keys, (1, 2))
        for ours, theirs in (
            ("out", "proj"), ("norm", "norm"), ("up", "mlp.fc1"), ("down", "mlp.fc2")
        ):  # fmt: skip
            found |= pair(f"image_pool.{ours}", f"{pool}.{theirs}.{{}}")
        if config.image_projection != "none":
            found |= pair("image_projection", "visual.head.proj.{}")
    else:
        found["image_tower.class_token"] = one("visual.class_embedding")
        if config.image_norm_first:
            found |= pair("image_tower.norm_first", "visual.ln_pre.{}")
        found["image_projection.weight"] = Source(("visual.proj",), transposed=True)
    if config.text_projection != "none":
        key = f"{at}text_projection"
        if f"{key}.weight" in state or config.text_projection == "biased":
            found |= pair("text_projection", f"{key}.{{}}")
        else:
            found["text_projection.weight"] = Source((key,), transposed=True)
    for projection in ("image_projection", "text_projection"):
        if getattr(config, projection) != "biased":
            found.pop(f"{projection}.bias", None)
    return found
