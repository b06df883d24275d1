"""Losses across ranks in compiled graphs (`torch.compile(fullgraph=True)`).

A loss is one operator for the forward and one for the backward. Checks, the agreement of the ranks
and all exchanges happen inside these operators, so that a graph holds the loss whole and
communicates when it runs, never while it is compiled. The forward returns the loss, or the
statistics, and then all tensors that the backward takes, among them what the ranks exchanged.

Compilers ask a fake for the shapes of the results. It runs the same functions on a shard whose
exchanges return tensors of the right shapes and send nothing. Shapes depend on no rank's number,
and only on what the graph names: compilers keep graphs on disk for all ranks.

All ranks have batches of one size here. Sizes that differ are only known when the graph runs.
"""
