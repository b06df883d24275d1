"""Mutants of retrieval in Python."""

from mutants.mutant import mutant

RANKS = "tests/retrieval/test_ranks.py::test_"
TOPK = "tests/retrieval/test_topk.py::test_"
ROUNDING = "tests/retrieval/test_rounding_of_products.py::test_"
DRAWS = "tests/retrieval/test_sample_negatives.py::test_"
METRICS = "tests/retrieval/test_metrics.py::test_"
ACROSS = "tests/distributed/test_distributed_retrieval.py::test_"
FOLDER = "fastclip/retrieval/"

MUTANTS = (
    mutant(
        "a product decides what its rounding can change",
        f"{FOLDER}scores.py", "band = own * other * error +", "band = own * other * 0 +",
        f"{RANKS}inputs_on_which_ties_and_rounding_decide[torch-near]",
    ),
    mutant(
        "operands that the user lets round do not",
        f"{FOLDER}scores.py", '{"bf16": 2.0**-7,', '{"bf16": 0.0,',
        f"{ROUNDING}operands_that_round[torch-torch.float16-]",
    ),
    mutant(
        "products that overflow decide",
        f"{FOLDER}scores.py", "torch.where(overflows, torch.inf,", "torch.where(overflows, 1e30,",
        f"{TOPK}scores_beyond_float32[torch-1-False]",
    ),
    mutant(
        "exact scores are summed in torch's order",
        f"{FOLDER}scores.py", "        _sum(sides.x[a].to(dtype) * sides.y[b].to(dtype))",
        "        (sides.x[a].to(dtype) * sides.y[b].to(dtype)).sum(1)",
        f"{ROUNDING}long_features_tie[torch]",
    ),
    mutant(
        "a tie comes first whatever its index",
        f"{FOLDER}plain_ranks.py", "(index < own.index[lines])", "(index > own.index[lines])",
        f"{RANKS}inputs_on_which_ties_and_rounding_decide[torch-alike]",
    ),
    mutant(
        "the own key is the first partner instead of the best",
        f"{FOLDER}best_partner.py", "torch.where(scores == best[line], key, n)", "key",
        f"{RANKS}many_pairs_of_one_id_go_in_chunks",
    ),
    mutant(
        "features that are not finite pass",
        f"{FOLDER}sides.py", "    if torch.isfinite(features.sum()):", "    if True:",
        f"{RANKS}values_that_are_not_finite_are_named[cpu-nan]",
    ),
    mutant(
        "torch.topk's own ties stay",
        f"{FOLDER}plain_top.py", "for row in unsure.nonzero()[:, 0].tolist():", "for row in []:",
        f"{TOPK}inputs_on_which_ties_and_rounding_decide[torch-alike]",
    ),
    mutant(
        "a product decides at the limit",
        f"{FOLDER}plain_top.py", "(t - limit).abs() > 2 * band[:, None]",
        "(t - limit).abs() > 0 * band[:, None]",
        f"{TOPK}a_limit_that_float32_products_miss[torch]",
    ),
    mutant(
        "rows and columns share their noise",
        f"{FOLDER}noise.py", "(2 * lines + int(of_columns) + 1)", "(2 * lines + 1)",
        f"{DRAWS}equal_seeds_draw_alike_on_any_engine_and_number_of_threads",
    ),
    mutant(
        "an own positive is drawn",
        f"{FOLDER}negatives.py", "logits[queries[:, None] + sides.offset == keys] = -torch.inf",
        "pass", f"{DRAWS}own_positives_are_never_drawn[torch-0]",
    ),
    mutant(
        "the median of an even number is the lower one",
        f"{FOLDER}metrics.py", "float((low + high) // 2)", "float(low)",
        f"{METRICS}the_median_of_an_even_number",
    ),
    mutant(
        "a negative scale does not reverse",
        f"{FOLDER}metrics.py", "float((scale > 0) - (scale < 0))", "float(scale != 0)",
        f"{METRICS}a_negative_scale_reverses_and_a_zero_scale_ties_all",
    ),
    mutant(
        "ties of columns count queries of this rank from 0",
        "fastclip/distributed/retrieval.py", "count(sides, of_rows, of_columns, first)",
        "count(sides, of_rows, of_columns)", f"{ACROSS}ranks_equal_one_process",
    ),
    mutant(
        "counts of columns are this rank's",
        "fastclip/distributed/retrieval.py", "        shard.sum(found.columns)\n", "",
        f"{ACROSS}ranks_equal_one_process",
    ),
)  # fmt: skip
