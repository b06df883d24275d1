"""docs/examples/with_torchrun.py: it learns, and two ranks have the losses of one process."""

import pytest
from support.ranks import examples
from support.ranks.processes import Ranks


def test_two_ranks_have_the_losses_of_one_process(two: Ranks) -> None:
    alone = examples.example("with_torchrun").train()
    assert len(alone) == 40 and alone[-1] < alone[0] / 5
    for found in two.run(examples.losses, "with_torchrun"):
        assert found == pytest.approx(alone, rel=1e-3)
