"""The number of threads is torch's, results do not depend on it, and no other thread is blocked."""

import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from support.block_operators import make_weights, operator, sweep, weigh
from support.dense_block import DENSE_KINDS, DTYPES, KINDS, make_block
from support.losses import LOSSES
from torch import Tensor

import fastclip
from fastclip.engine.kept import rows_to_keep

compiled_only = pytest.mark.skipif(
    fastclip.backends()["cpu"] != "available", reason="the C++ engine was not built"
)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def in_a_thread(function: Callable[[], object]) -> object:
    """Runs a function in a thread: returns its result, raises its exception, fails if it hangs."""
    results: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            results.put((function(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    value, error = results.get(timeout=60)
    if error is not None:
        raise error
    return value


def step(loss: str, n: int = 700, d: int = 40, seed: int = 0, **options: object) -> list[Tensor]:
    """Returns a loss and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (t.requires_grad_() for t in torch.randn(2, n, d, generator=generator).unbind())
    value = LOSSES[loss](x, y, 1.5, -1.0, backend="cpu", **options)
    value.backward()
    return [value.detach(), x.grad, y.grad]


def assert_equal(results: list[Tensor], others: list[Tensor], what: str = "") -> None:
    for one, other in zip(results, others, strict=True):
        assert torch.equal(one, other), what


# ---- the number of threads -----------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_is_torchs(threads: int) -> None:
    """In each operator, even if the shorter tower comes first. build_info agrees."""
    torch.set_num_threads(threads)
    assert fastclip.build_info()["threads"] == threads
    gain = torch.ones((), dtype=torch.float64)
    for shape in ((4000, 600), (600, 4000)):
        for kind in KINDS:
            block = make_block(*shape, 8, torch.float64, kind=kind)
            state, positive, _ = sweep("cpu", block)
            weights = make_weights(state, shape[0])
            assert_used(threads, partial(sweep, "cpu", block))
            assert_used(threads, partial(weigh, "cpu", block, state, positive, weights))
        linear = make_block(*shape, 8, torch.float64, kind="sigmoid")
        arguments = (*linear.arguments, gain, True, True, False)
        assert_used(threads, partial(operator("sweep_and_weigh", "cpu"), *arguments))


def assert_used(threads: int, call: Callable[[], object]) -> None:
    """Checks that calls use at most this many threads, and one call exactly as many.

    On a busy machine a thread may wake only after the others have taken all the work.
    """
    from fastclip import _C

    most, ends = 0, time.monotonic() + 60
    while most < threads and time.monotonic() < ends:
        call()
        most = max(most, _C.threads_used())
    assert most == threads


@compiled_only
def test_small_work_takes_one_thread() -> None:
    from fastclip import _C

    torch.set_num_threads(2)
    sweep("cpu", make_block(20, 20, 8))
    assert _C.threads_used() == 1


# ---- results -------------------------------------------------------------------------------------


@compiled_only
@pytest.mark.parametrize("scale", [14.3, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_any_number_of_threads(kind: str, dtype: str, scale: float) -> None:
    """Sums have a fixed order. Three threads are more than the cores of many machines."""
    for m, n in ((333, 200), (200, 333)):
        block = make_block(
            m, n, 30, DTYPES[dtype], kind=kind, scale=scale, offset=7, factors=(True, True)
        )
        itemsize = 8 if dtype == "float64" else 4
        keep = rows_to_keep(m, n, itemsize, 100 * n * itemsize)
        gain = torch.tensor(0.7, dtype=torch.float64)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                state, positive, kept = sweep("cpu", block, keep)
                weights = make_weights(state, m)
                gradients = weigh("cpu", block, state, positive, weights, kept, project=True)
                result = [state, positive.nan_to_num(7.0), *gradients]
                if DENSE_KINDS[kind].is_linear:
                    in_one_go = operator("sweep_and_weigh", "cpu")(
                        *block.arguments, gain, True, True, True
                    )
                    result += [t.nan_to_num(7.0) for t in in_one_go]
                results.append(result)
        for other in results[1:]:
            assert_equal(results[0], other)


# ---- other threads and processes -----------------------------------------------------------------


@compiled_only
def test_other_python_threads_run_meanwhile() -> None:
    """The operators release the interpreter's lock.

    If an operator held it, the counter could not run: the switch interval, after which a thread
    must give up the lock, is longer than the test.
    """
    torch.set_num_threads(1)
    block = make_block(2500, 2500, 64, kind="sigmoid")
    state, positive, _ = sweep("cpu", block)
    weights = make_weights(state, 2500)
    gain = torch.ones((), dtype=torch.float64)
    calls = {
        "sweep": lambda: sweep("cpu", block),
        "weigh": lambda: weigh("cpu", block, state, positive, weights),
        "sweep_and_weigh": lambda: operator("sweep_and_weigh", "cpu")(
            *block.arguments, gain, True, True, False
        ),
    }
    count, done = 0, threading.Event()

    def keep_counting() -> None:
        nonlocal count
        while not done.is_set():
            count += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=keep_counting, daemon=True)
    try:
        sys.setswitchinterval(60)
        counter.start()
        for name, call in calls.items():
            before = count
            call()
            assert count > before, name
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()


@compiled_only
@pytest.mark.parametrize("threads", [1, 2])
def test_two_python_threads_at_once(threads: int) -> None:
    """Threads share neither kept products, nor cached buffers, nor work space."""
    torch.set_num_threads(threads)
    cases = [("clip", 700, 1), ("siglip", 650, 2), ("clip", 600, 3), ("clip", 701, 4)]
    expected = [step(loss, n, seed=seed) for loss, n, seed in cases]
    barrier = threading.Barrier(2)
    failures: list[str] = []

    def repeat(first: int) -> None:
        torch.set_num_threads(threads)
        barrier.wait(60)
        for turn in range(12):
            which = (first + turn) % len(cases)
            loss, n, seed = cases[which]
            for one, other in zip(step(loss, n, seed=seed), expected[which], strict=True):
                if not torch.equal(one, other):
                    failures.append(f"{cases[which]} in turn {turn}")

    workers = [threading.Thread(target=repeat, args=(k,), daemon=True) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive(), "two threads block each other"
    assert not failures


@compiled_only
@pytest.mark.parametrize("loss", LOSSES)
def test_in_a_worker_thread(loss: str) -> None:
    """Both the whole step, and the backward alone, which autograd may run on any thread."""
    assert_equal(step(loss), in_a_thread(lambda: step(loss)))
    x = torch.randn(300, 8, requires_grad=True)
    value = LOSSES[loss](x, x.detach().flip(0), 2.0, backend="cpu")
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    (gradient,) = in_a_thread(lambda: torch.autograd.grad(value, x))
    assert torch.equal(gradient, expected)


def _in_a_child(connection: object, loss: str) -> None:
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    connection.send([t.numpy() for t in step(loss)])


@compiled_only
@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_in_a_forked_child(loss: str) -> None:
    """The parent has used its threads before, which the child does not inherit."""
    torch.set_num_threads(2)
    expected = step(loss)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_a_child, args=(there, loss), daemon=True)
    child.start()
    try:
        assert here.poll(60), "the child hangs"
        assert_equal(expected, [torch.from_numpy(t) for t in here.recv()])
    finally:
        child.kill()
        child.join()
    assert_equal(expected, step(loss), "the parent, afterwards")
