"""Mutants of the plain PyTorch engine and of what stands around the engines."""

from mutants.mutant import mutant

BLOCKS = "tests/operators/test_blocks.py::test_"
FORMS = "tests/losses/test_family_forms.py::test_"
LINEAR = "tests/contrast/test_contrast_labels_and_means.py::test_"
MASKED = "tests/operators/test_masked_blocks.py::test_"
SWITCHES = "tests/operators/test_switches.py::test_"
TARGETS = "tests/operators/test_targets.py::test_"

MUTANTS = (
    mutant(
        "a sum is not rescaled to the merged shift",
        "fastclip/engine/torch_engine.py",
        "theirs = torch.where(other_is_free, 0, other_sum * torch.exp2(other_shift - top))",
        "theirs = torch.where(other_is_free, 0, other_sum)",
        f"{SWITCHES}one_shift_or_running_maxima[torch-random-14.3-float32-tall]",
    ),
    mutant(
        "a pair at its threshold is cut off",
        "fastclip/engine/chunked_block.py",
        "negatives & ~(t > x.threshold[rows, None])", "negatives & ~(t >= x.threshold[rows, None])",
        f"{MASKED}a_pair_exactly_at_the_threshold_is_a_negative[torch]",
    ),
    mutant(
        "positives by id include own positives",
        "fastclip/engine/chunked_block.py",
        "same & negatives if self.block.same_id_positive", "same if self.block.same_id_positive",
        f"{MASKED}masked_blocks[torch-tall-softmax-float32-positives by id]",
    ),
    mutant(
        "thresholds look at our products in the place of the guide's",
        "fastclip/engine/chunked_block.py",
        "t = targets if self.block.guided else t", "t = t",
        f"{TARGETS}the_guide_decides_in_the_place_of_our_products[torch]",
    ),
    mutant(
        "weights that a limit takes out of columns stay there",
        "fastclip/engine/torch_engine.py",
        "return w.add_((activation * b).masked_fill_(~counts[1], 0))",
        "return w.add_((activation * b).masked_fill_(~counts[0], 0))",
        f"{MASKED}masked_blocks[torch-tall-sigmoid-float32-margin]",
    ),
    mutant(
        "duplicates do not tie with their positive",
        "fastclip/engine/torch_engine.py",
        "diagonal = torch.where(chunked.scale == 0, diagonal.to(positive.dtype), exact)", "pass",
        "tests/losses/test_accuracy.py"
        "::test_is_at_least_as_accurate_as_plain_torch[torch-clip-float32-long_duplicates-14.3]",
    ),
    mutant(
        "the budget is twice what was given",
        "fastclip/engine/fused_loss.py",
        "return waiting * dtype.itemsize <= options.memory_budget",
        "return waiting * dtype.itemsize <= 2 * options.memory_budget",
        "tests/losses/test_budget.py::test_gradients_wait_only_within_the_budget",
    ),
    mutant(
        "the default budget of CPUs is half as large",
        "fastclip/engine/checks.py",
        '"cpu": 256 << 20', '"cpu": 128 << 20',
        "tests/losses/test_budget.py::test_the_default_budget_is_256_mib",
    ),
    mutant(
        "one row more is kept than the budget holds",
        "fastclip/engine/kept.py",
        "affordable = budget // (short * itemsize) // UNIT * UNIT",
        "affordable = _padded(budget // (short * itemsize))",
        "tests/operators/test_kept_products.py::test_rows_to_keep_fit_the_budget",
    ),
    mutant(
        "kept weights forget their header",
        "fastclip/engine/kept.py",
        "affordable = (budget - Weights.header(m, n)) // Weights.row(x, n)",
        "affordable = budget // Weights.row(x, n)",
        "tests/engines/gpu/test_gpu_engine_blocks.py::test_kept_products[triton-softmax-tall]",
        "tests/engines/gpu/test_gpu_engine_blocks.py::test_kept_products[triton-softmax-wide]",
    ),
    mutant(
        "a chunk of sums takes all the features' width",
        "fastclip/engine/group_sums.py",
        "-(-width // max(1, CHUNK // (8 * (lines + 1))))", "1",
        f"{LINEAR}chunks_have_the_stated_size",
    ),
    mutant(
        "columns' groups leave out the own column in the place of the own row",
        "fastclip/engine/group_sums.py",
        "_padded(values)[self.own[1]]", "_padded(values)[self.own[0]]",
        "tests/contrast/test_contrast_labels_and_means.py::test_awkward_shapes[cpu-(2, 3)-softmax]",
        f"{FORMS}siglip_with_ids[torch]",
        f"{FORMS}positives_by_id_alone_are_unicls[torch]",
    ),
    mutant(
        "means divide by a pair too many if y is x",
        "fastclip/engine/line_means.py",
        "yield _Set((1, left_out, counts), -own if self.one_set else 0.0)",
        "yield _Set((1, left_out, counts), 0.0)",
        f"{LINEAR}awkward_shapes[torch-(3, 2)-softmax]",
    ),
    mutant(
        "a feature's logit with itself depends on it once",
        "fastclip/engine/line_means.py",
        "own * 2 if self.one_set else own", "own",
        f"{LINEAR}awkward_shapes[torch-(3, 2)-softmax]",
    ),
    mutant(
        "means lack the common bias",
        "fastclip/engine/line_means.py",
        "total / one.number + common", "total / one.number",
        f"{LINEAR}any_scale[torch-0.0-everything, labels-softmax]",
    ),
    mutant(
        "the gradient of one set's columns is lost",
        "fastclip/engine/line_formulas.py",
        "given._replace(columns=given.rows, column_positives=given.row_positives)", "given",
        f"{FORMS}supcon_is_the_papers[torch]",
    ),
    mutant(
        "hinges do not move their own positive",
        "fastclip/engine/line_formulas.py",
        "return -of_lines * state[0]", "return 0 * of_lines * state[0]",
        f"{FORMS}the_sum_of_hinges_is_vses[torch]",
    ),
    mutant(
        "hinges begin a margin too late",
        "fastclip/engine/pairs.py",
        "(logits + above) * LOG2E", "(logits - above) * LOG2E",
        f"{FORMS}the_sum_of_hinges_is_vses[torch]",
    ),
    mutant(
        "an own positive that key_bias takes out puts all pairs above its level",
        "fastclip/engine/pairs.py",
        "exists = inside & (logits != -torch.inf)", "exists = inside",
        "tests/contrast/test_hinges.py",
    ),
    mutant(
        "expectations lack the common bias",
        "fastclip/engine/line_formulas.py",
        "* (sums_t / sums) + common", "* (sums_t / sums)",
        "tests/contrast/test_targets.py::test_statistics_and_gradients[torch-teacher-float64]",
    ),
    mutant(
        "the last of equal hardest negatives is taken",
        "fastclip/engine/hardest.py",
        "larger = (found > highest)", "larger = (found >= highest)",
        f"{FORMS}the_first_of_equal_hardest_negatives_is_taken[torch-True-4]",
    ),
    mutant(
        "rows of later chunks are counted from their chunk",
        "fastclip/engine/hardest.py",
        "places + chunk.start, of_columns", "places, of_columns",
        f"{FORMS}the_first_of_equal_hardest_negatives_is_taken[torch-True-4]",
    ),
    mutant(
        "zero rows are projected",
        "fastclip/engine/feature_gradient.py",
        "torch.where(self.clamped, 0, unit * self.along * self.factor)",
        "unit * self.along * self.factor",
        f"{LINEAR}rows_of_zeros_with_normalize[torch-dtype0-everything, labels]",
    ),
)  # fmt: skip
