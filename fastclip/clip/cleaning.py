"""Changes that tokenizers of published models make to a text before they split it.

CLIP's mends text with ftfy, resolves HTML entities, joins white space and lower-cases. SigLIP's
also drops punctuation. SigLIP 2's only lower-cases.
"""

import html
import string

PUNCTUATION = str.maketrans("", "", string.punctuation)


def mended(text: str) -> str:
    """Returns the text with its encoding mended and HTML entities resolved.

    Raises:
        ImportError: the text is not plain ASCII, and ftfy is not installed.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return text  # neither step would change it
    try:
        import ftfy
    except ImportError:
        raise ImportError(
            f"the tokenizer needs the package ftfy for {text[:40]!r}, which is not plain ASCII: "
            "pip install ftfy"
        ) from None
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def clip(text: str) -> str:
    return " ".join(mended(text).split()).lower()


def canonical(text: str) -> str:
    return " ".join(mended(text).replace("_", " ").translate(PUNCTUATION).lower().split())


def lower(text: str) -> str:
    return text.lower()


def unchanged(text: str) -> str:
    return text


CLEANING = {"clip": clip, "canonical": canonical, "lower": lower, "none": unchanged}
