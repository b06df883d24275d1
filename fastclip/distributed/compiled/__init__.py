"""Losses across ranks in compiled graphs (`torch.compile(fullgraph=True)`).

A loss is one operator for the forward and one for the backward. Checks, the agreement of the ranks
and all exchanges happen inside these operators, so that a graph holds the loss whole and
communicates when it runs, never while it is compiled. The forward returns the loss, or the
statistics, and then all tensors that the backward takes, among them what the ranks exchanged.

Compilers ask the operator's fake for the shapes of the results. The fake runs the same functions
on a shard whose exchanges return tensors of the right shapes and send nothing. All ranks may load
one graph from disk, so shapes depend on the arguments of the operator only, never on the rank.

All ranks have batches of one size here. Sizes that differ are only known when the graph runs.
"""
