"""The optional packages of the command lines, and the line that names a missing one."""

# By the names of their modules.
PACKAGES = {
    "PIL": "Pillow", "ftfy": "ftfy", "numpy": "numpy", "safetensors": "safetensors",
    "tokenizers": "tokenizers", "tqdm": "tqdm",
}  # fmt: skip


def install_line(error: ImportError, extra: str) -> str | None:
    """Returns how to install the package that an import missed; None: it is none of these.

    Args:
        extra: fastclip's extra that has the package, too.
    """
    package = PACKAGES.get(error.name or "")
    if package is None:
        return None
    return f"needs the package {package}: pip install {package}, or fastclip's extra {extra}"
