"""Mutants of `cached_step`."""

from mutants.mutant import mutant

BACKWARD = "tests/cached/test_cached_backward.py::test_"
ENCODINGS = "tests/cached/test_cached_encodings.py::test_"
INPUTS = "tests/cached/test_cached_inputs.py::test_"
RANKS = "tests/distributed/test_cached_ranks.py::test_"
STEP = "tests/cached/test_cached_step.py::test_"

MUTANTS = (
    mutant(
        "numpy's generator is not replayed",
        "fastclip/cached/random_state.py",
        'sys.modules["numpy"].random.set_state(self._numpy)', "pass",
        f"{ENCODINGS}global_generators_are_replayed[numpy]",
    ),
    mutant(
        "Python's generator is not replayed",
        "fastclip/cached/random_state.py",
        "random.setstate(self._python)", "pass",
        f"{ENCODINGS}global_generators_are_replayed[Python]",
    ),
    mutant(
        "the generators stay where the second encoding left them",
        "fastclip/cached/random_state.py",
        "before.set()", "pass",
        f"{STEP}a_loss_that_draws_goes_on_drawing",
    ),
    mutant(
        "a batch without rows has no micro-batch",
        "fastclip/cached/inputs.py",
        "([rest] if rest or not rows else [])", "([rest] if rest else [])",
        f"{RANKS}a_rank_without_pairs",
    ),
    mutant(
        "results of operations are taken as inputs",
        "fastclip/cached/inputs.py",
        "entry.grad_fn is not None", "False",
        f"{STEP}errors",
    ),
    mutant(
        "a mapping loses its type",
        "fastclip/cached/inputs.py",
        "if type(batch) is dict or", "if True or type(batch) is dict or",
        f"{INPUTS}any_batch[mapping with attributes]",
    ),
    mutant(
        "rows of features are not counted",
        "fastclip/cached/outputs.py",
        "value.shape[0] != rows", "False",
        f"{STEP}errors",
    ),
    mutant(
        "shared values get a gradient with every tower",
        "fastclip/cached/second_pass.py",
        "            if is_last:\n", "            if is_last_of_tower:\n",
        f"{INPUTS}two_towers[tuple-one]",
    ),
    mutant(
        "shared values get a gradient with every micro-batch",
        "fastclip/cached/second_pass.py",
        "self._send(of_rows + _zeros(of_batch))", "self._send(of_rows + of_batch)",
        f"{BACKWARD}it_is_called_once_for_each_micro_batch_with_the_loss",
    ),
    mutant(
        "the first tower's last micro-batch is not exchanged",
        "fastclip/cached/second_pass.py",
        "with nullcontext() if is_last_of_tower else", "with nullcontext() if is_last else",
        f"{RANKS}two_towers_in_ddp",
    ),
    mutant(
        "the scale of a scaler is not undone",
        "fastclip/cached/gradients.py",
        "factor = factor / ctx.divisor", "pass",
        f"{BACKWARD}a_scaler_keeps_gradients_of_fp16_features[True]",
    ),
    mutant(
        "the factor is rounded to the gradient's dtype",
        "fastclip/cached/gradients.py",
        "(g.to(torch.promote_types(g.dtype, factor.dtype)) * factor.to(g.device)).to(g.dtype)",
        "g * factor.to(g.dtype)",
        f"{BACKWARD}the_factor_is_not_rounded_to_half",
    ),
    mutant(
        "the loss's own parameters get nothing",
        "fastclip/cached/second_pass.py",
        "once = list(gradients.of_leaves)", "once = []",
        f"{STEP}parameters_of_the_loss_get_gradients",
    ),
    mutant(
        "encodings are compared on average",
        "fastclip/cached/comparison.py",
        "largest = [excess.amax()", "largest = [excess.mean()",
        f"{ENCODINGS}one_row_is_enough",
    ),
    mutant(
        "autocast's rounding counts as a difference",
        "fastclip/cached/comparison.py",
        "if torch.is_autocast_enabled(x.device.type):", "if False:",
        f"{ENCODINGS}under_autocast_the_rounding_is_that_of_its_dtype",
    ),
    mutant(
        "a model inside DDP is no reason to warn",
        "fastclip/cached/step.py",
        "if with_gradients and not wrappers and backward is None:", "if False:",
        f"{RANKS}a_model_inside_ddp_has_a_fake_curve",
    ),
    mutant(
        "DDP behind a function is not found",
        "fastclip/cached/wrappers.py",
        "for cell in model.__closure__ or ():", "for cell in ():",
        f"{RANKS}ddp_behind_a_function",
    ),
    mutant(
        "a difference on one rank is that rank's alone",
        "fastclip/cached/ranks.py",
        "dist.all_reduce(excess, dist.ReduceOp.MAX, group=group)", "pass",
        f"{RANKS}a_misfit_is_an_error_on_all_ranks[encodings-ddp]",
    ),
    mutant(
        "ranks do not compare their options",
        "fastclip/cached/ranks.py",
        "if len(set(values)) > 1:", "if False:",
        f"{RANKS}numbers_of_micro_batches[buffers]",
        hangs=True,
    ),
)  # fmt: skip
