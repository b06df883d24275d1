"""Mutants of the CPU engine's retrieval."""

from mutants.mutant import mutant

RANKS = "tests/retrieval/test_ranks.py::test_"
TOPK = "tests/retrieval/test_topk.py::test_"
ROUNDING = "tests/retrieval/test_rounding_of_products.py::test_"
DRAWS = "tests/retrieval/test_sample_negatives.py::test_"
TIES = "inputs_on_which_ties_and_rounding_decide"
FOLDER = "csrc/cpu/retrieval/"

MUTANTS = (
    mutant(
        "a product decides what its rounding can change",
        f"{FOLDER}ranks.h", "out.near = ~(out.above | (difference < -band));",
        "out.near = (difference == -band);", f"{RANKS}{TIES}[cpu-near]",
    ),
    mutant(
        "BLAS does not round operands",
        f"{FOLDER}scanner.h", "? 0 : p.rounding;", "? 0 : 0;",
        f"{ROUNDING}operands_that_round[cpu-torch.float32-mm]",
    ),
    mutant(
        "partial sums do not overflow",
        f"{FOLDER}exact.h", "    return std::numeric_limits<T>::infinity();", "    return T(1e30);",
        f"{ROUNDING}partial_sums_that_overflow[cpu]",
    ),
    mutant(
        "denormal operands are not flushed",
        f"{FOLDER}exact.h", "T(norm * other_ * error_ + flushed)", "T(norm * other_ * error_)",
        f"{ROUNDING}denormal_bfloat16_features[cpu]",
    ),
    mutant(
        "a tie comes first whatever its index",
        f"{FOLDER}ranks.h", "index < own.index[line])", "index != own.index[line])",
        f"{RANKS}{TIES}[cpu-alike]",
    ),
    mutant(
        "lanes beyond the last query count for columns",
        f"{FOLDER}scanner.h", "i + q < rows ? -1 : 0", "-1",
        f"{RANKS}shapes_and_offsets[cpu-17-131--5]",
    ),
    mutant(
        "products that overflow decide",
        f"{FOLDER}ranks.h", "out.near = ~(out.above | (difference < -band));",
        "out.near = (difference >= -band) & (difference <= band);", f"{RANKS}{TIES}[cpu-large]",
    ),
    mutant(
        "a part of the keys replaces another's counts",
        f"{FOLDER}ranks.h", "p_.rows.above[begin_ + i] += counts_[i];",
        "p_.rows.above[begin_ + i] = counts_[i];",
        f"{RANKS}few_queries_share_their_keys_among_threads[5]",
    ),
    mutant(
        "the floor is the k-th product",
        f"{FOLDER}top.h", "set_floor(kth->score - 2 * band_);", "set_floor(kth->score);",
        f"{TOPK}{TIES}[cpu-near]",
    ),
    mutant(
        "candidates keep the scores of products",
        f"{FOLDER}top.h",
        "for (Scored& s : found_) s.score = exact_score<In>(*p_, query_, s.index);", "",
        f"{TOPK}{TIES}[cpu-near]",
    ),
    mutant(
        "of equal scores the higher index comes first",
        f"{FOLDER}top.h", "score == other.score && index < other.index",
        "score == other.score && index > other.index", f"{TOPK}{TIES}[cpu-alike]",
    ),
    mutant(
        "a key above the limit stays",
        f"{FOLDER}top.h", "exact_score<In>(p_, query, key) > p_.max_score) return;",
        "false) return;", f"{TOPK}a_limit_that_float32_products_miss[cpu]",
    ),
    mutant(
        "the noise of columns is that of rows",
        f"{FOLDER}noise.h", "(2 * uint64_t(line) + is_column + 1)", "(2 * uint64_t(line) + 1)",
        f"{DRAWS}equal_seeds_draw_alike_on_any_engine_and_number_of_threads",
    ),
    mutant(
        "uniform noise in place of Gumbel's",
        f"{FOLDER}noise.h", "  out = -out;\n", "  out = v;\n",
        f"{DRAWS}rows_are_drawn_from_their_softmax[cpu]",
    ),
    mutant(
        "an own positive is drawn",
        f"{FOLDER}draw.h", "counted[own - i] = 0;", ";",
        f"{DRAWS}own_positives_are_never_drawn[cpu-0]",
    ),
)  # fmt: skip
