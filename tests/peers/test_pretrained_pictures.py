"""Pictures are those of transformers' image processors, apart from where an odd margin is cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.peers import peer

from fastclip.clip import CLIPConfig, pictures
from fastclip.clip.pretrained import rules
from fastclip.clip.pretrained.preprocessing import facts_of_preprocessor


def save_picture(path: Path, size: tuple[int, int]) -> Image.Image:
    torch.manual_seed(0)
    colours = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), size[::-1], mode="bicubic")
    pixels = (colours[0].clamp(0, 1) * 255).byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    image.save(path)
    return image


def processor_of(kind: str, **options: Any) -> Any:
    name = kind.lower()
    module = peer(f"transformers.models.{name}.image_processing_pil_{name}")
    square = {"height": 32, "width": 32}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": square} if kind == "CLIP" else {
        "size": square
    }  # fmt: skip
    return getattr(module, f"{kind}ImageProcessorPil")(**sizes, **options)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(64, 48), (31, 90), (32, 32), (33, 200)])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_pictures_of_transformers(
    kind: str, size: tuple[int, int], resample: int, tmp_path: Path
) -> None:
    image = save_picture(tmp_path / "a.png", size)
    processor = processor_of(kind, resample=resample)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    config = CLIPConfig(image_size=32, **facts_of_preprocessor(stored, kind.lower(), 32))
    ours = pictures.read(tmp_path / "a.png", config)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-5)
    rule = rules.OPENAI if kind == "CLIP" else rules.HALVES
    assert config == CLIPConfig(
        image_size=32, image_interpolation=config.image_interpolation, **rule
    )


def test_transformers_cuts_off_half_a_pixel_of_an_odd_margin(tmp_path: Path) -> None:
    image = save_picture(tmp_path / "a.png", (35, 32))
    expected = processor_of("CLIP")(image, return_tensors="pt").pixel_values[0].float()
    ours = pictures.read(tmp_path / "a.png", CLIPConfig(image_size=32, **rules.OPENAI))
    torch.testing.assert_close(ours[:, :, :-1], expected[:, :, 1:], rtol=1e-5, atol=1e-5)
