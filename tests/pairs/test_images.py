"""Images become squares of the model's size: modes, transparency, orientation, crops."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastclip.pairs.images import Augmentation, Images, decode, in_processes, load_image, middle
from fastclip.pairs.pair import Place


def file(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def colour(data: bytes) -> list[int]:
    """Returns the colour of an image of one colour."""
    pixels = decode(data, 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert (pixels == pixels[:, :1, :1]).all()
    return pixels[:, 0, 0].tolist()


def test_every_mode_becomes_rgb_on_white() -> None:
    size = (20, 12)
    assert colour(file(Image.new("RGB", size, (10, 20, 30)))) == [10, 20, 30]
    assert colour(file(Image.new("L", size, 7))) == [7, 7, 7]
    assert colour(file(Image.new("1", size, 1))) == [255, 255, 255]
    assert colour(file(Image.new("RGBA", size, (0, 0, 0, 0)))) == [255, 255, 255]
    assert colour(file(Image.new("RGBA", size, (0, 100, 255, 51)))) == [204, 224, 255]
    assert colour(file(Image.new("LA", size, (0, 0)))) == [255, 255, 255]
    palette = Image.new("P", size, 0)
    palette.putpalette([9, 8, 7, 6, 5, 4])
    assert colour(file(palette)) == [9, 8, 7]
    assert colour(file(palette, transparency=0)) == [255, 255, 255]
    deep = Image.fromarray(np.full(size, 0x1234, np.uint16))
    assert deep.mode == "I;16" and colour(file(deep)) == [0x12, 0x12, 0x12]
    cmyk = colour(file(Image.new("CMYK", size, (255, 0, 0, 0)), "JPEG"))
    assert cmyk[0] < 30 and min(cmyk[1:]) > 220


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image


def test_the_middle_is_cut_out_and_orientation_is_followed() -> None:
    side = decode(file(Image.new("RGB", (60, 20)).convert("L").convert("RGB")), 4)
    assert side.shape == (3, 4, 4)
    assert middle(60, 20) == ((20, 0, 40, 20), False)
    assert middle(20, 61) == ((0, 20.5, 20, 40.5), False)
    upright = decode(file(halves()), 8)
    assert upright[0, :, 0].min() > 200 > 50 > upright[0, :, -1].max()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left side comes up
    turned = decode(file(halves(), exif=exif), 8)
    assert turned[0, 0].min() > 200 > 50 > turned[0, -1].max()


def test_a_large_jpeg_is_the_same_shrunk_by_its_decoder() -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (512, 1))] * 3, axis=2))
    jpeg, png = decode(file(image, "JPEG", quality=95), 16), decode(file(image), 16)
    assert (jpeg.int() - png.int()).abs().max() <= 3


def test_a_crop_depends_on_its_key_alone() -> None:
    augmentation = Augmentation(0.5)
    boxes = {key: augmentation.crop(key)(60, 40) for key in ("0 0 a", "0 0 b", "0 1 a", "1 0 a")}
    assert len({box for box, _ in boxes.values()}) == 4
    assert augmentation.crop("0 0 a")(60, 40) == boxes["0 0 a"]
    ratios = set()
    for k in range(200):
        (left, top, right, bottom), flipped = augmentation.crop(f"{k}")(60, 40)
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40 and not flipped
        assert 0.43 <= (right - left) * (bottom - top) / 1600 <= 1 + 1e-9
        ratios.add((right - left) / (bottom - top))
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4
    (left, top, right, bottom), _ = Augmentation(1.0).crop("x")(40, 40)
    assert (left, top, right, bottom) == pytest.approx((0, 0, 40, 40))
    flips = sum(Augmentation(1.0, flip=True).crop(f"{k}")(9, 9)[1] for k in range(200))
    assert 70 < flips < 130
    key = next(f"{k}" for k in range(9) if Augmentation(1.0, flip=True).crop(f"{k}")(9, 9)[1])
    plain, mirrored = (
        decode(file(halves((40, 40))), 8, Augmentation(1.0, flip).crop(key))
        for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(2)) and not torch.equal(mirrored, plain)


def test_processes_yield_what_this_one_does(tmp_path) -> None:
    places = []
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(file(halves((30 + k, 20))))
        places.append(Place(str(tmp_path / f"{k}.png")))
    images = Images(places, 8, Augmentation(0.5))
    keys = [[(0, "a"), (1, "b")], [(2, ""), (3, "c")], [(5, "d")]]
    here, there = (list(in_processes(images, keys, processes)) for processes in (0, 2))
    assert [len(part) for part in here] == [2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(here[1][0], Images(places, 8)[2, ""])
    assert not torch.equal(here[0][0], Images(places, 8)[0, ""])
    assert not torch.equal(here[0][0], images[0, "b"])
    loaded = load_image(places[2].file, 8)
    assert loaded.min() == -1 and loaded.max() == 1
    assert torch.equal(((loaded + 1) * 127.5).round().byte(), here[1][0])
