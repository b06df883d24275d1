"""How a model takes pictures is read from other libraries' files; unsupported options are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastclip.clip import CLIPConfig, pictures
from fastclip.clip.pretrained.open_clip_config import facts_of_config
from fastclip.clip.pretrained.preprocessing import facts_of_preprocessor
from fastclip.clip.pretrained.transformers import part_of_config

SQUARE = {"height": 32, "width": 32}
# As published: of OpenAI's models, of open_clip's in transformers' form, of SigLIP 2.
OPENAI = {
    "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4], "resample": 3, "size": 32,
}  # fmt: skip
NEWER = OPENAI | {"crop_size": SQUARE, "size": {"shortest_edge": 32}, "do_convert_rgb": True}
SIGLIP = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor",
    "resample": 2, "rescale_factor": 0.00392156862745098, "size": SQUARE,
    "_valid_processor_keys": ["images"],
}  # fmt: skip


def test_published_preprocessors_of_transformers() -> None:
    told = {"image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4)}
    told |= {"image_interpolation": "bicubic", "image_resize": "crop"}
    assert facts_of_preprocessor(OPENAI, "clip", 32) == told
    assert facts_of_preprocessor(NEWER, "clip", 32) == told
    squash = {"image_interpolation": "bilinear", "image_resize": "squash"}
    assert facts_of_preprocessor(SIGLIP, "siglip", 32) == squash
    assert facts_of_preprocessor({"size": 32}, "siglip", 32) == {"image_resize": "squash"}
    assert facts_of_preprocessor({"size": 32}, "clip", 32) == {"image_resize": "crop"}
    assert facts_of_preprocessor({"size": SQUARE}, "clip", 32) == {"image_resize": "squash"}
    assert facts_of_preprocessor({}, "clip", 32) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 0}, "with a side of 32: resample=0$"),
        ({"do_normalize": False}, "32: do_normalize=False$"),
        ({"do_rescale": False, "do_resize": None}, "32: do_resize=None, do_rescale=False$"),
        ({"rescale_factor": 1 / 127.5}, "32: rescale_factor=0.0078"),
        (
            {"size": {"shortest_edge": 48}},
            r"32: size=\{'shortest_edge': 48\}, do_center_crop=True$",
        ),
        ({"size": {"longest_edge": 32}}, r"32: size=\{'longest_edge': 32\}"),
        ({"size": 48}, "32: size=48"),
        ({"size": [[32], {}], "resample": [3]}, r"32: resample=\[3\], size=\[\[32\], \{\}\]"),
        ({"crop_size": 48}, "32: crop_size=48$"),
        ({"do_center_crop": False}, r"32: size=\{'shortest_edge': 32\}, do_center_crop=False$"),
        ({"do_pad": True, "new": 1}, "32: do_pad=True, new=1$"),
    ],
)
def test_unsupported_options_of_transformers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"preprocessor_config.json has unsupp.* {message}"):
        facts_of_preprocessor(NEWER | changes, "clip", 32)


def open_clip(**preprocess: Any) -> dict[str, Any]:
    towers = {"vision_cfg": {"image_size": 32}, "text_cfg": {}}
    found = facts_of_config({"model_cfg": towers, "preprocess_cfg": preprocess})
    names = ("image_mean", "image_std", "image_interpolation", "image_resize")
    return {name: found[name] for name in names if name in found}


def test_preprocessing_of_open_clip() -> None:
    assert open_clip() == {}
    clipa = {
        "size": [32, 32], "mode": "RGB", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 5,
    }  # fmt: skip
    assert open_clip(**clipa) == {
        "image_mean": (0.4, 0.5, 0.6), "image_std": (0.2, 0.3, 0.4),
        "image_interpolation": "bilinear", "image_resize": "squash",
    }  # fmt: skip
    assert open_clip(resize_mode="shortest", size=32) == {"image_resize": "crop"}
    for name, value in (
        ("size", 64), ("size", [32, 48]), ("mode", "L"), ("interpolation", "random"),
        ("resize_mode", "longest"), ("resize_mode", ["squash"]), ("pad", 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"preprocess_cfg has unsupported .* 32: {name}="):
            open_clip(**{name: value})


def test_a_repeated_configuration_of_transformers_replaces_the_first() -> None:
    for first in (None, {}, {"hidden_act": "gelu", "num_hidden_layers": 3}):
        config = {"text_config": first, "text_config_dict": {"num_attention_heads": 5}}
        found = part_of_config(config, "clip", "text_config")
        assert (found["num_attention_heads"], found["hidden_act"]) == (5, "quick_gelu")
        assert found.get("num_hidden_layers") == (first or {}).get("num_hidden_layers")


def test_an_odd_margin_is_cut_as_by_torchvision(tmp_path: Path) -> None:
    """torchvision rounds a margin of 1.5 pixels to 2 and one of 2.5 to 2; transformers cuts both
    off."""
    torch.manual_seed(0)
    config = CLIPConfig(image_size=16, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    for width, left in ((19, 2), (21, 2), (17, 0)):
        pixels = torch.randint(0, 256, (16, width, 3), dtype=torch.uint8)
        for turned, name in ((pixels, "wide.png"), (pixels.transpose(0, 1), "high.png")):
            Image.fromarray(turned.contiguous().numpy()).save(tmp_path / name)
        middle = pixels[:, left : left + 16] / 255
        wide = pictures.read(tmp_path / "wide.png", config)
        assert torch.equal(wide, middle.permute(2, 0, 1))
        assert torch.equal(pictures.read(tmp_path / "high.png", config), wide.transpose(1, 2))


def test_pictures_are_resized_with_the_models_filter(tmp_path: Path) -> None:
    image = Image.new("L", (64, 64))
    image.paste(255, (20, 0, 64, 64))
    image.save(tmp_path / "edge.png")
    found = {}
    for way in ("bicubic", "bilinear"):
        config = CLIPConfig(image_size=16, image_interpolation=way)
        found[way] = pictures.read(tmp_path / "edge.png", config)[0, 8] * 127.5 + 127.5
        expected = image.resize((16, 16), Image.Resampling[way.upper()]).crop((0, 8, 16, 9))
        assert found[way].round().byte().tolist() == list(expected.tobytes())
    assert not torch.equal(found["bicubic"], found["bilinear"])
