"""Opening an image file, and finding the files: the same for pictures of a model and for pairs."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.clip import CLIPConfig, pictures
from fastclip.clip.open_image import open_image
from fastclip.pairs.images import decode

DEEP = np.array([[0, 0xFF, 0x1FF, 0x1234], [0x80FF, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)


def file(image: Image.Image, form: str = "PNG", **options: object) -> io.BytesIO:
    written = io.BytesIO()
    image.save(written, form, **options)
    written.seek(0)
    return written


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("PPM", "I")])
def test_sixteen_bits_keep_the_upper_eight(form: str, mode: str) -> None:
    written = file(Image.fromarray(DEEP), form)
    assert Image.open(written).mode == mode
    image = open_image(written)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 1], DEEP >> 8)
    assert (decode(file(Image.new("I;16", (9, 9), 0x1234), form).getvalue(), 4) == 0x12).all()


@pytest.mark.parametrize(("mode", "value"), [("I", 7), ("F", 0.5)])
def test_thirty_two_bits_are_refused(mode: str, value: float, tmp_path: Path) -> None:
    data = file(Image.new(mode, (9, 9), value), "TIFF").getvalue()
    (tmp_path / "a.tiff").write_bytes(data)
    for read in (lambda: decode(data, 4), lambda: pictures.read(tmp_path / "a.tiff", CLIPConfig())):
        with pytest.raises(ValueError, match=rf"must have 8 or 16 bits, got 32 .* mode {mode}\)"):
            read()


@pytest.mark.parametrize("options", [{}, {"exif": 6}, {"alpha": 0}, {"alpha": 128}])
def test_a_model_is_scored_on_the_pixels_that_it_was_trained_on(
    options: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    exif = Image.Exif()
    if "exif" in options:
        exif[0x0112] = options["exif"]
    if "alpha" in options:
        image.putalpha(options["alpha"])
    image.save(tmp_path / "a.png", exif=exif)
    config = CLIPConfig(image_size=12, patch_size=4, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    trained = decode((tmp_path / "a.png").read_bytes(), 12)
    shown = pictures.read(tmp_path / "a.png", config)
    assert torch.equal((shown * 255).round().byte(), trained)
    if "exif" in options:  # the left side comes up
        upright = replace(config, image_size=24)
        turned = pixels.permute(2, 0, 1).rot90(-1, (1, 2)) / 255
        assert torch.equal(pictures.read(tmp_path / "a.png", upright), turned)


def test_folders_are_searched_for_pictures_once(tmp_path: Path) -> None:
    names = ["a.avif", "b/c.PNG", ".hidden.png", ".cache/d.png", "b/.trash/e.png", "f.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    seen = [tmp_path / "a.avif", tmp_path / "b/c.PNG"]
    assert pictures.find([tmp_path]) == seen
    again = [tmp_path / "b", tmp_path / "b" / ".." / "a.avif", seen[1]]
    assert pictures.find([tmp_path, *again]) == seen
    assert pictures.find([tmp_path / ".cache"]) == [tmp_path / ".cache" / "d.png"]
    assert pictures.find([tmp_path / ".hidden.png"]) == [tmp_path / ".hidden.png"]
