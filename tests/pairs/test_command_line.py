"""The command line of a training on one's own pairs: mistakes are one line, help explains both."""

import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from support.exported_emoji import export
from support.pairs_task import TINY

from fastclip.train import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return export(tmp_path_factory.mktemp("emoji"), "csv")


def one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error of a command, which must be one line."""
    with pytest.raises(SystemExit) as stopped:
        main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith("python -m fastclip.train: ")
    return error


SOURCES = {
    "gone.csv": "pairs must be a file or a folder, got no such file or folder: FOLDER/gone.csv",
    "gone/deep/": "pairs must be a file or a folder, got no such file or folder: FOLDER/gone/deep/",
    "pairs.xml": "pairs must be a .csv, .tsv, .jsonl, .ndjson or .tar file or a folder of .avif, ",
    "{0..2}.tar": "tars must be files on this machine, missing: FOLDER/0.tar and 2 more",
    "no.tar": "FOLDER/no.tar must be an uncompressed tar",
    "empty": "pairs must hold an image with a caption, FOLDER/empty has none",
    "x.csv": "FOLDER/x.csv must have a column of image paths named filepath or path or ",
    "latin.csv": "FOLDER/latin.csv must be a table in UTF-8",
    "quote.csv": "FOLDER/quote.csv must be a table whose quotes are closed, and doubled inside of "
    "a quoted cell; the row from line 3 on is not: unexpected end of data",
    "both": "pairs must be tars or a folder of images, got both in FOLDER/both: x.tar and a/b.png",
}


@pytest.mark.parametrize(("source", "message"), SOURCES.items(), ids=SOURCES)
def test_a_wrong_source(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source.endswith(".tar"):
        pytest.importorskip("webdataset")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    (tmp_path / "latin.csv").write_bytes(b"path,text\nx,\xe9\n")
    (tmp_path / "quote.csv").write_text('path,text\na,a\nb,"b\nc,c\nd,d\n')
    (tmp_path / "pairs.xml").touch()
    (tmp_path / "both" / "a").mkdir(parents=True)
    (tmp_path / "both" / "x.tar").touch()
    (tmp_path / "both" / "a" / "b.png").touch()
    (tmp_path / "no.tar").write_bytes(b"no tar" * 99)
    command = ["--pairs", f"{tmp_path}/{source}", *TINY, "--out", str(tmp_path / "out")]
    assert message.replace("FOLDER", str(tmp_path)) in one_line(command, capsys)


def test_wrong_columns_and_no_usable_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    command = ["--pairs", str(tmp_path / "x.csv"), *TINY, "--out", str(tmp_path / "out")]
    error = one_line([*command, "--image-column", "a"], capsys)
    assert "of captions named title or caption or text, got a, b; --caption-column names" in error
    error = one_line([*command, "--image-column", "a", "--caption-column", "b"], capsys)
    assert "x.csv has none: 1 left out, the image's file cannot be read: line 2 1" in error


MISTAKES = [
    (["--batch-size", "50"], "batch size must be from 2 to 37, the number of images to train on"),
    (["--patch-size", "5"], "image_size must be a multiple of patch_size, got 16 and 5"),
    (["--held-out", "1"], "argument --held-out: must be at least 0 and below 1, got 1"),
    (["--crop", "0"], "argument --crop: must be from 0.1 to 1, got 0"),
    (["--crop", "all"], "argument --crop: invalid number value: 'all'"),
    (["--weight-decay", "nan"], "argument --weight-decay: must be at least 0, got nan"),
    (["--workers", "-1"], "argument --workers: must be at least 0, got -1"),
    (["--vocab-size", "9"], "vocab_size must be at least 259, got 9"),
    (["--context-length", "2"], "argument --context-length: must be at least 3, got 2"),
    (["--tokenizer", "nowhere"], "tokenizer must be a file, got no such file: nowhere"),
    (["--tokenizer", __file__], f"{__file__} must be a tokenizer.json of fastclip"),
    (["--embed-dim", f"{10**17}"], "the model must fit into memory: "),
    (["--embed-dim", f"{10**20}"], "the model must fit into memory: "),
    (["--resume"], "training.pt must exist to resume from"),
    (["--device", "toaster"], "cannot use device 'toaster': "),
]


@pytest.mark.parametrize(
    ("options", "message"), MISTAKES, ids=[" ".join(o)[:20] for o, _ in MISTAKES]
)
def test_a_wrong_option(
    options: list[str], message: str, source: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert message in one_line(["--pairs", source, *TINY, "--out", str(out), *options], capsys)
    assert not out.exists() or not list(out.iterdir())


def test_another_tokenizer(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CLIP's can be read elsewhere, but is none of an earlier training."""
    names = ["<|startoftext|>", "<|endoftext|>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({name: k for k, name in enumerate(names)}, []))
    bpe.save(str(tmp_path / "clip.json"))
    command = ["--pairs", source, *TINY, "--tokenizer", str(tmp_path / "clip.json")]
    error = one_line([*command, "--out", str(tmp_path / "out")], capsys)
    assert "clip.json must be a tokenizer.json of fastclip, got another one" in error


def test_options_of_pairs_need_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --crop: needs --pairs" in one_line(["--crop", "0.5"], capsys)
    assert "argument --flip: needs --pairs" in one_line(["--flip"], capsys)
    for given in (["--matching", "late"], ["--loss", "devise"]):
        error = one_line(["--pairs", "pairs.csv", *given], capsys)
        assert "--matching and --loss devise must be left out with --pairs" in error


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("webdataset", "tars need the package webdataset: pip install webdataset"),
        ("matplotlib", "needs the package matplotlib: pip install matplotlib"),
    ],
)
def test_a_package_that_is_needed_later_is_missed_at_once(
    module: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert message in one_line(["--pairs", str(tmp_path / "{0..1}.tar"), *TINY], capsys)


def test_a_package_of_both_trainings_is_missed_at_once() -> None:
    code = "import sys; sys.modules['PIL'] = None; from fastclip.train import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "fastclip.train: needs the package Pillow: pip install Pillow" in done.stderr


def test_help_explains_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    demo, _, own = text.partition("own pairs:")
    assert stopped.value.code == 0 and "--no-compare" in demo and "With --pairs" in demo
    assert all(f"  --{name} " in own for name in ("pairs", "held-out", "image-size"))
