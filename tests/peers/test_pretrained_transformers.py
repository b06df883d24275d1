"""Weights of transformers' CLIPModel and SiglipModel: the loaded model has their features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peers import peer
from support.pretrained import LENGTH, SIZE, VOCABULARY, assert_same_features, disturb
from torch import nn

from fastclip.clip import CLIP, load_pretrained
from fastclip.clip.pretrained import rules

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 100, "num_hidden_layers": 2,
    "num_attention_heads": 5, "max_position_embeddings": LENGTH, "bos_token_id": 97,
}  # fmt: skip
IMAGE = {
    "hidden_size": 48, "intermediate_size": 90, "num_hidden_layers": 3, "num_attention_heads": 6,
    "image_size": SIZE, "patch_size": 8,
}  # fmt: skip


def clip_model(text: dict[str, Any], image: dict[str, Any]) -> nn.Module:
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | text, vision_config=IMAGE | image, projection_dim=24
    )
    return disturb(transformers.CLIPModel(config))


def siglip_model(text: dict[str, Any], image: dict[str, Any]) -> nn.Module:
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 48, **text}, vision_config=IMAGE | image
    )
    return disturb(transformers.SiglipModel(config))


def same(ours: CLIP, theirs: nn.Module, end: int = VOCABULARY - 1) -> None:
    assert_same_features(
        ours, theirs,
        lambda model, x: model.get_image_features(pixel_values=x).pooler_output,
        lambda model, tokens: model.get_text_features(input_ids=tokens).pooler_output, end,
    )  # fmt: skip


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, VOCABULARY - 1, 5])
def test_clip_model(act: str, end: int, tmp_path: Path) -> None:
    options = {"hidden_act": act, "layer_norm_eps": 1e-4}
    theirs = clip_model({**options, "eos_token_id": end}, options)
    theirs.save_pretrained(tmp_path)
    # The first token 5 ends a text; 2 means the highest id.
    ends = VOCABULARY - 1 if end == 2 else end
    same(load_pretrained(tmp_path), theirs, ends)
    assert load_pretrained(tmp_path / "model.safetensors").config.image_resize == "crop"
    told = {"activation": act, "image_heads": 6, "text_heads": 5, "text_eps": 1e-4}
    told |= {"text_pool": "highest"} if end != 5 else {"text_pool": "end", "end_id": 5}
    same(load_pretrained(theirs.state_dict(), image_eps=1e-4, **told), theirs, ends)


def test_old_files_of_clip_model(tmp_path: Path) -> None:
    """They store buffers, and their configuration repeats itself under `text_config_dict`."""
    theirs = clip_model({"hidden_act": "gelu", "eos_token_id": 2}, {"hidden_act": "gelu"})
    state = theirs.state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "pytorch_model.bin")
    config = {
        "model_type": "clip", "text_config": {"hidden_act": "quick_gelu"}, "vision_config": {},
        "text_config_dict": TEXT | {"hidden_act": "gelu"},
        "vision_config_dict": IMAGE | {"hidden_act": "gelu"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessor = {"size": 32, "do_center_crop": True, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    ours = load_pretrained(tmp_path)
    assert (ours.config.text_pool, ours.config.end_id) == ("end", 49407)
    assert ours.config.image_mean == (0.1, 0.2, 0.3)
    ours = load_pretrained(tmp_path, text_pool="highest")
    same(ours, theirs.half().float())


def test_siglip_model(tmp_path: Path) -> None:
    theirs = siglip_model({"layer_norm_eps": 1e-3}, {})
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    same(ours, theirs)
    assert (ours.config.image_resize, ours.config.image_std) == ("squash", (0.5, 0.5, 0.5))
    ours = load_pretrained(theirs.state_dict(), image_heads=6, text_heads=5, text_eps=1e-3)
    same(ours, theirs)
    ours.save(tmp_path / "own.safetensors")
    same(load_pretrained(tmp_path / "own.safetensors"), theirs)


def test_defaults_are_those_of_transformers() -> None:
    transformers = peer("transformers")
    from fastclip.clip.pretrained.transformers import facts_of_config

    for kind, config in (("clip", "CLIPConfig"), ("siglip", "SiglipConfig")):
        theirs = getattr(transformers, config)().to_dict()
        short = {"model_type": kind, "text_config": {}, "vision_config": {}}
        told = facts_of_config(theirs, kind)
        for key, value in facts_of_config(short, kind).items():
            assert told[key] == value, key
    assert told["image_heads"] == 768 // rules.IMAGE_HEAD_WIDTH[768]
