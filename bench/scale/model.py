"""Step time and memory of a loss across many GPUs, by arithmetic: nothing here is measured.

    python -m bench scale --tflops 400 --across 50 --pairs 4096

A block is b rows by b columns of logits; a pass over it is one product of 2 b^2 D FLOP. Each of R
ranks has R blocks. E is bytes per feature element; gradients travel in fp32.

    gathered   R blocks' 4 passes; then texts, (R - 1) b D E, and gradients, 4 (R - 1) b D, one
               after the other with them
    ring       the same passes, two blocks a step; texts travel in the forward and again in the
               backward, gradients behind them, while the next two blocks are worked on
    open_clip  own rows and own columns, so twice the blocks, 3 passes each, built in memory; both
               towers' features travel, and both gradients, in the features' dtype

`Cluster` is what is assumed of GPUs, `Loopback` what was measured of processes on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

FORWARD, BACKWARD = 1, 3  # passes; with kept products or no state to wait for, one less in all
# Of a pair, for its row or its column, in float64: states, coefficients, what is between them.
STATE_BYTES = 100
# Sums and references of columns, positives, the bound and the upstream gradient, to all ranks.
STATE_BYTES_SENT, STATE_EXCHANGES = 40, 5
# How often open_clip's loss reads or writes a logit: a product's write, log-softmax (2); then the
# zeros of its gradient, log-softmax's backward (3), two products' reads.
ACCESSES = 9
# Of b x B logits at once in open_clip's loss: both directions' logits and log-softmax; later both
# log-softmax and two gradients.
LOGITS_HELD = 4
# Other ranks' blocks around a ring, at most at a time: of features, of gradients.
RING_FEATURES, RING_GRADIENTS = 4, 6


@dataclass(frozen=True)
class Job:
    """One step: b pairs of width d on each rank."""

    ranks: int
    b: int
    d: int = 1024
    itemsize: int = 2
    passes: float = FORWARD + BACKWARD
    small: int = STATE_EXCHANGES  # exchanges of a number or two for each pair

    @property
    def batch(self) -> int:
        return self.ranks * self.b

    @property
    def others(self) -> int:
        return self.ranks - 1

    @property
    def block_flops(self) -> float:
        """Of one pass over one block."""
        return 2.0 * self.b * self.b * self.d

    @property
    def features(self) -> int:
        """Bytes of a rank's."""
        return self.b * self.d * self.itemsize

    @property
    def gradients(self) -> int:
        return self.b * self.d * 4


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Rates are per GPU and one way; none was measured."""

    flops: float = 400e12  # of the loss's own products, epilogue included
    gemm: float = 600e12  # of bare products
    memory: float = 3.35e12  # bytes/s
    within: float = 450e9  # bytes/s to a GPU of the same node
    across: float = 50e9  # bytes/s of the GPU's own network card
    node: int = 8  # GPUs
    latency: float = 10e-6  # seconds of one exchange
    overlaps = True

    def gather(self, sent: float, ranks: int) -> float:
        """Of `sent` bytes a rank. A ring of GPUs enters and leaves a node through one card; as many
        rings as cards, which libraries make, use all of them. Every node is waited for once."""
        if ranks == 1:
            return 0.0
        return sent / self._rate(ranks) + math.ceil(ranks / self.node) * self.latency

    scatter = gather

    def combine(self, sent: float, ranks: int, times: int) -> float:
        """Small numbers of all ranks, in so many calls: trees."""
        if ranks == 1:
            return 0.0
        return sent / self._rate(ranks) + times * math.ceil(math.log2(ranks)) * self.latency

    def _rate(self, ranks: int) -> float:
        return self.within if ranks <= self.node else min(self.within, self.node * self.across)

    def exchange(self, each: float, ways: int, ranks: int) -> float:
        """One message with each neighbour; at a node's edge one of them is across."""
        if ways == 0 or ranks == 1:
            return 0.0
        across = each / self.across if ranks > self.node else 0.0
        return max(ways * each / self.within, across) + self.latency

    def home(self, each: float, ways: int, ranks: int) -> float:
        """Messages to ranks halfway round."""
        if ways == 0 or ranks == 1:
            return 0.0
        rate = self.within if ranks <= self.node else self.across
        return ways * each / rate + self.latency


@dataclass(frozen=True)
class Loopback:
    """Processes on one machine, as measured there: exchanges are copies, made by the cores that
    compute, so nothing overlaps. Rates are bytes/s that a rank sends."""

    flops: float
    gathered: float
    scattered: float
    hopped: float
    small: float  # seconds of an exchange of a number for each pair
    overlaps = False

    def gather(self, sent: float, ranks: int) -> float:
        return sent / self.gathered

    def scatter(self, sent: float, ranks: int) -> float:
        return sent / self.scattered

    def combine(self, sent: float, ranks: int, times: int) -> float:
        return times * self.small

    def exchange(self, each: float, ways: int, ranks: int) -> float:
        return ways * each / self.hopped

    home = exchange


Network = Cluster | Loopback


def states_seconds(job: Job, net: Network) -> float:
    return net.combine(STATE_BYTES_SENT * job.b * job.others, job.ranks, job.small)


def compute_seconds(job: Job, net: Network) -> float:
    return job.ranks * job.passes * job.block_flops / net.flops


def gathered_seconds(job: Job, net: Network) -> float:
    exchanged = net.gather(job.others * job.features, job.ranks) + net.scatter(
        job.others * job.gradients, job.ranks
    )
    return compute_seconds(job, net) + exchanged + states_seconds(job, net)


def steps_of(ranks: int) -> list[int]:
    """Blocks of each step around the ring: own ones, then two, one where both ways meet."""
    full, one = divmod(ranks - 1, 2)
    return [1] + [2] * full + [1] * one


def ring_seconds(job: Job, net: Network) -> float:
    """Step by step the longer of work and exchanges, or their sum where nothing overlaps."""
    together: Callable[[float, float], float] = max if net.overlaps else float.__add__
    steps = [*steps_of(job.ranks), 0]
    pass_seconds = job.block_flops / net.flops
    forward, backward = FORWARD * pass_seconds, (job.passes - FORWARD) * pass_seconds
    total = states_seconds(job, net)
    for step, blocks in enumerate(steps[:-1]):
        texts = net.exchange(job.features, steps[step + 1], job.ranks)
        # Gradients of the step before last have been summed and follow.
        waiting = steps[step - 1] if step > 1 else 0
        gradients = net.exchange(job.gradients, waiting, job.ranks)
        total += together(blocks * forward, texts)
        total += together(blocks * backward, texts + gradients)
    return total + (net.home(job.gradients, steps[-2], job.ranks) if job.ranks > 1 else 0.0)


def open_clip_seconds(job: Job, net: Cluster) -> float:
    """Of its local loss with gradients from all ranks."""
    products = 2 * job.ranks * (FORWARD + 2) * job.block_flops / net.gemm
    logits = 2 * job.b * job.batch * job.itemsize * ACCESSES / net.memory
    sent = 2 * job.others * job.features
    return products + logits + net.gather(sent, job.ranks) + net.scatter(sent, job.ranks)


# ---- memory beyond the inputs, in bytes, as `fastclip.distributed.clip_loss` states it -----------


def _own(job: Job) -> int:
    """A rank's gradients, in fp32 and in the features' dtype, and states of all pairs."""
    return 2 * (job.features + job.gradients) + STATE_BYTES * job.batch


def gathered_bytes(job: Job, scratch: int = 0) -> int:
    """All texts, and their gradients in fp32.

    scratch: kept products, an engine's work space, what a library adds gradients up in.
    """
    return job.ranks * (job.features + job.gradients) + _own(job) + scratch


def ring_bytes(job: Job, scratch: int = 0) -> int:
    blocks = RING_FEATURES * job.features + RING_GRADIENTS * job.gradients
    return blocks + _own(job) + scratch


def open_clip_bytes(job: Job) -> int:
    """Both towers' features of all ranks, twice while they are put together, or their gradients."""
    logits = LOGITS_HELD * job.b * job.batch * job.itemsize
    return logits + 4 * job.ranks * job.features


# ---- where the ring comes to be better -----------------------------------------------------------


def hidden_from(net: Cluster, itemsize: int = 2) -> int:
    """The least b whose work on a step's two blocks takes as long as the step's exchanges across
    nodes: from there on the ring waits for nothing but its start and end. Independent of R and D.
    """
    rate = min(net.within / 2, net.across)
    forward = net.flops * itemsize / (2 * 2 * FORWARD * rate)
    backward = net.flops * (itemsize + 4) / (2 * 2 * BACKWARD * rate)
    return math.ceil(max(forward, backward))


def faster_from(ranks: int, net: Cluster, most: int = 1 << 17, **job: int) -> int | None:
    """The least b, a multiple of 64, from which on the ring is faster; None beyond `most`."""
    unit = 64

    def faster(units: int) -> bool:
        one = Job(ranks, unit * units, **job)
        return ring_seconds(one, net) < gathered_seconds(one, net)

    low, high = 0, most // unit
    if not faster(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return unit * high


def most_pairs(room: float, held: Callable[[Job], int], b: int, **job: int) -> int:
    """The largest batch of b pairs a rank whose memory fits, whatever the number of ranks."""
    fits, ranks = 0, 1
    while held(Job(ranks, b, **job)) <= room and ranks < 1 << 24:
        fits, ranks = ranks, 2 * ranks
    low, high = fits, ranks
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(Job(middle, b, **job)) <= room else (low, middle)
    return low * b
