"""Mutants of the exchanges and the agreement of ranks."""

from mutants.mutant import mutant

CONTRAST = "tests/distributed/test_distributed_contrast.py::test_"
FAILURES = "tests/distributed/test_distributed_failures.py::test_"
LOSSES = "tests/distributed/test_distributed.py::test_"
RING = "tests/distributed/test_ring.py::test_"
OVERLAP = "tests/distributed/test_ring_overlap.py::test_"

MUTANTS = (
    mutant(
        "messages are kept after their exchange",
        "fastclip/distributed/exchange.py",
        "self.works, self.messages = [], []", "self.works = []",
        f"{RING}a_rank_holds_few_tensors_inside_an_exchange",
    ),
    mutant(
        "gradients go home the wrong way",
        "fastclip/distributed/exchange.py",
        "self.leaving.append(_Message(gradient, owner, -owner, 0))",
        "self.leaving.append(_Message(gradient, -owner, owner, 0))",
        f"{RING}gradients_get_home[5]",
    ),
    mutant(
        "features travel only one way",
        "fastclip/distributed/exchange.py",
        "return 1 if owner > 0 else -1", "return 1",
        f"{RING}every_rank_visits_every_rank_once[4]",
    ),
    mutant(
        "halfway round a rank is visited twice",
        "fastclip/distributed/exchange.py",
        "-self.shard.world_size < 2 * d <=", "-self.shard.world_size <= 2 * d <=",
        f"{RING}every_rank_visits_every_rank_once[4]",
    ),
    mutant(
        "messages have this rank's number of rows",
        "fastclip/distributed/exchange.py",
        "rows = shard.sizes[shard.at(owner)]", "rows = shard.rows",
        f"{RING}every_rank_visits_every_rank_once[4]",
    ),
    mutant(
        "gathered gradients lose their order",
        "fastclip/distributed/exchange.py",
        "own = torch.cat((before, own, behind))", "own = torch.cat((own, before, behind))",
        f"{CONTRAST}ranks_equal_one_process[4]",
    ),
    mutant(
        "each exchange is awaited before the visit",
        "fastclip/distributed/exchange.py",
        "self.works = shard.swap(parcels)",
        "self.works = shard.swap(parcels); [work.wait() for work in self.works]",
        f"{OVERLAP}the_next_features_travel_during_a_visit[4]",
    ),
    mutant(
        "a rank's rows begin at the rank before",
        "fastclip/distributed/shard.py",
        "itertools.accumulate(sizes[:-1], initial=0)", "itertools.accumulate(sizes[1:], initial=0)",
        f"{LOSSES}float64_agrees_to_ten_digits[3 ranks]",
    ),
    mutant(
        "live rows are those of even batches",
        "fastclip/distributed/shard.py",
        "torch.arange(start + r.start, start + r.stop)",
        "torch.arange(start, start + r.stop - r.start)",
        f"{LOSSES}live_slices_add_up[3 ranks-clip-gathered]",
    ),
    mutant(
        "ranks' numbers are repeated as if batches were even",
        "fastclip/distributed/shard.py",
        "counts = torch.tensor(self.sizes, device=x.device)",
        "counts = torch.tensor(self.sizes[::-1], device=x.device)",
        f"{LOSSES}ranks_may_scale_their_losses_differently[3 ranks-clip-gathered]",
        f"{LOSSES}ranks_may_scale_their_losses_differently[3 ranks-clip-ring]",
    ),
    mutant(
        "an own positive is looked for at the batch's start",
        "fastclip/distributed/block_row.py",
        "offset = rows.start + self.block.offset + own_columns",
        "offset = rows.start + self.block.offset",
        f"{LOSSES}float64_agrees_to_ten_digits[3 ranks]",
    ),
    mutant(
        "every visit may keep the whole budget",
        "fastclip/distributed/block_row.py",
        "budget * block.sizes()[1] // shard.batch", "budget",
        f"{LOSSES}visits_share_the_budget_of_kept_products[3 ranks-clip-ring]",
    ),
    mutant(
        "zero rows in fp16 get infinite gradients",
        "fastclip/distributed/block_row.py",
        "gradient = gradient.masked_fill(factor[:, None] >= CLAMPED, 0)", "pass",
        f"{FAILURES}rows_of_zeros_in_fp16_have_no_gradient",
    ),
    mutant(
        "texts' dtypes are not compared",
        "fastclip/distributed/agreement.py",
        'f"dtype of {name_y}": y.dtype,', "",
        f"{FAILURES}a_mismatch_is_an_error_on_every_rank[dtypes of texts]",
    ),
    mutant(
        "a gradient that one rank needs is not made by others",
        "fastclip/distributed/agreement.py",
        "needs = (any(exchanged.get(name, ())) for name in NEEDS)",
        "needs = (all(exchanged.get(name, (0,))) for name in NEEDS)",
        f"{LOSSES}towers_frozen_on_single_ranks[3 ranks-clip-gathered]",
        hangs=True,
    ),
    mutant(
        "mismatches of a group for GPU tensors are remembered",
        "fastclip/distributed/agreement.py",
        "_check(exchanged, tuple(sizes), common)\n        for name",
        "known[key] = exchanged\n        _check(exchanged, tuple(sizes), common)\n        for name",
        f"{FAILURES}a_group_for_gpu_tensors_compares_only_first_calls",
    ),
    mutant(
        "a refusal is taken for a size",
        "fastclip/distributed/agreement.py",
        "if code == REFUSED]", "if code == 0]",
        f"{FAILURES}an_argument_refused_on_one_rank_fails_on_all",
    ),
    mutant(
        "scales that differ do not warn",
        "fastclip/distributed/drift.py",
        "if len({value for value in values if value == value}) > 1:", "if False:",
        "tests/distributed/test_drift.py::test_a_difference_warns_once_on_every_rank",
    ),
    mutant(
        "a rank sends as many rows as the largest one",
        "fastclip/distributed/collectives.py",
        'if min(sizes) != most and x.device.type == "cpu":', "if False:",
        "tests/distributed/test_distributed_training.py::test_no_rank_sends_for_the_largest_one",
    ),
    mutant(
        "ranks of gathered features do not compare normalize",
        "fastclip/distributed/world.py",
        '"normalize": int(normalize),', '"normalize": 0,',
        f"{FAILURES}a_mismatch_is_an_error_on_every_rank[normalisation of gathered features]",
        hangs=True,
    ),
    mutant(
        "a copy of a module has no group",
        "fastclip/loss/holds_group.py",
        "memo[id(self.process_group)] = self.process_group",
        "memo[id(self.process_group)] = None",
        "tests/distributed/test_modules_on_ranks.py::test_copies_share_the_group_and_pickling_refuses_it",
    ),
)  # fmt: skip
