"""`patch()` puts our classes in the place of open_clip's, and `unpatch()` takes them out."""

import copy
import inspect
import pickle
import re
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from support.drop_in import compare, model_out
from support.installation import ROOT
from support.peers import peer

import fastclip.loss
from fastclip.engine import warn_once
from fastclip.integrations import open_clip
from fastclip.integrations.host import Host


@pytest.fixture
def theirs() -> Iterator[ModuleType]:
    loaded = peer("open_clip")
    yield loaded
    open_clip.unpatch()


def classes(theirs: ModuleType) -> dict[str, type]:
    """Returns the classes under each name that open_clip has for them."""
    modules = (theirs, theirs.loss, theirs.factory)
    return {
        f"{module.__name__}.{name}": vars(module)[name]
        for module in modules
        for name in open_clip.NAMES
        if name in vars(module)
    }


def test_every_name_is_replaced_and_put_back(theirs: ModuleType) -> None:
    before = classes(theirs)
    assert len(before) >= 10
    script = ModuleType("script")
    script.Loss = theirs.loss.CoCaLoss  # imported before patching, under another name
    sys.modules["script"] = script
    try:
        open_clip.patch()
        open_clip.patch()
        after = classes(theirs)
        assert after.keys() == before.keys()
        for name, kind in after.items():
            assert issubclass(kind, getattr(fastclip.loss, name.rpartition(".")[2])), name
        assert issubclass(script.Loss, fastclip.loss.CoCaLoss)
        open_clip.unpatch()
        open_clip.unpatch()
        assert classes(theirs) == before
        assert script.Loss is theirs.loss.CoCaLoss
    finally:
        del sys.modules["script"]


def test_the_page(theirs: ModuleType) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", (ROOT / "docs/open-clip.md").read_text(), re.DOTALL)
    exec(code, {})
    assert issubclass(theirs.ClipLoss, fastclip.loss.ClipLoss)


def test_the_switch(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = classes(theirs)
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    open_clip.patch()
    assert classes(theirs) == before
    monkeypatch.setenv("FASTCLIP_DISABLE", "yes")
    with pytest.raises(ValueError, match="FASTCLIP_DISABLE must be 0 or 1, got 'yes'"):
        open_clip.patch()


def test_an_unknown_version(theirs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = classes(theirs)
    monkeypatch.setattr(theirs, "__version__", "5.0.1")
    with pytest.raises(ImportError, match=r"knows open_clip 3.3, 4.2, got 5.0.1"):
        open_clip.patch()
    assert classes(theirs) == before
    monkeypatch.setattr(theirs, "__version__", "3.30.0")
    with pytest.raises(ImportError, match=r"got 3.30.0"):
        open_clip.patch()


def test_a_missing_host() -> None:
    with pytest.raises(ImportError, match="needs no_such_host, which is not installed"):
        Host("no_such_host", ("1",)).load()


@pytest.mark.parametrize("name", open_clip.NAMES)
def test_horovod_is_left_to_open_clip(
    name: str, theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = getattr(theirs.loss, name)
    if "use_horovod" not in inspect.signature(own).parameters:
        pytest.skip(f"{name} has no use_horovod")
    monkeypatch.setattr(warn_once, "_given", set())
    weights = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} if name == "CoCaLoss" else {}
    open_clip.patch()
    with pytest.warns(UserWarning, match="open_clip's own code computes this loss, not fastclip"):
        assert type(getattr(theirs.loss, name)(**weights, use_horovod=True)) is own
    assert type(getattr(theirs.loss, name)(**weights, use_horovod=False)) is not own


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_our_options_can_be_given(name: str, theirs: ModuleType) -> None:
    open_clip.patch()
    out = model_out(torch.device("cpu"))
    loss = getattr(theirs.loss, name)(rank=0, world_size=1, normalize=True)
    compare(loss, getattr(fastclip.loss, name)(normalize=True), out)


def test_pickles_load_without_the_patch(theirs: ModuleType) -> None:
    own = theirs.loss.ClipLoss
    open_clip.patch()
    loss = theirs.loss.ClipLoss(local_loss=True)
    assert type(pickle.loads(pickle.dumps(loss))) is type(copy.deepcopy(loss)) is type(loss)
    saved = pickle.dumps(loss)
    open_clip.unpatch()
    loaded = pickle.loads(saved)
    assert type(loaded) is own and loaded.local_loss
    compare(loaded, own(local_loss=True), model_out(torch.device("cpu")))


def test_bases_are_those_of_open_clip(theirs: ModuleType) -> None:
    def related() -> list[bool]:
        kinds = [getattr(theirs.loss, name) for name in open_clip.NAMES]
        return [issubclass(a, b) for a in kinds for b in kinds]

    before = related()
    open_clip.patch()
    assert related() == before
    assert theirs.loss.CoCaLoss(2.0, 1.0).caption_loss_weight == 2.0


def test_subclasses_of_a_patched_class(theirs: ModuleType) -> None:
    open_clip.patch()

    class Twice(theirs.ClipLoss):
        def forward(self, *arguments, **options):
            return 2 * super().forward(*arguments, **options)

    out = model_out(torch.device("cpu"))
    assert Twice()(**out) == 2 * theirs.ClipLoss()(**out)
