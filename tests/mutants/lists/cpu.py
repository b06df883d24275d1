"""Mutants of the CPU engine, and of the formulas that it shares with the CUDA engine."""

from mutants.mutant import mutant

BLOCKS = "tests/operators/test_blocks.py::test_"
KEPT = "tests/operators/test_kept_products.py::test_"
LEVELS = "tests/operators/test_levels.py::test_levels"
MASKED = "tests/operators/test_masked_blocks.py::test_"
ORDER = "tests/engines/cpu/test_order_of_threads.py::test_"
SWITCHES = "tests/operators/test_switches.py::test_"
TARGETS = "tests/operators/test_targets.py::test_"

MUTANTS = (
    mutant(
        "bf16 is rounded half up",
        "csrc/cpu/pack.h",
        "bits + 0x7fffu + ((bits >> 16) & 1u)", "bits + 0x8000u",
        "tests/operators/test_rounding.py::test_gradients_in_bf16_are_rounded_to_nearest_even[cpu]",
    ),
    mutant(
        "columns have their own positives on the other side of the diagonal",
        "csrc/cpu/shifts.h",
        "call.m, call.m, -offset)", "call.m, call.m, offset)",
        f"{SWITCHES}lines_of_one_pair_need_no_shift[cpu]",
    ),
    mutant(
        "a sum that lost terms passes for one shift",
        "csrc/cpu/shifts.h",
        "? -900. : -78.", "? -900. : -140.",
        f"{SWITCHES}a_column_that_one_shift_would_blur_gets_its_own[cpu--0.11]",
    ),
    mutant(
        "a sum without its largest term is not unusable",
        "csrc/cpu/ops.cpp",
        "!(sum[q] >= 0x1p-100 && sum[q] <= 0x1p127)", "!(sum[q] <= 0x1p127)",
        f"{SWITCHES}no_loss_of_an_absurd_scale_is_invented[cpu-10000000000.0-False]",
    ),
    mutant(
        "negatives with the same id stay",
        "csrc/cpu/pairs.h",
        "Positives ? ids == id_ : ids != id_", "Positives ? ids == id_ : ids == ids",
        f"{MASKED}masked_blocks[cpu-tall-softmax-float32-ids]",
    ),
    mutant(
        "rows are cut off by the columns' thresholds",
        "csrc/cpu/pairs.h",
        "{mask & ~(whole > threshold), mask", "{mask & ~(whole > threshold_), mask",
        f"{MASKED}masked_blocks[cpu-tall-softmax-float32-margin]",
    ),
    mutant(
        "a guide's products lack their columns' factors",
        "csrc/cpu/pairs.h",
        "return guide * of_row * guide_factor_;", "return guide * of_row;",
        f"{TARGETS}a_guide_with_other_options[cpu-softmax-ids]",
    ),
    mutant(
        "the bias's fraction is lost",
        "csrc/kinds.h",
        "? T(bias_log2 - double(whole)) : T(0)", "? T(0) : T(0)",
        f"{MASKED}a_common_bias_moves_the_statistic_by_itself[cpu]",
    ),
    mutant(
        "a pair at its level counts as above it",
        "csrc/kinds.h",
        "return l > T(0) ? V{} + T(1) : l <= T(0) ? V{} : l;",
        "return l >= T(0) ? V{} + T(1) : l < T(0) ? V{} : l;",
        f"{LEVELS}[cpu-pairs at the level-tall]",
    ),
    mutant(
        "logits lose what a float of the scale cannot hold",
        "csrc/kinds.h",
        "V low = t * k.scale_low;", "V low = t * 0.f;",
        "tests/losses/test_accuracy.py"
        "::test_is_at_least_as_accurate_as_plain_torch[cpu-clip-float32-long_duplicates-14.3]",
    ),
    mutant(
        "positives by id pull apart",
        "csrc/cpu/fold.h",
        "if constexpr (P::kPositives && Kind::kNegatesPositives) w = -w;", "",
        f"{MASKED}masked_blocks[cpu-tall-sigmoid-float32-positives by id]",
    ),
    mutant(
        "a row's sum is not rescaled to its new maximum",
        "csrc/cpu/fold.h",
        "lines.row_sum[i] *= change;", "",
        f"{SWITCHES}one_shift_or_running_maxima[cpu-long-14.3-float32-tall]",
    ),
    mutant(
        "a row's expectation is not rescaled to its new maximum",
        "csrc/cpu/fold.h",
        "lines.row_moment[i] *= change;", ";",
        f"{TARGETS}the_widest_scales_of_ours_and_of_the_teacher[cpu]",
    ),
    mutant(
        "a column's sum is not rescaled to the strips' maximum",
        "csrc/cpu/tile_columns.h",
        "s == 0 ? 0 : std::exp2(m - top), theirs", "s == 0 ? 0 : 1, theirs",
        f"{SWITCHES}one_shift_or_running_maxima[cpu-long-14.3-float32-tall]",
    ),
    mutant(
        "rows' gradients take the positives of other rows, in a wide block",
        "csrc/cpu/positives.h",
        "const int64_t q = p.positives_by_column ? j : i;", "const int64_t q = i;",
        f"{BLOCKS}any_block[cpu-softmax-float32-wide]",
    ),
    mutant(
        "the normalisation's Jacobian has one factor too few",
        "csrc/cpu/complete_row.h",
        "along = double(partial) * factor * factor;", "along = double(partial) * factor;",
        f"{BLOCKS}factors_on_either_tower[cpu-softmax-float32-tall]",
    ),
    mutant(
        "fp16 gradients of zero rows are infinite",
        "csrc/cpu/complete_row.h",
        "side.gradient_dtype == Dtype::kHalf)) scale = 0;", "false)) scale = 0;",
        f"{BLOCKS}features_shorter_than_epsilon_are_not_projected[cpu-float16]",
    ),
    mutant(
        "a teacher leaves own positives out",
        "csrc/cpu/engine.cpp",
        "tile.first_lane = -kMostCols - 1;", "tile.first_lane = ours.first_lane;",
        f"{TARGETS}a_teacher_on_plain_blocks[cpu-tall-softmax-float32]",
    ),
    mutant(
        "weights overwrite kept products",
        "csrc/cpu/engine.cpp",
        "tile.w = b.kept || p_", "tile.w = b.kept ? const_cast<T*>(tile.t) : p_",
        "tests/losses/test_gradients_requested.py::test_a_second_backward_gives_the_same_gradients[cpu-clip-mean]",
    ),
    mutant(
        "a bias's gradient lacks own positives",
        "csrc/cpu/ops.cpp",
        "sums[i + offset] += weight[i];", ";",
        f"{MASKED}masked_blocks[cpu-tall-softmax-float32-key bias]",
    ),
    mutant(
        "positives by id take the negatives' shift",
        "csrc/cpu/ops.cpp",
        "p.one_shift &= all_equal(", "all_equal(",
        f"{MASKED}positives_by_id_without_any_negative[cpu-tall]",
    ),
    mutant(
        "all lines of a teacher take one shift",
        "csrc/cpu/ops.cpp",
        "p.teacher.one_shift = all_equal(shifts, shifts[0]);", "p.teacher.one_shift = true;",
        f"{TARGETS}any_scale_of_the_teacher[cpu-float32-tall-10000.0]",
    ),
    mutant(
        "a wide block's diagonal is mirrored",
        "csrc/cpu/call.h",
        "swapped ? -block.offset : block.offset", "block.offset",
        f"{BLOCKS}any_block[cpu-sigmoid-float32-wide]",
    ),
    mutant(
        "sums over all pairs lose their rounding errors",
        "csrc/cpu/engine.cpp",
        "p_.totals[q] = all.value + all.lost;", "p_.totals[q] = all.value;",
        "tests/engines/cpu/test_totals.py::test_small_terms_between_large_ones_are_not_lost",
    ),
    mutant(
        "a strip overtakes another",
        "csrc/cpu/engine.cpp",
        "std::memory_order_acquire) < k;", "std::memory_order_acquire) < k - 1;",
        f"{ORDER}no_strip_overtakes_another",
    ),
    mutant(
        "a thread that failed is waited for",
        "csrc/cpu/engine.cpp",
        "failed_ = true;", ";",
        f"{ORDER}a_failed_allocation_raises_and_the_next_call_is_right",
    ),
)  # fmt: skip
