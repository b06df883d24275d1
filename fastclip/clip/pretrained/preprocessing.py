"""Reads how a model takes pictures: transformers' `preprocessor_config.json`, open_clip's
`preprocess_cfg`. An option that `fastclip.clip.pictures` does not follow is an error."""

from typing import Any

RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which transformers stores
RESIZE = {"shortest": "crop", "squash": "squash"}
# Options of transformers that are read, and others that change no pixel of a picture in RGB.
READ = {
    "do_resize", "do_rescale", "do_normalize", "do_center_crop", "size", "crop_size", "resample",
    "rescale_factor", "image_mean", "image_std", "default_to_square",
}  # fmt: skip
HARMLESS = {
    "auto_map", "data_format", "device", "disable_grouping", "do_convert_rgb",
    "feature_extractor_type", "image_processor_type", "image_seq_length", "input_data_format",
    "processor_class", "return_tensors",
}  # fmt: skip
READ_OF_OPEN_CLIP = {"size", "mode", "mean", "std", "interpolation", "resize_mode"}
HARMLESS_OF_OPEN_CLIP = {"fill_color"}  # of borders, which a square has not


def facts_of_preprocessor(config: dict[str, Any], kind: str, side: int) -> dict[str, Any]:
    """Returns the fields of `CLIPConfig` that transformers' `preprocessor_config.json` gives.

    Args:
        kind: "clip" or "siglip", whose defaults differ.
        side: of the model's pictures, in pixels.

    Raises:
        ValueError: an option is not supported, or is of another size.
    """
    wrong = {
        name: value
        for name, value in config.items()
        if value and name not in READ | HARMLESS and not name.startswith("_")
    }
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(name, True):
            wrong[name] = config[name]
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(255 * factor - 1) > 1e-6:
        wrong["rescale_factor"] = factor
    resample = config.get("resample", 3)
    if resample not in tuple(RESAMPLE):
        wrong["resample"] = resample
    size, crops = config.get("size"), bool(config.get("do_center_crop", kind == "clip"))
    shorter = not config.get("default_to_square", kind != "clip")
    if isinstance(size, dict):
        shorter = "shortest_edge" in size
    if size is not None and (not is_square(size, side) or (shorter and not crops)):
        wrong["size"] = size
        wrong.setdefault("do_center_crop", crops)
    if crops and not is_square(config.get("crop_size", side), side):
        wrong["crop_size"] = config["crop_size"]
    refuse(wrong, "preprocessor_config.json", side)
    found = fields(config, {"image_mean": "image_mean", "image_std": "image_std"})
    if "resample" in config:
        found["image_interpolation"] = RESAMPLE[resample]
    if size is not None:
        found["image_resize"] = "crop" if shorter else "squash"
    return found


def facts_of_preprocess_cfg(config: dict[str, Any], side: int) -> dict[str, Any]:
    """Returns the fields of `CLIPConfig` that open_clip's `preprocess_cfg` gives.

    Raises:
        ValueError: an option is not supported, or is of another size.
    """
    known = READ_OF_OPEN_CLIP | HARMLESS_OF_OPEN_CLIP
    wrong = {name: value for name, value in config.items() if value and name not in known}
    if not is_square(config.get("size", side), side):
        wrong["size"] = config["size"]
    for name, choices in (
        ("mode", ("RGB",)), ("interpolation", RESAMPLE.values()), ("resize_mode", tuple(RESIZE))
    ):  # fmt: skip
        if name in config and config[name] not in choices:
            wrong[name] = config[name]
    refuse(wrong, "preprocess_cfg", side)
    names = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation"}
    found = fields(config, names)
    if "resize_mode" in config:
        found["image_resize"] = RESIZE[config["resize_mode"]]
    return found


def fields(config: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    found = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def is_square(size: Any, side: int) -> bool:
    """Returns whether a size (a number, a list, or a dict by names) is `side` in both directions,
    or in the shorter one."""
    if isinstance(size, dict):
        return size in ({"shortest_edge": side}, {"height": side, "width": side})
    return size in (side, [side, side])


def refuse(wrong: dict[str, Any], name: str, side: int) -> None:
    if wrong:
        raise ValueError(
            f"{name} has unsupported options for pictures with a side of {side}: "
            f"{', '.join(f'{option}={value!r}' for option, value in wrong.items())}"
        )
