"""The scale model at its limits, and the rates that its page calls measured or assumed."""

from dataclasses import replace

import pytest
from support.bench import importing  # noqa: F401 -- makes `bench` importable
from support.bench.importing import rows_of_a_case

from bench.report import results
from bench.scale import model, page
from bench.scale.model import Cluster, Job

UNHINDERED = Cluster(within=float("inf"), across=float("inf"), latency=0.0)
BOTH = (model.gathered_seconds, model.ring_seconds)


@pytest.mark.parametrize("predict", BOTH)
def test_without_exchanges_a_step_is_its_work(predict):
    """One GPU exchanges nothing, and an infinitely fast network takes no time."""
    alone = Job(1, 4096)
    four_passes = 4 * 2 * 4096 * 4096 * 1024 / 400e12
    assert predict(alone, Cluster()) == pytest.approx(four_passes)
    for ranks in (2, 7, 8, 64, 65):
        assert predict(Job(ranks, 4096), UNHINDERED) == pytest.approx(ranks * four_passes)
        assert predict(Job(ranks, 4096), Cluster()) > 1.001 * ranks * four_passes


def test_every_block_is_visited_once():
    for ranks in range(1, 20):
        steps = model.steps_of(ranks)
        assert sum(steps) == ranks and len(steps) == ranks // 2 + 1


def test_a_ring_of_four_whose_exchanges_take_longer_than_its_work():
    """Texts are first sent in both directions, then half-way around; gradients follow a step later,
    and the last are sent home at the end. Only the forward's last step waits for work."""
    net, job = Cluster(within=1e6, latency=0.0), Job(4, 1024)
    texts, gradients = job.features / 1e6, job.gradients / 1e6
    last_pass = job.block_flops / net.flops
    forward = 2 * texts + texts + last_pass
    backward = 2 * texts + texts + 2 * gradients + gradients
    states = model.states_seconds(job, net)
    assert model.ring_seconds(job, net) == pytest.approx(forward + backward + states, rel=1e-12)


def test_a_gathered_step_adds_what_its_bytes_take():
    net = Cluster(latency=0.0)
    within, across = Job(8, 1024), Job(64, 1024)
    work = model.compute_seconds(within, net)
    sent = 7 * 1024 * (1024 * (2 + 4) + model.STATE_BYTES_SENT)
    assert model.gathered_seconds(within, net) == pytest.approx(work + sent / 450e9)
    work = model.compute_seconds(across, net)
    sent = 63 * 1024 * (1024 * (2 + 4) + model.STATE_BYTES_SENT)
    assert model.gathered_seconds(across, net) == pytest.approx(work + sent / 400e9)


def test_from_the_stated_batch_on_more_ranks_cost_a_ring_only_their_work():
    """With a smaller batch they cost exchanges, too."""
    net = Cluster(latency=0.0)
    hidden = model.hidden_from(net)

    def excess(b: int) -> float:
        few, many = Job(63, b), Job(127, b)  # odd: two blocks at every step
        work, states = (
            part(many, net) - part(few, net)
            for part in (model.compute_seconds, model.states_seconds)
        )
        more = model.ring_seconds(many, net) - model.ring_seconds(few, net)
        return (more - states) / work - 1

    assert hidden == 4000  # by chance the forward and the backward need the same b at these rates
    assert abs(excess(hidden)) < 1e-9
    assert excess(hidden - 100) > 0.01
    assert model.hidden_from(replace(net, across=2 * net.across)) == hidden // 2
    assert model.hidden_from(replace(net, flops=net.flops / 4)) == hidden // 4


@pytest.mark.parametrize("ranks", [8, 512])
def test_the_ring_is_faster_from_the_stated_batch_on_and_not_before(ranks):
    b = model.faster_from(ranks, Cluster())
    gathered, ring = (predict(Job(ranks, b), Cluster()) for predict in BOTH)
    assert ring < gathered
    gathered, ring = (predict(Job(ranks, b - 64), Cluster()) for predict in BOTH)
    assert ring >= gathered
    assert model.faster_from(ranks, replace(Cluster(), across=1e3, within=1e15, node=4)) is None


def test_memory_of_a_ring_grows_with_states_alone():
    few, many = Job(8, 1024), Job(16, 1024)
    states = 8 * 1024 * model.STATE_BYTES
    assert model.ring_bytes(many) - model.ring_bytes(few) == states
    more = model.gathered_bytes(many) - model.gathered_bytes(few)
    assert more == 8 * 1024 * 1024 * (2 + 4) + states
    assert model.open_clip_bytes(many) > 2 * model.open_clip_bytes(few) - 1
    for held in (model.gathered_bytes, model.ring_bytes, model.open_clip_bytes):
        most = model.most_pairs(80e9, held, 4096) // 4096
        assert held(Job(most, 4096)) <= 80e9 < held(Job(most + 1, 4096))


def test_bytes_of_open_clip():
    """Eight ranks' features of two towers, twice, and four matrices of logits, in bfloat16."""
    features, logits = 4 * 8 * 4096 * 1024 * 2, 4 * 4096 * 8 * 4096 * 2
    assert model.open_clip_bytes(Job(8, 4096)) == features + logits == 1_342_177_280


def test_a_nodes_cards_are_no_faster_than_its_links():
    net = Cluster(within=100.0, across=50.0, latency=0.0)
    assert net.gather(1000.0, 16) == 10.0
    assert replace(net, across=5.0).gather(1000.0, 16) == 25.0
    assert replace(net, across=5.0).gather(1000.0, 8) == 10.0


def test_a_rate_is_called_measured_only_if_a_card_was(tmp_path):
    path = tmp_path / "card.csv"
    results.write(path, rows_of_a_case(capability="AVX512", dtype="bfloat16"))
    assert "(assumed, not measured)" in page.page([path])
    assert page.cluster_of([path])[0] == Cluster()
    small = rows_of_a_case(capability="sm_90", dtype="bfloat16", gflops=1e5, m=256, n=256)
    large = rows_of_a_case(capability="sm_90", dtype="bfloat16", gflops=5e5)
    results.write(path, small + large)
    net, source = page.cluster_of([path])
    assert net.flops == 5e14 and "500 TFLOP/s" in source and "measured on one Test CPU" in source
    assert "(no)" in page.page([path])


def test_the_page_for_other_assumptions(capsys):
    line = ["--tflops", "100", "--across", "25", "--pairs", "2048", "--gpus", "16"]
    assert page.main(line, []) == 0
    shown = capsys.readouterr().out
    assert "100 TFLOP/s of a GPU's products (as given)" in shown and "25 GB/s a GPU across" in shown
    assert "|    2048 |   16 |   32K |" in shown


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = page.draw([], tmp_path / "scale.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
