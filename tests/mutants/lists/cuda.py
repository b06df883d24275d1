"""Mutants of the CUDA engine, which the tests run emulated."""

from mutants.mutant import mutant

BLOCKS = "tests/engines/gpu/test_gpu_engine_blocks.py::test_"
LEVELS = "tests/engines/gpu/test_gpu_engine_levels.py::test_"
LOSS = "tests/engines/gpu/test_gpu_engine_loss.py::test_"
MASKS = "tests/engines/gpu/test_gpu_engine_masks.py::test_"
SWITCH = "tests/engines/gpu/test_gpu_engine_switch.py::test_"
TILES = "tests/engines/gpu/test_gpu_engine_tiles.py::test_"
TARGETS = "tests/engines/gpu/test_gpu_engine_targets.py::test_"

MUTANTS = (
    mutant(
        "a sum that lost terms passes for one shift",
        "csrc/cuda/finalise.h",
        "kLeast = 0x1p-78", "kLeast = 0x1p-140",
        f"{SWITCH}a_column_that_one_shift_would_blur_gets_its_own[cuda--0.3]",
    ),
    mutant(
        "a sum without its largest term is not unusable",
        "csrc/cuda/maxima.h",
        "(sum[set][p] >= kLeastRelative && sum[set][p] <= 0x1p127)", "(sum[set][p] <= 0x1p127)",
        f"{SWITCH}no_loss_of_an_absurd_scale_is_invented[cuda-10000000000.0-False]",
    ),
    mutant(
        "columns have their own positives on the other side of the diagonal",
        "csrc/cuda/first_sweep.h",
        "w.m(), -w.b.offset}", "w.m(), w.b.offset}",
        f"{SWITCH}lines_of_one_pair_need_no_shift[cuda]",
    ),
    mutant(
        "fp32 weights are not rounded to tf32",
        "csrc/cuda/epilogue.h",
        "weights.to_tf32) written[q] = rounded_to_tf32(written[q]);", "weights.to_tf32) ;",
        f"{BLOCKS}tf32_rounds_its_weights_to_nearest[cuda]",
    ),
    mutant(
        "a column's pairs above its level are counted by the rows' levels",
        "csrc/cuda/epilogue.h",
        "Kind::activation(t[q], own, level_y[four][q]) : 0.f;",
        "Kind::activation(t[q], own, level_x) : 0.f;",
        f"{LEVELS}levels[cuda-infinite levels]",
    ),
    mutant(
        "positives in a chunk's last column are not stored",
        "csrc/cuda/epilogue.h",
        "partner >= 0 && partner < columns ? int(partner) : -1",
        "partner >= 0 && partner < columns - 1 ? int(partner) : -1",
        f"{TILES}any_diagonal[cuda-a tile's last column]",
    ),
    mutant(
        "positives beyond one shift have the wrong sign",
        "csrc/cuda/maxima.h",
        "positive[line] = t[p][q];", "positive[line] = -t[p][q];",
        f"{SWITCH}positives_tie_with_their_duplicates_beyond_one_shift[cuda]",
    ),
    mutant(
        "a line is not rescaled to its new maximum",
        "csrc/cuda/maxima.h",
        "sum[set][p] * exp2(double(m) - double(top))", "sum[set][p]",
        f"{TILES}the_switch_among_tiles[cuda-one_long-14.3-float16-False]",
    ),
    mutant(
        "rows are cut off by the columns' thresholds",
        "csrc/cuda/pairs.h",
        "{is_negative && !(t > mine.threshold)", "{is_negative && !(t > other.threshold)",
        f"{MASKS}every_option[cuda-sigmoid-margin]",
    ),
    mutant(
        "negatives with the same id stay",
        "csrc/cuda/pairs.h",
        "is_pair && mine.id != other.id;", "is_pair;",
        f"{MASKS}every_option[cuda-softmax-ids]",
    ),
    mutant(
        "thresholds look at our products in the place of the guide's",
        "csrc/cuda/epilogue.h",
        "Options::kIsGuided ? target[q] : t[q];", "t[q];",
        f"{TARGETS}a_guide[cuda-softmax]",
    ),
    mutant(
        "a guide's own positives of columns have the rows' factors, with running maxima",
        "csrc/cuda/maxima.h",
        "compared = normalised(guide[p][q], is_row ? options.target_x : options.target_y, line,",
        "compared = normalised(guide[p][q], options.target_x, line,",
        f"{TARGETS}a_guide_beyond_one_shift[cuda]",
    ),
    mutant(
        "a chunk's expectation is not rescaled",
        "csrc/cuda/teacher.h",
        "moment = moment * mine + at(", "moment = moment + at(",
        f"{TARGETS}several_chunks[cuda-softmax]",
    ),
    mutant(
        "fp16 weights are not enlarged",
        "csrc/cuda/second_sweep.h",
        "is_fp16 ? 8192.f : 1.f", "1.f",
        f"{LOSS}fp16_weights_do_not_underflow[cuda]",
    ),
    mutant(
        "positives by id take the negatives' shift",
        "csrc/cuda/second_sweep.h",
        "w.b.y.positives, has_shifts, common, positives_);",
        "w.b.y.positives, has_shifts, nullptr, positives_);",
        f"{MASKS}positives_by_id_without_any_negative[cuda]",
    ),
    mutant(
        "gradients keep the factors of their rows' weights",
        "csrc/cuda/complete.h",
        "c.spread ? c.shrink / factor : c.shrink", "c.shrink",
        f"{BLOCKS}gradients_before_and_after_the_normalisation[cuda]",
    ),
    mutant(
        "a bias's gradient lacks own positives",
        "csrc/cuda/complete.h",
        "(i >= 0 && i < rows ? weight[i] : 0.)", "0.",
        f"{MASKS}every_option[cuda-hinge-key bias]",
    ),
    mutant(
        "a chunk of kept products goes on beyond them",
        "csrc/cuda/chunks.h",
        "(kept ? std::min(kept_rows, m) : m)", "m",
        f"{BLOCKS}chunks_of_several_tiles[softmax]",
    ),
    mutant(
        "the shift leaves no room for the smallest row",
        "csrc/cuda/bound.h",
        "fmin(fmax(2 * top - 120, 0.), 100.)", "0.",
        f"{SWITCH}the_shift_leaves_room_above_and_below[cuda-60.0]",
    ),
    mutant(
        "every chunk begins its rows' sums anew",
        "csrc/cuda/first_sweep.h",
        "c.row, c.column == 0, ends, shift, sum}", "c.row, true, ends, shift, sum}",
        f"{BLOCKS}chunks_change_nothing[cuda-softmax-float32]",
    ),
)  # fmt: skip
