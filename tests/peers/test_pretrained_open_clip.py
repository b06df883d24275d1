"""Weights of open_clip and OpenAI: the loaded model has the original's features."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.peers import peer
from support.pretrained import (
    NATIVE,
    SIGLIP_TEXT,
    VOCABULARY,
    assert_same_features,
    open_clip_model,
    siglip_config,
)
from torch import nn

from fastclip.clip import CLIP, load_pretrained
from fastclip.clip.pretrained import rules
from fastclip.clip.pretrained.open_clip_config import TIMM, facts_of_config

HEADS = {"image_heads": 3, "text_heads": 5}


def same(ours: CLIP, theirs: nn.Module, end: int = VOCABULARY - 1) -> None:
    assert_same_features(
        ours, theirs, lambda model, x: model.encode_image(x),
        lambda model, tokens: model.encode_text(tokens), end,
    )  # fmt: skip


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_native_models(custom: bool, quick: bool, tmp_path: Path) -> None:
    theirs = open_clip_model(NATIVE, custom, quick_gelu=quick)
    act = "quick_gelu" if quick else "gelu"
    told = {"activation": act, "text_pool": "highest", "causal": True, **HEADS}
    same(load_pretrained(theirs.state_dict(), **told), theirs)
    # A training checkpoint of a wrapped model; a folder with a configuration.
    wrapped = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, tmp_path / "epoch_3.pt")
    same(load_pretrained(tmp_path / "epoch_3.pt", **told), theirs)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": NATIVE | {"quick_gelu": quick, "custom_text": custom}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    same(load_pretrained(tmp_path), theirs)


@pytest.mark.parametrize(
    ("vision", "text", "model"),
    [
        ({}, {"pool_type": "eos", "eos_id": 7}, {}),
        ({}, {"act_kwargs": {"approximate": "tanh"}}, {"init_logit_bias": -10.0}),
        ({"mlp_ratio": 4.3637, "head_width": 24}, {"norm_kwargs": {"eps": 1e-3}}, {}),
        # CLIPA
        (
            {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
            {"pool_type": "last", "no_causal_mask": True},
            {"nonscalar_logit_scale": True},
        ),
        ({"pool_type": "avg", "patch_dropout": 0.5, "pos_embed_type": "sin_cos_2d"}, {}, {}),
    ],
)
def test_options_of_native_models(
    vision: dict[str, Any], text: dict[str, Any], model: dict[str, Any]
) -> None:
    config = copy.deepcopy(NATIVE)
    config["vision_cfg"] |= vision
    config["text_cfg"] |= text
    theirs = open_clip_model(config, **model)
    same(load_pretrained(theirs.state_dict(), config=config), theirs, text.get("eos_id", 98))


@pytest.mark.parametrize(
    "text", [{}, {"act_kwargs": {"approximate": "tanh"}}, {"proj_type": "none"}]
)
def test_siglip_models(text: dict[str, Any]) -> None:
    config = siglip_config(**text)
    theirs = open_clip_model(config, custom=True, init_logit_bias=-10.0)
    ours = load_pretrained(theirs.state_dict(), config=config)
    same(ours, theirs)
    assert ours.config.image_mean == (0.5, 0.5, 0.5)
    act = "gelu_tanh" if "act_kwargs" in text else "gelu"
    told = {"text_activation": act, "text_pool": "last", "causal": False, "text_eps": 1e-6}
    if "proj_type" in text:
        told["text_projection"] = "none"
    same(load_pretrained(theirs.state_dict(), image_heads=12, text_heads=4, **told), theirs)


def test_a_timm_tower_with_a_projection() -> None:
    config = siglip_config() | {"embed_dim": 20}
    config["vision_cfg"] |= {"timm_proj": "linear"}
    theirs = open_clip_model(config, custom=True)
    same(load_pretrained(theirs.state_dict(), config=config), theirs)


def openai_state(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict as OpenAI's archives hold it: half precision, three numbers."""
    peer("open_clip.model").convert_weights_to_fp16(theirs)
    numbers = {"input_resolution": 32, "context_length": 12, "vocab_size": VOCABULARY}
    return theirs.state_dict() | {key: torch.tensor(value) for key, value in numbers.items()}


class Archive(nn.Module):
    """A tree of modules with the tensors of a state dict under their names."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            first, _, rest = key.partition(".")
            if rest:
                parts.setdefault(first, {})[rest] = value
            else:
                self.register_buffer(key, value)
        for name, part in parts.items():
            self.add_module(name, Archive(part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_openai_weights(tmp_path: Path) -> None:
    config = copy.deepcopy(NATIVE)
    config["vision_cfg"] |= {"width": 128, "head_width": 64}
    config["text_cfg"] |= {"width": 64, "heads": 1}
    theirs = open_clip_model(config, quick_gelu=True)
    state = openai_state(theirs)
    assert state["visual.proj"].dtype == torch.float16
    torch.save(state, tmp_path / "state.pt")
    torch.jit.script(Archive(state)).save(tmp_path / "ViT.pt")
    same_as = theirs.float()  # the rounded weights
    for source in (state, tmp_path / "state.pt", tmp_path / "ViT.pt"):
        ours = load_pretrained(source)
        assert ours.image_projection.weight.dtype == torch.float32
        assert ours.config.image_mean == rules.OPENAI["image_mean"]
        same(ours, same_as)
    half = load_pretrained(state, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    with pytest.raises(ValueError, match="vocab_size must be the shapes' vocab_size, 99, got 98"):
        load_pretrained(state | {"vocab_size": torch.tensor(98)})


def test_rules_are_those_of_the_published_configurations() -> None:
    """Loads no weights: reads every configuration that open_clip ships."""
    folder = Path(peer("open_clip").__file__).parent / "model_configs"
    read = 0
    for path in sorted(folder.glob("*.json")):
        config = json.loads(path.read_text())
        try:
            told = facts_of_config(config)
        except (ValueError, KeyError):
            continue
        if "embed_cls" in config["text_cfg"] or "multimodal_cfg" in config:
            continue
        read += 1
        name = config["vision_cfg"].get("timm_model_name", "")
        widths = {"base": 768, "large": 1024, "so400m": 1152, "giantopt": 1536}
        size = name.split("_")[1] if name else ""
        told.setdefault("image_width", widths.get(size))
        ruled = rules.heads(told)
        assert ruled == {key: told[key] for key in ruled}, path.name
        assert len(ruled) == 2, path.name
        if size:
            assert TIMM[size][0] == told["image_heads"]
            act = rules.SIGLIP_TEXT_ACTIVATION[told["vocab_size"]]
            assert (act, "last", False) == tuple(
                told[key] for key in ("text_activation", "text_pool", "causal")
            )
        elif told["vocab_size"] == rules.CLIP_VOCABULARY:
            assert (told["text_pool"], told["causal"]) == ("highest", True)
            assert told["image_pool"] == "class"
    assert read > 50


def test_the_heads_of_timm_are_its_own() -> None:
    timm = peer("timm")
    for size, (heads, act) in TIMM.items():
        patch = 14 if size == "so400m" else 16
        side = 256 if size in ("large", "giantopt") else 224
        name = f"vit_{size}_patch{patch}_siglip_{side}"
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        block = model.blocks[0]
        assert block.attn.num_heads == model.attn_pool.num_heads == heads
        assert block.norm1.eps == model.attn_pool.norm.eps == 1e-6
        expected = {"gelu": ("GELU", None), "gelu_tanh": ("GELUTanh", None)}[act][0]
        assert type(block.mlp.act).__name__ == type(model.attn_pool.mlp.act).__name__ == expected


def test_an_unsupported_open_clip_model_is_named() -> None:
    config = copy.deepcopy(NATIVE)
    config["vision_cfg"] |= {"ls_init_value": 1e-4}
    theirs = open_clip_model(config)
    with pytest.raises(ValueError, match=r"unsupported options: vision_cfg.ls_init_value=0.0001"):
        load_pretrained(theirs.state_dict(), config=config)
    told = {"activation": "gelu", "text_pool": "highest", "causal": True, **HEADS}
    with pytest.raises(ValueError, match=r"unknown keys: visual.*ls_1.gamma"):
        load_pretrained(theirs.state_dict(), **told)
    assert SIGLIP_TEXT["pool_type"] == "last"
