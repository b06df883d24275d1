"""Mutants of the Triton engine, which the tests interpret."""

from mutants.mutant import mutant

BLOCKS = "tests/engines/gpu/test_gpu_engine_blocks.py::test_"
LEVELS = "tests/engines/gpu/test_gpu_engine_levels.py::test_"
MASKS = "tests/engines/gpu/test_gpu_engine_masks.py::test_"
SWITCH = "tests/engines/gpu/test_gpu_engine_switch.py::test_"
TILES = "tests/engines/gpu/test_gpu_engine_tiles.py::test_"
TARGETS = "tests/engines/gpu/test_gpu_engine_targets.py::test_"

MUTANTS = (
    mutant(
        "fp32 weights are not rounded to tf32",
        "triton_kernels/kernels/weigh.py",
        "w = rounded(w, 13)", "w = w",
        f"{BLOCKS}tf32_rounds_its_weights_to_nearest[triton]",
    ),
    mutant(
        "ties are not rounded to even",
        "triton_kernels/kernels/tile.py",
        "bits + ((1 << (BITS - 1)) - 1) + ((bits >> BITS) & 1)", "bits + (1 << (BITS - 1))",
        "tests/operators/test_rounding.py"
        "::test_gradients_of_gpu_engines_are_rounded_to_nearest_even[triton]",
    ),
    mutant(
        "positives in a tile's upper right corner are not stored",
        "triton_kernels/kernels/tile.py",
        "(ahead < BN) & (ahead > -BM)", "(ahead < BN - 1) & (ahead > -BM)",
        f"{TILES}any_diagonal[triton-a tile's last column]",
    ),
    mutant(
        "positives in a tile's lower left corner are not stored",
        "triton_kernels/kernels/tile.py",
        "(ahead < BN) & (ahead > -BM)", "(ahead < BN) & (ahead > 1 - BM)",
        f"{TILES}any_diagonal[triton-a corner above]",
    ),
    mutant(
        "columns have their own positives on the other side of the diagonal",
        "triton_kernels/kernels/finalise.py",
        "out - rows_total - offset)", "out - rows_total + offset)",
        f"{SWITCH}lines_of_one_pair_need_no_shift[triton]",
    ),
    mutant(
        "a sum that lost terms passes for one shift",
        "triton_kernels/kernels/finalise.py",
        "LEAST = tl.constexpr(2.0**-78)", "LEAST = tl.constexpr(2.0**-140)",
        f"{SWITCH}a_column_that_one_shift_would_blur_gets_its_own[triton--0.3]",
    ),
    mutant(
        "a sum without its largest term is not unusable",
        "triton_kernels/kernels/finalise.py",
        "absent | ((total >= LEAST_RELATIVE) & (total <= LARGEST))", "absent | (total <= LARGEST)",
        f"{SWITCH}no_loss_of_an_absurd_scale_is_invented[triton-10000000000.0-False]",
    ),
    mutant(
        "kept sums that overflow are used",
        "triton_kernels/kernels/finalise.py",
        "mask & ((tl.abs(total) < float(\"inf\")) == 0)", "mask & (mask == 0)",
        f"{BLOCKS}kept_sums_that_overflow_are_not_used",
    ),
    mutant(
        "a teacher's sums are not rescaled",
        "triton_kernels/kernels/finalise.py",
        "second = second * mine + tl.sum(sums * weight, 0) * theirs",
        "second = second + tl.sum(sums * weight, 0) * theirs",
        f"{TARGETS}several_chunks[triton-softmax]",
    ),
    mutant(
        "lines of the second sweep seem to share a shift",
        "triton_kernels/kernels/finalise.py",
        "differs += (other != shift).to(tl.int32)", "differs += 0",
        f"{SWITCH}shifts[triton-low_row at 100.0]",
    ),
    mutant(
        "columns are cut off by the rows' thresholds",
        "triton_kernels/kernels/logits.py",
        "above = t > load_lines(LOGITS[THRESHOLD_Y], j, N, PLAIN)[None, :]",
        "above = t > load_lines(LOGITS[THRESHOLD_X], j, N, PLAIN)[None, :]",
        f"{MASKS}every_option[triton-sigmoid-margin]",
    ),
    mutant(
        "positives by id fold logits with the negatives' sign",
        "triton_kernels/kernels/sweep.py",
        "e = tl.where(same, FOLD(x * SAME_ID), 0.0)", "e = tl.where(same, FOLD(x), 0.0)",
        f"{MASKS}every_option[triton-sigmoid-everything]",
    ),
    mutant(
        "thresholds look at our products in the place of the guide's, in the first sweep",
        "triton_kernels/kernels/sweep.py",
        "compared = target", "compared = t",
        f"{TARGETS}a_guide[triton-softmax]",
    ),
    mutant(
        "thresholds look at our products in the place of the guide's, in the second sweep",
        "triton_kernels/kernels/weigh.py",
        "compared = target", "compared = t",
        f"{TARGETS}a_guide[triton-sigmoid]",
    ),
    mutant(
        "a target's product has factors of the columns alone",
        "triton_kernels/kernels/targets.py",
        "return normalised(t, TARGET_LOGITS, i, j, M, N, False)",
        "return normalised(t, (None, *TARGET_LOGITS[1:]), i, j, M, N, False)",
        f"{TARGETS}a_guide[triton-hinge]",
    ),
    mutant(
        "columns count the pairs above the rows' levels",
        "triton_kernels/kernels/sweep.py",
        "first_y = tl.sum(tl.where(by_column, ACTIVATION(x), 0.0), 0)",
        "first_y = tl.sum(tl.where(by_column, ACTIVATION(x + 1.0), 0.0), 0)",
        f"{LEVELS}levels[triton-infinite levels]",
    ),
    mutant(
        "rows that were not kept count twice in the totals",
        "triton_kernels/kernels/complete.py",
        "& ((line < kept_rows) | (line >= M))", "& ((line < M) | (line >= M))",
        f"{BLOCKS}kept_products[triton-softmax-tall]",
    ),
)  # fmt: skip
