"""Pictures are those of transformers' image processors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.peers import peer

from fastclip.clip import CLIPConfig, pictures
from fastclip.clip.pretrained import rules


@pytest.mark.parametrize("size", [(64, 48), (31, 90), (32, 32), (33, 200)])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_pictures_of_transformers(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    colours = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), size[::-1], mode="bicubic")
    pixels = (colours[0].clamp(0, 1) * 255).byte().permute(1, 2, 0)
    image = Image.fromarray(pixels.numpy())
    image.save(tmp_path / "a.png")
    name = kind.lower()
    module = peer(f"transformers.models.{name}.image_processing_pil_{name}")
    square = {"height": 32, "width": 32}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": square} if kind == "CLIP" else {
        "size": square
    }  # fmt: skip
    processor = getattr(module, f"{kind}ImageProcessorPil")(**sizes)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    rule = rules.OPENAI if kind == "CLIP" else rules.HALVES
    ours = pictures.read(tmp_path / "a.png", replace(CLIPConfig(image_size=32), **rule))
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-5)
