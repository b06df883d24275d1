"""Mutants of the benchmark's measurements, models and tables."""

from mutants.mutant import mutant

FIGURES = "tests/bench/test_bench_gpu_figures.py::test_"
MEASURES = "tests/bench/test_bench_measures.py::test_"
SCALE = "tests/bench/test_bench_scale.py::test_"
TABLES = "tests/bench/test_bench_tables.py::test_"
TRUTH = "tests/bench/test_bench_truth.py::test_"

MUTANTS = (
    mutant(
        "a peak is measured from an earlier one",
        "bench/measure/memory.py",
        "return max(0, mark - level)", "return max(0, mark - before)",
        f"{MEASURES}a_peak_is_the_mark_above_the_level",
    ),
    mutant(
        "open_clip gathers features once",
        "bench/scale/model.py",
        "4 * job.ranks * job.features", "2 * job.ranks * job.features",
        f"{SCALE}bytes_of_open_clip",
    ),
    mutant(
        "the first step's texts are sent twice",
        "bench/scale/model.py",
        "waiting = steps[step - 1] if step > 1 else 0", "waiting = steps[step - 1] if step else 0",
        f"{SCALE}a_ring_of_four_whose_exchanges_take_longer_than_its_work",
    ),
    mutant(
        "both ways meet twice",
        "bench/scale/model.py",
        "[1] + [2] * full + [1] * one", "[1] + [2] * full + [2] * one",
        f"{SCALE}every_block_is_visited_once",
    ),
    mutant(
        "network cards add up beyond a node's own links",
        "bench/scale/model.py",
        "min(self.within, self.node * self.across)", "self.node * self.across",
        f"{SCALE}a_nodes_cards_are_no_faster_than_its_links",
    ),
    mutant(
        "the fraction of four passes is that of a quarter",
        "bench/measure/runner.py",
        "row.fraction * 4 / row.passes", "row.fraction * row.passes / 4",
        "tests/bench/test_bench_runs.py::test_figures_follow_from_times",
    ),
    mutant(
        "a rate is in TFLOP/s",
        "bench/measure/runner.py",
        "case.pass_flops / timing.median / 1e9", "case.pass_flops / timing.median / 1e12",
        "tests/bench/test_bench_runs.py::test_figures_follow_from_times",
    ),
    mutant(
        "a speed-up is a slow-down",
        "bench/measure/runner.py",
        "times[rival].median / timing.median", "timing.median / times[rival].median",
        "tests/bench/test_bench_runs.py::test_figures_follow_from_times",
    ),
    mutant(
        "the rest includes the budget",
        "bench/measure/runner.py",
        "row.peak_mib - row.gradients_mib - row.budget_mib)", "row.peak_mib - row.gradients_mib)",
        "tests/bench/test_bench_runs.py::test_the_rest_is_beyond_gradients_and_budget",
    ),
    mutant(
        "an exact dense loss makes any error look large",
        "bench/report/goals_cpu.py",
        "*(max(dense, FLOAT32_EPS) for _, dense in known)", "*(dense for _, dense in known)",
        "tests/bench/test_bench_goals.py::test_an_error_is_compared_with_at_least_float32s_own",
    ),
    mutant(
        "the best case stands for all",
        "bench/report/goals_cpu.py",
        "return worst_of((getattr(row, column) for some in chosen for row in some), min)",
        "return worst_of((getattr(row, column) for some in chosen for row in some), max)",
        "tests/bench/test_bench_goals.py::test_the_worst_case_stands_for_all",
    ),
    mutant(
        "a goal is reached if one scale reaches it",
        "bench/report/goals.py",
        "if known and all(goal.reached(figure, goal.floor)",
        "if known and any(goal.reached(figure, goal.floor)",
        f"{TABLES}goals_are_reached_missed_or_not_measured",
    ),
    mutant(
        "a half-precision row's own copy counts as memory",
        "bench/report/goals_cpu.py",
        "allowed = 4 * row.n * row.d / 2**20 if half else 0.0", "allowed = 0.0",
        "tests/bench/test_bench_goals.py::test_half_precision_may_hold_one_matrix_more",
    ),
    mutant(
        "a truth cancels for well separated pairs",
        "bench/measure/truth.py",
        "torch.logaddexp(zero, rows - positive) + torch",
        "torch.logaddexp(rows, positive) - positive + torch",
        f"{TRUTH}truth_does_not_lose_a_loss_that_the_usual_form_rounds_to_zero",
    ),
    mutant(
        "the truth's positives pull one way",
        "bench/measure/truth.py",
        "dy[:m] = p[:, None] * x", "dy[:m] = 0.5 * p[:, None] * x",
        f"{TRUTH}truth_is_the_float64_reference_where_that_is_well_conditioned",
    ),
    mutant(
        "an error is relative to the value in the place of the truth",
        "bench/measure/truth.py",
        "(value.detach().double() - true).norm(), true.norm()",
        "(value.detach().double() - true).norm(), value.double().norm()",
        f"{TRUTH}a_relative_error_is_seen_in_one_wrong_element",
    ),
    mutant(
        "quartiles are the extremes",
        "bench/measure/timing.py",
        'method="inclusive"', 'method="exclusive"',
        f"{MEASURES}methods_take_turns_and_the_median_is_of_their_rounds",
    ),
    mutant(
        "the spread is the whole distance between the quartiles",
        "bench/report/table.py",
        "50 * (row.high_ms - row.low_ms) / row.ms", "100 * (row.high_ms - row.low_ms) / row.ms",
        f"{TABLES}the_report_shows_time_ratio_memory_and_what_did_not_run",
    ),
    mutant(
        "an all-gather sends what it receives",
        "bench/measure/traffic.py",
        "own * (ranks - 1)\n\n\ndef _but_its_own", "own * ranks\n\n\ndef _but_its_own",
        "tests/bench/test_bench_distributed.py::test_what_a_rank_sends_is_counted_once",
    ),
    mutant(
        "a prediction's share is inverted",
        "bench/distributed/table.py",
        "row.predicted_ms / row.ms", "row.ms / row.predicted_ms",
        "tests/bench/test_bench_distributed.py"
        "::test_the_report_and_the_page_show_times_bytes_memory_and_predictions",
    ),
    mutant(
        "kept products save a pass more than they hold",
        "bench/methods/passes.py",
        "both - min(keeping, kept / (4 * pairs))", "both - min(keeping, kept / pairs)",
        f"{TRUTH}passes_follow_what_the_budget_keeps",
    ),
    mutant(
        "a copy's bytes count once",
        "bench/gpu/rates.py",
        "moved = 2 * source.numel() / 1e9", "moved = source.numel() / 1e9",
        f"{FIGURES}rates_are_work_over_time",
    ),
    mutant(
        "a square product is half as much work",
        "bench/gpu/rates.py",
        "2 * size**3 / 1e12", "size**3 / 1e12",
        f"{FIGURES}rates_are_work_over_time",
    ),
)  # fmt: skip
