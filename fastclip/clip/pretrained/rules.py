"""Facts about published weights that shapes do not tell: used where there is no configuration."""

from typing import Any

# Width of a tower: width of its heads, the same in all ViT configurations of open_clip 3.3 and of
# transformers' CLIP and SigLIP. Other widths have no rule.
IMAGE_HEAD_WIDTH = {
    384: 64, 512: 64, 768: 64, 896: 64, 1024: 64, 1152: 72, 1280: 80, 1408: 88, 1536: 96, 1664: 104,
    1792: 112,
}  # fmt: skip
TEXT_HEAD_WIDTH = {256: 64, 384: 64, 512: 64, 640: 64, 768: 64, 1024: 64, 1152: 72, 1280: 64}

CLIP_VOCABULARY = 49408
# SigLIP's text towers by vocabulary: C4 and mC4 (SigLIP), Gemma's (SigLIP 2). open_clip runs the
# first two with the exact gelu.
SIGLIP_TEXT_ACTIVATION = {32000: "gelu", 250000: "gelu", 256000: "gelu_tanh"}

# The normalisation of pictures.
OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "image_resize": "crop",
}
HALVES = {
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "image_resize": "squash",
}


def heads(sizes: dict[str, Any]) -> dict[str, int]:
    """Returns the numbers of heads of both towers, as far as the rules know them."""
    found = {}
    for tower, table in (("image", IMAGE_HEAD_WIDTH), ("text", TEXT_HEAD_WIDTH)):
        width = sizes[f"{tower}_width"]
        if width in table:
            found[f"{tower}_heads"] = width // table[width]
    return found


def text_of_clip(sizes: dict[str, Any]) -> dict[str, Any]:
    """Returns the pooling and the mask of texts, if the vocabulary is CLIP's."""
    if sizes["vocab_size"] != CLIP_VOCABULARY:
        return {}
    return {"text_pool": "highest", "causal": True}
