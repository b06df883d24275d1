"""Mutants of the reference CLIP: foreign weights, tokenizers, pictures, predictions."""

from mutants.mutant import mutant

WEIGHTS = "tests/demo/test_pretrained.py::test_"
WORDS = "tests/demo/test_zero_shot.py::test_"
PROCESSED = "tests/demo/test_preprocessing.py::test_"
OPENED = "tests/demo/test_open_image.py::test_"
KEYS = "fastclip/clip/pretrained/keys.py"
TOKENIZER = "fastclip/clip/tokenizer.py"

MUTANTS = (
    mutant(
        "a loaded model shares memory with the state dict",
        KEYS,
        "dtype, copy=True)",
        "dtype)",
        f"{WEIGHTS}the_model_has_memory_of_its_own",
    ),
    mutant(
        "an unknown key is left out without a word",
        KEYS,
        "for key in state if key not in known and not",
        "for key in () if not",
        f"{WEIGHTS}every_key_is_accounted_for",
    ),
    mutant(
        "whole numbers are taken for weights",
        KEYS,
        "not tensor.is_floating_point()",
        "False",
        f"{WEIGHTS}every_key_is_accounted_for",
    ),
    mutant(
        "a missing block shortens the tower",
        "fastclip/clip/pretrained/layout.py",
        "return len({match[1] for match in map(found.match, state) if match})",
        "return 2",
        f"{WEIGHTS}every_key_is_accounted_for",
    ),
    mutant(
        "a configuration of another model is believed",
        "fastclip/clip/pretrained/__init__.py",
        "if name in found and name in told and found[name] != told[name]",
        "if False",
        f"{WEIGHTS}a_configuration_of_another_model_is_refused",
    ),
    mutant(
        "weights without the first norm are pooled as if they had it",
        "fastclip/clip/pretrained/open_clip.py",
        "if norm_first:  # CLIPA",
        "if True:  # CLIPA",
        f"{WEIGHTS}what_the_weights_do_not_tell_must_be_given",
    ),
    mutant(
        "a tokenizer of another vocabulary fits",
        TOKENIZER,
        "fits = self.end == end and",
        "fits =",
        f"{WORDS}the_tokenizer_must_be_the_models",
    ),
    mutant(
        "a long caption loses its end",
        TOKENIZER,
        "[*first, *encoding.ids[:room], self.end]",
        "[*first, *encoding.ids, self.end][:context_length]",
        f"{WORDS}clips_tokenizer_from_a_file_of_merges",
    ),
    mutant(
        "SigLIP's labels share one probability",
        "fastclip/clip/predictions.py",
        "if model.config.bias is None",
        "if True",
        f"{WORDS}the_table_has_the_models_probabilities[-2.0]",
    ),
    mutant(
        "colours are not normalised",
        "fastclip/clip/pictures.py",
        "return (colours - mean) / std",
        "return colours",
        f"{WORDS}pictures_are_cropped_or_squashed",
    ),
    mutant(
        "a picture is not turned as its EXIF data says",
        "fastclip/clip/open_image.py",
        "ImageOps.exif_transpose(opened)",
        "opened.copy()",
        f"{OPENED}a_model_is_scored_on_the_pixels_that_it_was_trained_on",
    ),
    mutant(
        "the brightness of 32 bits is cut off",
        "fastclip/clip/open_image.py",
        'if image.mode in ("I", "F")',
        "if False",
        f"{OPENED}thirty_two_bits_are_refused",
    ),
    mutant(
        "a picture in two given folders is classified twice",
        "fastclip/clip/pictures.py",
        "found.setdefault(os.path.abspath(file), file)",
        "found.setdefault(str(file), file)",
        f"{OPENED}folders_are_searched_for_pictures_once",
    ),
    mutant(
        "half a pixel of a margin is cut off",
        "fastclip/clip/pictures.py",
        "left, top = round((width - size) / 2), round((height - size) / 2)",
        "left, top = (width - size) // 2, (height - size) // 2",
        f"{PROCESSED}an_odd_margin_is_cut_as_by_torchvision",
    ),
    mutant(
        "every model squashes pictures",
        "fastclip/clip/pretrained/preprocessing.py",
        '"crop" if shorter else "squash"',
        '"squash"',
        f"{PROCESSED}published_preprocessors_of_transformers",
    ),
    mutant(
        "any filter is taken for a bicubic one",
        "fastclip/clip/pretrained/preprocessing.py",
        "RESAMPLE[resample]",
        '"bicubic"',
        f"{PROCESSED}published_preprocessors_of_transformers",
    ),
    mutant(
        "a size that is not the model's is taken",
        "fastclip/clip/pretrained/preprocessing.py",
        "return size in (side, [side, side])",
        "return True",
        f"{PROCESSED}unsupported_options_of_transformers",
    ),
    mutant(
        "padding is missing for a model that sees it",
        "fastclip/zero_shot.py",
        'fill = tokenizer.fill or not config.causal or config.text_pool == "last"',
        "fill = False",
        f"{WORDS}texts_are_filled_for_models_that_see_the_padding",
    ),
    mutant(
        "a mistyped file of labels is the label",
        "fastclip/zero_shot.py",
        "if len(labels) == 1 and not there",
        "if False",
        f"{WORDS}errors_are_one_line",
    ),
    mutant(
        "a table that cannot be written is lost",
        "fastclip/zero_shot.py",
        "    if predictions:\n        print(table(predictions))\n",
        "",
        f"{WORDS}a_picture_of_any_error_is_left_out_and_a_table_is_printed_before_it_is_written",
    ),
    mutant(
        "a number of the configuration may be none",
        "fastclip/clip/config.py",
        " and math.isfinite(value)",
        "",
        f"{WEIGHTS}options_that_contradict_are_named",
    ),
)
