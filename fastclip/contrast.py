"""`contrast`: statistics of rows and columns, from which a loss is a few lines of PyTorch."""

from __future__ import annotations

from torch import Tensor

from .engine.autograd import refuse_forward_mode
from .engine.backends import choose
from .engine.beside import Given
from .engine.block import NO_POSITIVES
from .engine.checks import budget_of
from .engine.contrast_checks import check_contrast
from .engine.dense_statistics import dense_contrast
from .engine.dtypes import product_dtype
from .engine.line_formulas import Request
from .engine.line_statistics import line_statistics
from .engine.statistics_call import StatisticsInputs, StatisticsOptions, block_of
from .kinds import LineStatistics


def contrast(
    x: Tensor,  # (M, D)
    y: Tensor | None,  # (N, D)
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    offset: int | None = 0,
    labels: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | Tensor | None = None,
    same_id: str = "ignore",
    false_negative_margin: Tensor | float | None = None,
    key_bias: Tensor | None = None,
    rows: bool = True,
    columns: bool = True,
    means: bool = False,
    kind: str = "softmax",
    above: float | None = None,
    targets: tuple[Tensor, Tensor, Tensor | float] | None = None,
    guide: tuple[Tensor, Tensor] | Tensor | None = None,
    limits: Tensor | None = None,
    normalize: bool = False,
    backend: str | None = None,
    memory_budget: int | None = None,
) -> LineStatistics:
    """Returns statistics of each row and column of an M x N matrix of logits, without the matrix.

        c = contrast(x, y, logit_scale)

    computes the same as

        logits = (logit_scale * x @ y.T).double()
        own = torch.eye(M, N, dtype=torch.bool)
        negatives = logits.masked_fill(own, -math.inf)
        c.rows, c.columns = negatives.logsumexp(1), negatives.logsumexp(0)
        c.positives = logits.diagonal()  # NaN where a row has no column of its own

    A loss is a few lines that use these statistics; autograd gives its exact gradients:

        loss = (F.softplus(c.rows - c.positives) + F.softplus(c.columns - c.positives)).mean() / 2
        loss = F.softplus(c.rows - c.positives).mean()  # InfoNCE, one way (arXiv 1807.03748)
        loss = (c.rows - c.positives).mean()            # decoupled (arXiv 2110.06848)
        rows = torch.logaddexp(c.rows, contrast(x, queue, logit_scale, offset=None).rows)

    Args:
        x, y: (M, D), (N, D), float64, float32, bfloat16 or float16, any strides. Mixed dtypes
            promote, those of targets and guide included, and autocast applies as in `clip_loss`.
            y may be None: x is contrasted with itself, the pairs of a feature with itself are left
            out, and only rows are returned.
        logit_scale: already exponentiated; a number or a tensor of one element.
        logit_bias: a number or a tensor of one element, added to all logits; None: 0.
        offset: the own positive of row i is column i + offset, if there is such a column; None: no
            row has an own positive.
        labels: (M), integers: the column of each row's own positive, in place of offset. Several
            rows may share a column.
        ids: (x_ids (M), y_ids (N)), integers. A pair with equal ids is not a negative. One tensor
            (M) if y is None. With labels a row must have the id of its own positive.
        same_id: "ignore" leaves pairs with equal ids out; "positive" makes them positives of their
            row and their column, beside the own positives.
        false_negative_margin: a number or a tensor of one element, in units of the similarity
            `<x_i, y_j>`, after `normalize` and before the scale. A line (a row or a column) leaves
            out each negative whose similarity exceeds that of the line's own positive by more than
            the margin. At margin 0 duplicates of the positive stay. A line without an own positive
            keeps all its negatives, and with labels all columns do. No gradient flows through the
            comparison.
        key_bias: (N), floating point, added to the logits of each column, with a gradient; -inf
            takes a column out.
        rows, columns: which statistics to compute; the others are None.
        means: also return the mean logit of each line's pairs and, with same_id="positive", of its
            positives: for label smoothing, and for losses with several positives.
        kind: "softmax" for log-sum-exps, "sigmoid" for sums of softplus, "hinge" for sums of
            hinges. `fastclip.kinds` explains how to add a kind.
        above: for kind="hinge": a line's statistic is the sum of `relu(logit - level)` over its
            negatives, and its level is the own positive's logit plus this number (with a gradient).
            A line without an own positive has 0.
        targets: (x' (M, D'), y' (N, D'), scale'), the features of a teacher, for distillation: the
            expectation of each line's logits under the softmax of `scale' * x' @ y'.T` is also
            returned. It is over all pairs of the line, own positives and those that ids or a margin
            leave out included. The teacher gets no gradients.
        guide: (x' (M, D'), y' (N, D')), or x' alone if y is None: the margin and the limits are
            compared with the similarities of these features (GISTEmbed, arXiv 2402.16829).
        limits: (M), floating point, in place of the margin: a row leaves out negatives whose
            similarity exceeds its limit. Columns keep all of theirs.
        normalize: divide rows of x and y, and of targets or guide, by max(norm, 1e-12) first,
            fused.
        backend, memory_budget: as in `clip_loss`. The plain PyTorch engine serves kinds that the
            compiled engines do not have.

    Returns:
        `LineStatistics`: rows (M), columns (N), positives (M), and with `same_id="positive"`
        row_positives (M), column_positives (N); further fields with `means` and `targets`. They are
        float64: at scale 100 float32 statistics would make the gradients less accurate than dense
        float32 logits do. They are differentiable once, with respect to x, y, logit_scale,
        logit_bias and key_bias. The statistic of a line without pairs is -inf (sigmoid and hinge:
        0) and has no gradient.

    Raises:
        TypeError: features, labels, ids or key_bias that are not tensors or have another dtype; an
            offset that is not an int; a scale, bias or margin that is not a number.
        ValueError: shapes or devices that do not fit, an empty side, an unknown kind, same_id or
            backend, same_id="positive" without ids, neither rows nor columns, a memory_budget that
            is not an int >= 0, an offset beyond 2^62; options that exclude each other (targets and
            guide, limits and a margin, targets and key_bias or a kind with levels), a guide with
            neither margin nor limits, a kind with levels without `above`, options that need y if y
            is None; on CPUs labels that are not columns, or whose ids differ.
        RuntimeError: except with backend="reference", forward-mode differentiation
            (torch.func.jvp, dual numbers) and a second derivative.
    """
    one_set = y is None
    given = Given(ids, false_negative_margin, labels, targets, guide, limits)
    y, scale, bias, beside = check_contrast(
        x, y, logit_scale, logit_bias, key_bias, given, offset=offset, same_id=same_id, rows=rows,
        columns=columns, kind=kind, above=above,
    )  # fmt: skip
    dtype, logits = product_dtype(x, y, *beside.targets()), x.shape[0] * y.shape[0]
    engine = choose(backend, x.device, dtype, logits, x.shape[1], kind)
    budget = budget_of(memory_budget, x.device)
    inputs = StatisticsInputs(x, y, scale, bias, key_bias)
    if engine == "reference":
        return dense_contrast(
            x, None if one_set else y, scale, bias, offset=offset, labels=labels, ids=ids,
            same_id=same_id, false_negative_margin=beside.margin, key_bias=key_bias, rows=rows,
            columns=columns, means=means, kind=kind, above=above, targets=targets, guide=guide,
            limits=limits, normalize=normalize,
        )  # fmt: skip
    refuse_forward_mode(*inputs)
    columns = bool(columns) and not one_set
    teaches = beside.target_scale is not None
    request = Request(bool(rows), columns, same_id == "positive", bool(means), teaches, one_set)
    options = StatisticsOptions(engine, dtype, normalize, budget, above, request)
    offset = NO_POSITIVES if offset is None else offset
    block = block_of(inputs, beside, offset, kind, options)
    return line_statistics(inputs, block, beside.labels, options)
