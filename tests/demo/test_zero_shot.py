"""`python -m fastclip.zero_shot`: the table, its files, one-line errors; pictures, tokenizers."""

import csv
import gzip
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fastclip import zero_shot
from fastclip.clip import CLIP, CLIPConfig, Tokenizer, pictures
from fastclip.clip.byte_pairs import SPECIAL
from fastclip.clip.cleaning import CLEANING
from fastclip.clip.pretrained import MissingOptions
from fastclip.demo.emoji import TOKENIZER

CONFIG = CLIPConfig(
    embed_dim=8, image_size=16, image_width=8, image_heads=2, image_layers=1, text_width=8,
    text_heads=2, vocab_size=1536,
)  # fmt: skip
LABELS = ["cat", "red car", "dog"]


def saved(folder: Path, config: CLIPConfig) -> CLIP:
    torch.manual_seed(3)
    model = CLIP(config).eval()
    model.save(folder / "clip.safetensors")
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with three pictures, one of them below, and a file that is none."""
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.JPG", "below/c.webp")):
        colours = torch.randint(0, 256, (20 + 7 * k, 30, 3), dtype=torch.uint8)
        Image.fromarray(colours.numpy()).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "bad.png").write_text("no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("not looked at")
    return tmp_path


def run(folder: Path, *options: str) -> None:
    zero_shot.main(
        ["--weights", str(folder / "clip.safetensors"), "--tokenizer", str(TOKENIZER),
         "--images", str(folder / "pictures"), "--labels", ", ".join(LABELS), *options]
    )  # fmt: skip


@pytest.mark.parametrize("bias", [None, -2.0])
def test_the_table_has_the_models_probabilities(
    bias: float | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved(folder, replace(CONFIG, bias=bias))
    templates = ["a photo of a {}", "{}!"]
    run(folder, "--template", *templates, "--top", "2", "--csv", str(folder / "t.csv"),
        "--json", str(folder / "t.json"))  # fmt: skip
    out = capsys.readouterr()
    tokenizer = Tokenizer(TOKENIZER)
    files = [folder / "pictures" / name for name in ("a.png", "b.JPG", "below/c.webp")]
    with torch.no_grad():
        text = torch.stack([
            model.encode_text(tokenizer.encode([t.format(name) for t in templates], 24)).mean(0)
            for name in LABELS
        ])  # fmt: skip
        images = torch.stack([pictures.read(file, CONFIG) for file in files])
        logits = model.encode_image(images) @ normalize(text, dim=1).T * model.logit_scale.exp()
        p = logits.softmax(1) if bias is None else (logits + bias).sigmoid()
    assert bool((p.sum(1) - 1).abs().max() < 1e-5) == (bias is None)
    lines = out.out.splitlines()
    rows = list(csv.DictReader((folder / "t.csv").open()))
    found = json.loads((folder / "t.json").read_text())
    assert len(lines) == 3 and len(rows) == 6
    for k, (file, line, row) in enumerate(zip(files, lines, p.tolist(), strict=True)):
        best = sorted(zip(row, LABELS, strict=True), reverse=True)[:2]
        expected = "  ".join(f"{100 * v:5.1f} % {label}" for v, label in best)
        assert line.split("  ", 1) == [str(file), line.split("  ", 1)[1]]
        assert line.endswith(expected)
        assert [r["label"] for r in rows[2 * k : 2 * k + 2]] == [label for _, label in best]
        assert float(rows[2 * k]["probability"]) == pytest.approx(best[0][0], abs=1e-6)
        assert found["predictions"][k]["labels"][1]["label"] == best[1][1]
    bad = str(folder / "pictures" / "bad.png")
    assert found["unreadable"] == [bad]
    assert f"not a readable picture: {bad} (" in out.err
    assert out.err.endswith("1 of 4 files are no pictures\n")


def test_labels_in_a_file_and_normalisation(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(folder, CONFIG)
    (folder / "labels.txt").write_text("cat\n\n  red car \ndog\n", encoding="utf-8-sig")
    run(folder)
    plain = capsys.readouterr().out
    run(folder, "--labels", str(folder / "labels.txt"))
    assert capsys.readouterr().out == plain
    run(folder, "--mean", "0.1,0.2,0.3", "--std", "1,1,1", "--resize", "squash")
    assert capsys.readouterr().out != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", " , "], "--labels must name labels or a file of them, got ' , '"),
        (["--labels", "cat, dog, cat"], "labels must differ, got twice: cat"),
        (["--images", "absent"], "no such file or folder: absent"),
        (["--weights", "absent"], "no such file or folder: absent"),
        (["--template", "no label"], "argument --template: must hold {} for the label, got"),
        (["--template", "{} {0}"], "argument --template: must hold {} for the label, got"),
        (["--top", "0"], "argument --top: must be at least 1, got 0"),
        (["--mean", "1,2"], "argument --mean: must be three numbers, got 1,2"),
        (["--std", "1,0,1"], "image_std must be three positive numbers, got (1.0, 0.0, 1.0)"),
        (["--set", "heads"], "argument --set: must be NAME=VALUE, got heads"),
        (["--set", "heads=3"], "--set must be among activation, image_heads, "),
        (["--set", "dtype=float16"], ", image_resize, image_interpolation, got dtype"),
        (["--set", "config=x", "device=y"], "got config, device"),
        (["--template", "{.foo}"], "argument --template: must hold {} for the label, got '{.foo}'"),
        (["--template", "{[a]}"], "argument --template: must hold {} for the label, got '{[a]}'"),
        (["--labels", "lables.txt"], "--labels: no such file: lables.txt"),
        (["--labels", "files/labels"], "--labels: no such file: files/labels"),
        (["--labels", "."], "--labels must be a file, got a folder: ."),
        (["--labels", ""], "--labels must name labels or a file of them, got ''"),
        (["--csv", "/nonexistent/x.csv"], "--csv must be a file that can be written, got /nonexis"),
        (["--json", "/"], "--json must be a file that can be written, got /"),
        (["--mean", "inf,nan,0"], "image_mean must be three numbers, got (inf, nan, 0.0)"),
        (["--set", "image_heads=3"], "has its own configuration: give no options"),
        (["--device", "tpu9"], "cannot use device 'tpu9'"),
        (["--tokenizer", "absent.json"], "No such file or directory: 'absent.json'"),
    ],
)
def test_errors_are_one_line(
    options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(folder, CONFIG)
    with pytest.raises(SystemExit) as stopped:
        run(folder, *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("python -m fastclip.zero_shot: ") and error.count("\n") == 1


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(folder, *options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_errors_of_files_and_packages_name_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, CONFIG)
    latin = folder / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    assert f"{latin} must be UTF-8: 'utf-8' codec" in refused(
        folder, capsys, "--labels", f"{latin}"
    )
    lone = MissingOptions("open_clip", ["image_heads", "causal"])
    with monkeypatch.context() as patch:
        patch.setattr("fastclip.clip.pretrained.load_pretrained", raising(lone))
        error = refused(folder, capsys)
    assert "--config, or --set image_heads=... causal=..." in error and "(config=" not in error
    for module, package in (("tokenizers", "tokenizers"), ("PIL", "Pillow")):
        with monkeypatch.context() as patch:
            missing = ModuleNotFoundError(f"No module named {module!r}", name=module)
            patch.setattr("fastclip.zero_shot.classify", raising(missing))
            error = refused(folder, capsys)
        assert f"needs the package {package}: pip install {package}, or fastclip's extra" in error


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def stop(*args: object, **options: object) -> NoReturn:
        raise error

    return stop


def test_ctrl_c_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, CONFIG)
    monkeypatch.setattr("fastclip.zero_shot.predict", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as stopped:
        run(folder)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "python -m fastclip.zero_shot: interrupted\n"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_any_error_is_left_out_and_a_table_is_printed_before_it_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, CONFIG)
    odd = os.fsdecode(os.fsencode(folder / "pictures") + b"/\xff.png")
    Image.new("RGB", (9, 9)).save(odd)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # two have more than twice as many
    table, written = folder / "t.csv", folder / "t.json"
    run(folder, "--csv", f"{table}", "--json", f"{written}")
    out = capsys.readouterr()
    assert "b.JPG (Image size (810 pixels) exceeds limit" in out.err
    assert out.out.splitlines()[-1].startswith(f"{folder}/pictures/\\xff.png  ")
    assert "\\xff.png,1," in table.read_text(encoding="utf-8")
    assert json.loads(written.read_text(encoding="utf-8"))["predictions"][-1]["image"].endswith(
        "\\xff.png"
    )
    monkeypatch.setattr("fastclip.clip.predictions.write_csv", raising(OSError("disk full")))
    with pytest.raises(SystemExit):
        run(folder, "--csv", f"{table}")
    again = capsys.readouterr()
    assert again.out == out.out and again.err.endswith("disk full (--help lists the options)\n")


@pytest.mark.parametrize("options", [{"text_pool": "last"}, {"causal": False}, {}])
def test_texts_are_filled_for_models_that_see_the_padding(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(folder, replace(CONFIG, **options))
    fills = []
    encode = Tokenizer.encode

    def noted(self: Tokenizer, texts: Sequence[str], length: int, fill: bool = False) -> Tensor:
        fills.append(fill)
        return encode(self, texts, length, fill)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    run(folder)
    assert fills == [bool(options)] * len(LABELS)


def test_the_tokenizer_must_be_the_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder, replace(CONFIG, vocab_size=1600))
    with pytest.raises(SystemExit):
        run(folder)
    assert "must be the model's, of 1600 tokens, got one of 1536" in capsys.readouterr().err
    saved(folder, CONFIG)
    arguments = ["--weights", str(folder), "--images", str(folder), "--labels", "cat"]
    with pytest.raises(SystemExit):
        zero_shot.main(arguments)
    assert f"no tokenizer in {folder}: give the model's" in capsys.readouterr().err
    (folder / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    zero_shot.main(arguments)  # the one beside the weights
    out = capsys.readouterr()
    assert out.out.count("100.0 % cat") == 3 and f"tokenizer: {folder}" in out.err


def test_only_unreadable_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(folder, CONFIG)
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--images", str(folder / "pictures" / "bad.png"))
    assert stopped.value.code == 1
    assert "1 of 1 files are no pictures" in capsys.readouterr().err


def test_pictures_are_cropped_or_squashed(tmp_path: Path) -> None:
    """A picture of three equal stripes, 48 x 16."""
    stripes = torch.zeros(16, 48, 3, dtype=torch.uint8)
    for k in range(3):
        stripes[:, 16 * k : 16 * k + 16, k] = 255
    path = tmp_path / "stripes.png"
    Image.fromarray(stripes.numpy()).save(path)
    crop = pictures.read(path, CONFIG)
    assert torch.equal(crop, torch.tensor([-1.0, 1, -1])[:, None, None].expand(3, 16, 16))
    squash = pictures.read(path, replace(CONFIG, image_resize="squash", image_mean=(0, 0, 0)))
    assert squash[:, 8, [0, 8, 15]].round().tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.save(path)
    assert (pictures.read(path, CONFIG) == 1).all()  # white


def test_clips_tokenizer_from_a_file_of_merges(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('"title\nc a\nca t</w>\n')
    tokenizer = Tokenizer(path)
    cat = 512 + 1
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (514, 515, 0)
    ids = tokenizer.encode(["  CAT\tca", "cat " * 9, f"{SPECIAL[1]}"], 7)
    letters = [ord("a") - 33 + 256, 512]  # the end of a word, and the pair without one
    assert ids[0].tolist() == [514, cat, ord("c") - 33, letters[0], 515, 0, 0]
    assert ids[1].tolist() == [514, cat, cat, cat, cat, cat, 515]
    assert (ids[2] == 515).sum() == 1
    assert tokenizer.decode(ids[:2]) == ["cat ca", "cat cat cat cat cat"]
    assert tokenizer.encode(["cat"], 7, fill=True).shape == (1, 7)
    path.write_bytes(gzip.compress(b"title\na b c\n"))
    with pytest.raises(ValueError, match="must hold a title and pairs of tokens, got a b c"):
        Tokenizer(path)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json must hold a tokenizer, got"):
        Tokenizer(tmp_path)
    other = json.loads(TOKENIZER.read_text(encoding="utf-8").replace("<start>", "<begin>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"special tokens of one of: <start> <end>; <\|startoft"):
        Tokenizer(tmp_path)
    text = TOKENIZER.read_text(encoding="utf-8")
    for start, message in (("<s>", "special tokens of one of"), ("<x>", None)):
        (tmp_path / "tokenizer.json").write_text(
            text.replace("<start>", start).replace("<end>", "</s>"), encoding="utf-8"
        )
        if message is None:  # SigLIP's form
            assert Tokenizer(tmp_path).encode(["cat"], 9)[0, -1] == Tokenizer(tmp_path).end
            continue
        with pytest.raises(ValueError, match=message):  # XLM-R's, whose texts begin with <s>
            Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="clean must be one of clip, canonical, lower, none"):
        Tokenizer(TOKENIZER, clean="all")


def test_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CLEANING["clip"](" A  Photo,\tof\n a_CAT. ") == "a photo, of a_cat."
    assert CLEANING["canonical"](" A  Photo, of a_CAT's. ") == "a photo of a cats"
    assert CLEANING["lower"](" A  B.") == " a  b."
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"the package ftfy for 'caf.*', which is not pl"):
        CLEANING["clip"]("café")
