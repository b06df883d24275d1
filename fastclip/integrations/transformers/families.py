"""The classes of transformers whose loss is one of fastclip's."""

from __future__ import annotations

from .family import Family, Tower, first_token, second
from .similarity import ALIGN, CLAP, SIGLIP, TIPS

_PIXELS = "pixel_values", "interpolate_pos_encoding"
_TOKENS = "input_ids", "attention_mask", "position_ids"
_TYPED = "input_ids", "attention_mask", "token_type_ids", "position_ids"
_ATTENTIONS = "output_attentions", "output_hidden_states"


def _by_features(name: str, file: str, tokens: tuple[str, ...] = _TOKENS) -> Family:
    """A class whose forward calls its own get_image_features and get_text_features."""
    return Family(
        name, file, name.removesuffix("Model") + "Output",
        Tower("get_image_features", _PIXELS), Tower("get_text_features", tokens),
        norm="_get_vector_norm",
    )  # fmt: skip


def _owl(name: str, file: str) -> Family:
    return Family(
        name, file, name.removesuffix("Model") + "Output",
        Tower("vision_model", _PIXELS, "visual_projection"),
        Tower("text_model", ("input_ids", "attention_mask"), "text_projection"),
        ignored=("return_base_image_embeds",),
    )  # fmt: skip


FAMILIES = (
    _by_features("CLIPModel", "clip"),
    _by_features("MetaClip2Model", "metaclip_2"),
    _by_features("CLIPSegModel", "clipseg"),
    _by_features("ChineseCLIPModel", "chinese_clip", _TYPED),
    Family(
        "AltCLIPModel", "altclip", "AltCLIPOutput",
        Tower("vision_model", _PIXELS, "visual_projection", features=second),
        Tower("text_model", _TYPED, "text_projection", features=second),
        norm="_get_vector_norm",
    ),
    Family(
        "SiglipModel", "siglip", "SiglipOutput",
        Tower("vision_model", _PIXELS), Tower("text_model", _TOKENS), SIGLIP,
    ),
    Family(
        "Siglip2Model", "siglip2", "Siglip2Output",
        Tower("vision_model", ("pixel_values", "pixel_attention_mask", "spatial_shapes")),
        Tower("text_model", _TOKENS), SIGLIP,
    ),
    Family(
        "VisionTextDualEncoderModel", "vision_text_dual_encoder", "CLIPOutput",
        Tower(
            "vision_model", ("pixel_values", *_ATTENTIONS, "return_dict"), "visual_projection",
            rest=False, features=second,
        ),
        Tower(
            "text_model", (*_TYPED, *_ATTENTIONS, "return_dict"), "text_projection", rest=False,
            features=second,
        ),
    ),
    Family(
        "BlipModel", "blip", "BlipOutput",
        Tower("vision_model", _PIXELS, "visual_projection"),
        Tower("text_model", _TOKENS, "text_projection"),
        same_dtype=True,
    ),
    Family(
        "GroupViTModel", "groupvit", "GroupViTModelOutput",
        Tower(
            "vision_model", ("pixel_values", *_ATTENTIONS), "visual_projection", rest=False,
            constants={"return_dict": True},
        ),
        Tower("text_model", _TOKENS, "text_projection"),
        from_config=(*_ATTENTIONS, "output_segmentation"), unless=("output_segmentation",),
    ),
    _owl("OwlViTModel", "owlvit"),
    _owl("Owlv2Model", "owlv2"),
    Family(
        "ClapModel", "clap", "ClapOutput",
        Tower("audio_model", ("input_features", "is_longer"), "audio_projection"),
        Tower("text_model", _TOKENS, "text_projection"), CLAP, "audio",
    ),
    Family(
        "AlignModel", "align", "AlignOutput",
        Tower("vision_model", ("pixel_values",), features=second),
        Tower(
            "text_model", (*_TYPED, "inputs_embeds"), "text_projection",
            ("input_ids", "inputs_embeds"), features=first_token,
        ),
        ALIGN,
    ),
    Family(
        "Tipsv2Model", "tipsv2", "Tipsv2Output",
        Tower("vision_model", ("pixel_values", "bool_masked_pos"), constants={"return_dict": True}),
        Tower(
            "text_model", (*_TOKENS, "inputs_embeds"), main=("input_ids", "inputs_embeds"),
            constants={"return_dict": True},
        ),
        TIPS, norm="_get_vector_norm",
    ),
)  # fmt: skip
