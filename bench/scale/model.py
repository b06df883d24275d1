"""A model of a loss's step time and memory across many GPUs; nothing here is measured.

    python -m bench scale --tflops 400 --across 50 --pairs 4096

A block is b rows by b columns of logits; a pass over it is one matmul of 2 b^2 D FLOP. Each of R
ranks has R blocks. E is bytes per feature element; gradients are sent in fp32.

    gathered   4 passes over R blocks, the all-gather of texts, (R - 1) b D E bytes, and the
               reduce-scatter of their gradients, 4 (R - 1) b D bytes, without overlap
    ring       the same passes, two blocks per step. Texts are sent in the forward and again in the
               backward, followed by gradients, overlapping the work on the next two blocks
    open_clip  3 passes over 2 R blocks (own rows and own columns), with logits in memory; features
               and gradients of both towers are sent, in the features' dtype

`Cluster` holds assumptions about GPUs, `Loopback` measurements of processes on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Passes; one less in all with kept products, or if weights need no state.
FORWARD, BACKWARD = 1, 3
# Bytes per pair in float64: states, coefficients and temporaries of its row and column.
STATE_BYTES = 100
# Sent to all ranks: sums and shifts of columns, positives, the bound and the upstream gradient.
STATE_BYTES_SENT, STATE_EXCHANGES = 40, 5
# Reads and writes of each logit in open_clip's loss: 1 by the matmul, 2 by log-softmax; in the
# backward 1 to zero its gradient, 3 by log-softmax's backward, 2 by two matmuls.
ACCESSES = 9
# Matrices of b x B that open_clip's loss holds at once: logits and log-softmax of both directions;
# later both log-softmax and two gradients.
LOGITS_HELD = 4
# The most blocks of other ranks that a rank of a ring holds at once: of features, of gradients.
RING_FEATURES, RING_GRADIENTS = 4, 6


@dataclass(frozen=True)
class Job:
    """One step: b pairs of width d on each rank."""

    ranks: int
    b: int
    d: int = 1024
    itemsize: int = 2
    passes: float = FORWARD + BACKWARD
    small: int = STATE_EXCHANGES  # exchanges of one or two numbers per pair

    @property
    def batch(self) -> int:
        return self.ranks * self.b

    @property
    def others(self) -> int:
        return self.ranks - 1

    @property
    def block_flops(self) -> float:
        """FLOPs of one pass over one block."""
        return 2.0 * self.b * self.b * self.d

    @property
    def features(self) -> int:
        """Bytes of one rank's features, of one tower."""
        return self.b * self.d * self.itemsize

    @property
    def gradients(self) -> int:
        return self.b * self.d * 4


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Rates are per GPU and in one direction; none was measured."""

    flops: float = 400e12  # FLOP/s of the loss's own matmuls, epilogue included
    gemm: float = 600e12  # FLOP/s of bare matmuls
    memory: float = 3.35e12  # bytes/s
    within: float = 450e9  # bytes/s to a GPU of the same node
    across: float = 50e9  # bytes/s to another node, by the GPU's own network card
    node: int = 8  # GPUs
    latency: float = 10e-6  # seconds of one exchange
    overlaps = True

    def gather(self, sent: float, ranks: int) -> float:
        """Seconds of an all-gather in which each rank sends `sent` bytes.

        A ring of GPUs enters and leaves a node through one network card; libraries make as many
        rings as there are cards, and so use all of them. Each node adds one latency.
        """
        if ranks == 1:
            return 0.0
        return sent / self._rate(ranks) + math.ceil(ranks / self.node) * self.latency

    scatter = gather

    def combine(self, sent: float, ranks: int, times: int) -> float:
        """Seconds of `times` small all-reduces, along trees."""
        if ranks == 1:
            return 0.0
        return sent / self._rate(ranks) + times * math.ceil(math.log2(ranks)) * self.latency

    def _rate(self, ranks: int) -> float:
        return self.within if ranks <= self.node else min(self.within, self.node * self.across)

    def exchange(self, each: float, ways: int, ranks: int) -> float:
        """Seconds of one message to each of `ways` neighbours. At a node's edge one of them is in
        another node."""
        if ways == 0 or ranks == 1:
            return 0.0
        across = each / self.across if ranks > self.node else 0.0
        return max(ways * each / self.within, across) + self.latency

    def home(self, each: float, ways: int, ranks: int) -> float:
        """Seconds of `ways` messages to ranks half-way around the ring."""
        if ways == 0 or ranks == 1:
            return 0.0
        rate = self.within if ranks <= self.node else self.across
        return ways * each / rate + self.latency


@dataclass(frozen=True)
class Loopback:
    """Processes on one machine, with measured rates in bytes/s sent by a rank. The cores that
    compute also copy the messages, so nothing overlaps."""

    flops: float
    gathered: float
    scattered: float
    hopped: float
    small: float  # seconds of an exchange of one number per pair
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
    """Blocks per step around the ring: first its own, then two, and one if both ways meet."""
    full, one = divmod(ranks - 1, 2)
    return [1] + [2] * full + [1] * one


def ring_seconds(job: Job, net: Network) -> float:
    """Sums over the steps the longer of work and exchanges, or both if nothing overlaps."""
    together: Callable[[float, float], float] = max if net.overlaps else float.__add__
    steps = [*steps_of(job.ranks), 0]
    pass_seconds = job.block_flops / net.flops
    forward, backward = FORWARD * pass_seconds, (job.passes - FORWARD) * pass_seconds
    total = states_seconds(job, net)
    for step, blocks in enumerate(steps[:-1]):
        texts = net.exchange(job.features, steps[step + 1], job.ranks)
        # Gradients of the step before last are summed by now, and are sent.
        waiting = steps[step - 1] if step > 1 else 0
        gradients = net.exchange(job.gradients, waiting, job.ranks)
        total += together(blocks * forward, texts)
        total += together(blocks * backward, texts + gradients)
    return total + (net.home(job.gradients, steps[-2], job.ranks) if job.ranks > 1 else 0.0)


def open_clip_seconds(job: Job, net: Cluster) -> float:
    """Seconds of open_clip's local loss with gradients from all ranks."""
    products = 2 * job.ranks * (FORWARD + 2) * job.block_flops / net.gemm
    logits = 2 * job.b * job.batch * job.itemsize * ACCESSES / net.memory
    sent = 2 * job.others * job.features
    return products + logits + net.gather(sent, job.ranks) + net.scatter(sent, job.ranks)


# ---- memory beyond the inputs, in bytes, as `fastclip.distributed.clip_loss` states it -----------


def _own(job: Job) -> int:
    """Bytes of a rank's gradients, in fp32 and in the features' dtype, and of all pairs' states."""
    return 2 * (job.features + job.gradients) + STATE_BYTES * job.batch


def gathered_bytes(job: Job, scratch: int = 0) -> int:
    """All texts, and their gradients in fp32.

    scratch: kept products, an engine's work space, a library's buffers for sums of gradients.
    """
    return job.ranks * (job.features + job.gradients) + _own(job) + scratch


def ring_bytes(job: Job, scratch: int = 0) -> int:
    blocks = RING_FEATURES * job.features + RING_GRADIENTS * job.gradients
    return blocks + _own(job) + scratch


def open_clip_bytes(job: Job) -> int:
    """All ranks' features of both towers, twice while they are concatenated, or their gradients."""
    logits = LOGITS_HELD * job.b * job.batch * job.itemsize
    return logits + 4 * job.ranks * job.features


# ---- the sizes from which the ring is better -----------------------------------------------------


def hidden_from(net: Cluster, itemsize: int = 2) -> int:
    """The least b at which the work on a step's two blocks takes as long as the step's exchanges
    across nodes. From there on the ring waits only at its start and end. Independent of R and D.
    """
    rate = min(net.within / 2, net.across)
    forward = net.flops * itemsize / (2 * 2 * FORWARD * rate)
    backward = net.flops * (itemsize + 4) / (2 * 2 * BACKWARD * rate)
    return math.ceil(max(forward, backward))


def faster_from(ranks: int, net: Cluster, most: int = 1 << 17, **job: int) -> int | None:
    """The least b, a multiple of 64, from which the ring is faster; None if it exceeds `most`."""
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
    """The largest batch, at b pairs per rank, with which a rank's memory fits in `room` bytes."""
    fits, ranks = 0, 1
    while held(Job(ranks, b, **job)) <= room and ranks < 1 << 24:
        fits, ranks = ranks, 2 * ranks
    low, high = fits, ranks
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(Job(middle, b, **job)) <= room else (low, middle)
    return low * b
