"""Retrieval without the matrix of scores: ranks and recall, the k best keys, sampled negatives.

Queries (M, D) and keys (N, D) are features; the score of a pair is the product of its features.
Every function streams the scores and keeps O(M + N) numbers besides its result.

Scores are exact: products in float32 decide most comparisons, and sums in float64 decide those that
rounding could change. Results are therefore the same on every engine, device and number of threads,
equal features tie, and of equal scores the key with the lower index comes first.
"""

from .metrics import metrics
from .negatives import sample_negatives
from .ranks import Ranks, ranks
from .topk import topk

__all__ = ["Ranks", "metrics", "ranks", "sample_negatives", "topk"]
