"""Source files stay short enough to be read in one go."""

from pathlib import Path

from support.installation import ROOT

FOLDERS = ("fastclip", "triton_kernels", "csrc", "bench", "tests", "docs")
ENDINGS = {".py", ".pyi", ".h", ".cpp", ".cu", ".md"}
MOST_LINES = 350


def sources() -> list[Path]:
    found = [ROOT / "setup.py", ROOT / "README.md", ROOT / "Makefile"]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    return found


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 300
    assert {str(path): n for path, n in lengths.items() if n > MOST_LINES} == {}
