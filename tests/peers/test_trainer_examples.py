"""docs/examples: they learn, and two ranks have the losses of one process."""

import re
import subprocess
import sys

import pytest
from support.installation import ROOT
from support.peers import find, peer
from support.ranks import examples
from support.ranks.processes import Ranks

HOSTS = {"with_accelerate": "accelerate", "with_lightning": "pytorch_lightning"}
COMMAND = (
    "import sys; sys.path.insert(0, 'tests')\n"
    "from support.peers import peer; peer(sys.argv[2]); import runpy\n"
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)


@pytest.mark.parametrize("name", HOSTS)
def test_two_ranks_have_the_losses_of_one_process(one: Ranks, two: Ranks, name: str) -> None:
    find(HOSTS[name])
    (alone,) = one.run(examples.losses, name, HOSTS[name])
    assert len(alone) == 40 and alone[-1] < alone[0] / 5
    for found in two.run(examples.losses, name, HOSTS[name]):
        assert found == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("name", ["with_torchrun", *HOSTS])
def test_torchrun_starts_it(name: str) -> None:
    """Prints a loss that falls, once for all processes."""
    peer(HOSTS.get(name, "torch"))
    torchrun = (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
    )  # fmt: skip
    script = sys.executable, "-c", COMMAND, f"docs/examples/{name}.py", HOSTS.get(name, "torch")
    found = subprocess.run(
        [sys.executable, *torchrun, *script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    printed = [float(value) for value in re.findall(r"loss (\d\.\d+)", found.stdout)]
    assert len(printed) in (4, 5) and printed == sorted(printed, reverse=True)
    assert printed[-1] < printed[0] / 2
