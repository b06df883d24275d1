"""The Hub kernel, loaded by `kernels`: losses, compilation, several builds, and `kernelize`."""

import inspect
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.peers import peer
from torch import Tensor, nn

import fastclip
from fastclip.hub_kernel.layout import build
from fastclip.loss import info_nce, nt_xent_loss, ranking_loss, siglip_loss, supcon_loss


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return peer("kernels")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel")
    build(folder)
    return folder


@pytest.fixture
def kernel(kernels: ModuleType, repository: Path) -> ModuleType:
    return kernels.get_local_kernel(repository, backend="cpu")


def features() -> list[Tensor]:
    return [t.requires_grad_() for t in torch.randn(2, 20, 8)]


def assert_equal(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Asserts that two losses and their gradients are the same bits."""
    assert torch.equal(ours, theirs)
    both = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


LABELS = torch.arange(20) // 2
LOSSES = {
    "clip_loss": (fastclip.clip_loss, (2.0,)), "siglip_loss": (siglip_loss, (2.0, -2.0)),
    "info_nce": (info_nce, (2.0,)), "nt_xent_loss": (nt_xent_loss, (2.0,)),
    "ranking_loss": (ranking_loss, ()),
}  # fmt: skip


@pytest.mark.parametrize("served", ["torch", "triton"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_an_installation(kernel: ModuleType, name: str, served: str) -> None:
    if fastclip.backends()[served] != "available":
        pytest.skip(f"backend {served} cannot run here")
    function, scalars = LOSSES[name]
    leaves = features()
    ours = getattr(kernel.loss, name)(*leaves, *scalars, backend=served)
    assert_equal(ours, function(*leaves, *scalars, backend=served), leaves)


def test_the_metadata_are_valid(repository: Path) -> None:
    rust = peer("kernels._rust")
    for variant in (repository / "build").iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        actual = rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant)
        metadata.digest.validate(actual)
        assert metadata.name.python_name == "fastclip_loss" and metadata.version == 1


def test_a_compiled_loss_is_one_graph(kernel: ModuleType) -> None:
    leaves = features()
    torch._dynamo.reset()
    fast = torch.compile(kernel.clip_loss, backend="aot_eager", fullgraph=True)
    assert_equal(fast(*leaves, 2.0), kernel.clip_loss(*leaves, 2.0), leaves)


def test_operators_are_sound(kernel: ModuleType) -> None:
    operators = getattr(torch.ops, kernel.__name__)
    for name in ("sweep", "weigh", "finish", "sweep_and_weigh"):
        for overload in ("torch", "triton"):
            own = str(getattr(getattr(operators, name), overload)._schema)
            installed = str(getattr(getattr(torch.ops.fastclip, name), overload)._schema)
            assert own == installed.replace("fastclip::", f"{kernel.__name__}::")
    state = torch.rand(2, 6, dtype=torch.float64)
    arguments = state, torch.rand(3, dtype=torch.float64), torch.tensor(2.0), None, "softmax"
    torch.library.opcheck(operators.finish.torch, arguments, test_utils=("test_schema",
                          "test_faketensor"))  # fmt: skip


def test_builds_live_beside_each_other(
    kernels: ModuleType, kernel: ModuleType, repository: Path, tmp_path: Path
) -> None:
    build(tmp_path / "other", name="contrastive")
    shutil.copytree(repository, tmp_path / "copy")
    leaves = features()
    loss = kernel.clip_loss(*leaves, 2.0)
    for folder, same in (("other", False), ("copy", True)):
        found = kernels.get_local_kernel(tmp_path / folder, backend="cpu")
        assert found is not kernel
        assert (found.loss is kernel.loss) == same  # the same id, the same modules
        assert_equal(found.clip_loss(*leaves, 2.0), loss, leaves)


class Loss(nn.Module):
    """A module of a model's author, whose `forward` the layer replaces."""

    label_smoothing = 0.1

    def forward(self, queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
        raise AssertionError("the author's own code runs")


def kernelized(module: nn.Module, name: str, repository: Path) -> nn.Module:
    kernels = peer("kernels")
    kernels.replace_kernel_forward_from_hub(type(module), name)
    layer = kernels.LocalLayerRepository(repository / "build/torch-cpu", layer_name=name)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({name: {"cpu": layer}}, inherit_mapping=False):
        return kernels.kernelize(module, mode=mode, device="cpu", use_fallback=False)


def test_a_layer_replaces_the_forward_of_a_module(repository: Path, kernel: ModuleType) -> None:
    leaves = features()
    module = kernelized(Loss(), "InfoNCELoss", repository)
    theirs = info_nce(*leaves, 2.0, label_smoothing=0.1, backend="torch")
    assert_equal(module(*leaves, 2.0), theirs, leaves)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_layers_replace_open_clips(repository: Path, theirs: ModuleType, name: str) -> None:
    module = type("Subclass", (getattr(theirs, name),), {})()
    leaves = features()
    scalars = (torch.tensor(2.0), torch.tensor(-1.0))
    expected = module(*leaves, *scalars)
    loss = kernelized(module, name, repository)(*leaves, *scalars, output_dict=True)
    torch.testing.assert_close(loss["contrastive_loss"], expected)


def test_layers_have_nothing_but_a_forward(kernel: ModuleType) -> None:
    found = [c for c in vars(kernel.layers).values() if inspect.isclass(c) and c is not Tensor]
    layers = [layer for layer in found if issubclass(layer, nn.Module)]
    assert len(layers) == 5
    for layer in layers:
        own = {name for name in vars(layer) if not name.startswith("__")}
        assert own == {"forward", "can_torch_compile"} and layer().state_dict() == {}


def test_supervised_labels(kernel: ModuleType) -> None:
    leaves = features()[:1]
    ours = kernel.layers.SupConLoss()(*leaves, LABELS, 2.0)
    assert_equal(ours, supcon_loss(*leaves, LABELS, 2.0, backend="torch"), leaves)
