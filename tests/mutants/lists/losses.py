"""Mutants of the formulas of losses and of the loss modules."""

from mutants.mutant import mutant

FORMS = "tests/losses/test_family_forms.py::test_"
FAMILY = "tests/losses/test_family.py::test_"
MODULES = "tests/losses/test_family_modules.py::test_"

MUTANTS = (
    mutant(
        "halves are contrasted without their own pairs",
        "fastclip/formulas/nt_xent.py",
        "torch.logaddexp(_within(world, half, logit_scale), lines)", "lines",
        f"{FORMS}nt_xent_in_halves[torch-13]",
    ),
    mutant(
        "the first half's lines go to both",
        "fastclip/formulas/nt_xent.py",
        "zip(halves, (across.rows, across.columns), strict=True)",
        "zip(halves, (across.rows, across.rows), strict=True)",
        f"{FORMS}nt_xent_in_halves[torch-8]",
    ),
    mutant(
        "the second view is contrasted with the first one's own negatives",
        "fastclip/formulas/nt_xent.py",
        "for view in (x1, x2)]", "for view in (x1, x1)]",
        f"{FORMS}nt_xent_is_simclrs[torch]",
    ),
    mutant(
        "decoupled losses keep the positive",
        "fastclip/formulas/info_nce.py",
        "losses = gap if o.decoupled else", "losses = gap if False else",
        f"{FORMS}decoupled[torch]",
    ),
    mutant(
        "the margin is not scaled",
        "fastclip/formulas/info_nce.py",
        "scale.reshape(()).to(negatives.dtype) * o.margin if o.margin", "o.margin if o.margin",
        f"{FORMS}a_margin_is_cosfaces[torch]",
    ),
    mutant(
        "hardness also moves the positive",
        "fastclip/formulas/info_nce.py",
        "positives = positives - o.hardness * _similarity(positives, whole, o)", "pass",
        f"{FORMS}hardness_is_sentence_transformers[torch]",
    ),
    mutant(
        "hardness scales the features' gradients",
        "fastclip/formulas/info_nce.py",
        "rows = WeighedGradient.apply(x, scale / whole)", "rows = x",
        f"{FAMILY}every_shape_and_reduction[torch-hardness]",
    ),
    mutant(
        "smoothing counts a key that is taken out",
        "fastclip/formulas/info_nce.py",
        "gap = torch.where(positive == -torch.inf, 0, positive - of_pairs)",
        "gap = positive - of_pairs",
        f"{FAMILY}a_key_that_is_taken_out",
    ),
    mutant(
        "a mean counts lines without positives",
        "fastclip/formulas/reduction.py",
        "weights = self.weights if counts is None else counts.to(losses.dtype)",
        "weights = self.weights",
        f"{FORMS}supcon_is_the_papers[torch]",
    ),
    mutant(
        "a mean with weights divides by the number of lines",
        "fastclip/formulas/reduction.py",
        "number = weights.sum()", "number = torch.ones_like(weights).sum()",
        f"{FORMS}a_weight_of_zero_takes_a_query_out_but_not_its_key[torch]",
    ),
    mutant(
        "the hardest negatives of columns are those of rows",
        "fastclip/formulas/ranking.py",
        "[own] if symmetric else []", "[places[1]] if symmetric else []",
        f"{FORMS}the_sum_of_hinges_is_vses[torch]",
    ),
    mutant(
        "a line without negatives has a hinge",
        "fastclip/formulas/ranking.py",
        "torch.where(lines >= 0, F.relu(margin + t - positives), 0)",
        "F.relu(margin + t - positives)",
        f"{FORMS}a_line_whose_negatives_all_share_its_id_has_no_hinge[torch]",
    ),
    mutant(
        "distillation leaves the own pair out of the log-sum-exp",
        "fastclip/formulas/distill.py",
        "torch.logaddexp(lines, c.positives) - expected", "lines - expected",
        f"{MODULES}distillation[torch]",
    ),
    mutant(
        "SigLIP's positives by id count once",
        "fastclip/formulas/siglip.py",
        "(c.row_positives + c.column_positives) / 2", "c.row_positives / 2",
        f"{FORMS}siglip_with_ids[torch]",
    ),
    mutant(
        "the average keeps the new estimate's weight",
        "fastclip/loss/global_clip.py",
        "before + math.log1p(-self.gamma)", "before + math.log(self.gamma)",
        f"{MODULES}global_loss_over_steps[torch-v1]",
    ),
    mutant(
        "a mean over the batch includes the own pair",
        "fastclip/loss/global_clip.py",
        "(pairs - 1).clamp_min(1).log()", "pairs.clamp_min(1).log()",
        f"{MODULES}global_loss_over_steps[torch-v1]",
    ),
    mutant(
        "the temperature's gradient lacks the bound's",
        "fastclip/loss/global_clip.py",
        "tau * (value + self.rho) + tau.detach() * of_features",
        "tau * value + tau.detach() * (of_features + self.rho)",
        f"{MODULES}global_loss_over_steps[torch-v3]",
    ),
    mutant(
        "averages that are not finite stay",
        "fastclip/loss/global_clip.py",
        "torch.where(before.isfinite(), torch.logaddexp(old, new), log_g)",
        "torch.logaddexp(old, new)",
        f"{MODULES}global_loss_over_steps[torch-v1]",
    ),
    mutant(
        "texts' averages are the images'",
        "fastclip/loss/global_clip.py",
        "(c.columns, self.log_u_texts)", "(c.columns, self.log_u_images)",
        f"{MODULES}global_loss_over_steps[torch-v1]",
    ),
)  # fmt: skip
