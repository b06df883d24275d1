"""Mutants of the training on one's own pairs."""

from mutants.mutant import mutant

BATCHES = "tests/pairs/test_batches.py::test_"
FORMS = "tests/pairs/test_forms.py::test_"
IMAGES = "tests/pairs/test_images.py::test_"

MUTANTS = (
    mutant(
        "crops are the same in every epoch",
        "fastclip/pairs/plan.py", "{self._seed} {step // self._per_epoch} {self",
        "{self._seed} {self",
        f"{BATCHES}an_epoch_has_each_image_once_with_one_of_its_captions",
    ),
    mutant(
        "a continued stream goes on with images that were decoded before",
        "fastclip/pairs/batches.py", 'self._step, self._decoded = state["step"], None',
        'self._step = state["step"]',
        f"{BATCHES}a_stream_continues_from_its_state",
    ),
    mutant(
        "Ctrl-C ends the processes that decode",
        "fastclip/pairs/images.py", "    signal.signal(signal.SIGINT, signal.SIG_IGN)", "    pass",
        f"{BATCHES}slices_and_processes_decode_the_same_images",
    ),
    mutant(
        "pairs are in the order of their rows",
        "fastclip/pairs/pair.py",
        "return sorted(pairs, key=lambda pair: (pair.name, pair.place))", "return pairs",
        f"{FORMS}every_form_has_the_same_pairs",
    ),
    mutant(
        "an image in another format is held out by another hash",
        "fastclip/pairs/pair.py", 'stem = folder + slash + (file.rpartition(".")[0] or file)',
        "stem = name",
        f"{FORMS}held_out_images_do_not_depend_on_their_order_or_company",
    ),
    mutant(
        "images of 16 bits are cut off instead of scaled",
        "fastclip/clip/open_image.py", ".point(lambda value: value * (1 / 256))", "",
        f"{IMAGES}every_mode_becomes_rgb_on_white",
    ),
    mutant(
        "a transparent palette is not put on white",
        "fastclip/clip/open_image.py", "if image.has_transparency_data", 'if image.mode == "RGBA"',
        f"{IMAGES}every_mode_becomes_rgb_on_white",
    ),
    mutant(
        "a model that has diverged ends the training",
        "fastclip/pairs/evaluate.py", "side.nan_to_num(0, 0, 0)", "side",
        "tests/pairs/test_chance.py::test_a_model_that_has_diverged_has_the_scores_of_chance",
    ),
    mutant(
        "an image in a tar is read from its header on",
        "fastclip/pairs/shards.py", "image.offset_data", "image.offset",
        "tests/pairs/test_left_out.py::test_samples_of_a_tar",
    ),
    mutant(
        "a folder that links lead to twice is read twice",
        "fastclip/pairs/folder.py", "        if real in visited:", "        if False:",
        "tests/pairs/test_folder.py::test_links_are_followed_and_no_image_is_there_twice",
    ),
    mutant(
        "a forgotten quote swallows rows without a word",
        "fastclip/pairs/table.py", "return len(lines) >= WHOLE_ROWS and", "return False and",
        "tests/pairs/test_table.py::test_a_quote_that_swallows_rows",
    ),
    mutant(
        "the figure's chance does not know that captions repeat",
        "fastclip/pairs/figure.py", "recall_of_guessing(pairs.flip(1))", "lambda k: k / images",
        "tests/pairs/test_figure.py::"
        "test_chance_counts_all_right_answers_in_both_directions",
    ),
    mutant(
        "ranks do not share what they found out about images",
        "fastclip/pairs/check.py", "dist.all_reduce(codes, dist.ReduceOp.MAX)", "pass",
        "tests/pairs/test_train.py::test_two_processes_have_the_curve_of_one",
    ),
)  # fmt: skip
