"""`fuse` and `patch` of transformers' models: which models are fused, until when, and errors."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.installation import ROOT
from support.peers import peer
from support.two_towers import NAMES, batch_of, model_of
from torch import nn

from fastclip.engine import warn_once
from fastclip.integrations import transformers as integration
from fastclip.integrations.transformers import forms, fuse, patch, unfuse, unpatch
from fastclip.integrations.transformers.families import FAMILIES


@pytest.fixture(autouse=True)
def without_a_patch() -> Iterator[None]:
    peer("transformers")
    warn_once._given.clear()
    unpatch()
    yield
    unpatch()


def is_fused(model: nn.Module) -> bool:
    """True if a loss comes without logits, as from a fused model."""
    name = next(f.name for f in FAMILIES if isinstance(model, f.find()))
    with torch.no_grad():
        outputs = model(**batch_of(name), return_loss=True)
    assert outputs.loss is not None
    return outputs.logits_per_text is None


def test_every_family_is_tested_and_has_its_form() -> None:
    assert sorted(family.name for family in FAMILIES) == NAMES
    for family in FAMILIES:
        assert forms.other_form(family.find(), family) is None


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
def test_copies_of_a_fused_model_are_fused(name: str, tmp_path: Path) -> None:
    model = fuse(model_of(name))
    assert is_fused(copy.deepcopy(model)) and is_fused(copy.copy(model))
    assert is_fused(pickle.loads(pickle.dumps(model)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert is_fused(loaded) and type(loaded) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    model.save_pretrained(tmp_path)
    fresh = type(model_of(name)).from_pretrained(tmp_path, dtype=torch.float64)
    assert fresh.config.architectures == [name] and not is_fused(fresh)


def test_a_fused_model_loads_in_a_new_process(tmp_path: Path) -> None:
    torch.save(fuse(model_of("CLIPModel"), keep_logits=True), tmp_path / "model.pt")
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from support.peers import peer; peer('transformers')\n"
        "import torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(model).__module__, 'fastclip' in type(model).forward.__module__,\n"
        "      hasattr(type(model).forward, '_fastclip_own'))"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt", root / "tests", root],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["transformers.models.clip.modeling_clip", "False", "True"]


def test_unfuse_returns_the_class() -> None:
    model = model_of("CLIPModel")
    known, keys = type(model), list(model.state_dict())
    assert unfuse(model) is model and type(model) is known
    fuse(fuse(model, keep_logits=True))
    assert is_fused(model) and isinstance(model, known) and list(model.state_dict()) == keys
    assert unfuse(model) is model and type(model) is known and not is_fused(model)


def test_a_subclass_without_a_forward_is_fused() -> None:
    class Mine(type(model_of("CLIPModel"))):
        pass

    model = Mine(model_of("CLIPModel").config).double()
    assert is_fused(fuse(model)) and type(model).__name__ == "Mine" and isinstance(model, Mine)


def test_patch_fuses_all_models_until_unpatch() -> None:
    before, siglip = model_of("CLIPModel"), model_of("SiglipModel")
    known = type(before)
    own = known.forward
    unpatch()
    patch()
    patch()
    made = peer("transformers").AutoModel.from_config(before.config).double()
    assert type(made) is known and is_fused(made) and is_fused(before) and is_fused(siglip)
    patch(keep_logits=True)
    assert not is_fused(before)
    unpatch()
    assert known.forward is own and not is_fused(made) and not is_fused(siglip)


def test_files_of_models_are_patched_when_they_are_imported() -> None:
    """Importing all of them takes seconds, which a script without them need not wait for."""
    code = (
        "import sys; from support.peers import peer; peer('transformers.modeling_utils');"
        "from fastclip.integrations.transformers import patch, unpatch;"
        "clip, siglip, align = (f'transformers.models.{name}.modeling_{name}' for name in"
        " ('clip', 'siglip', 'align'));"
        "patch(); assert not {clip, siglip, align} & {*sys.modules};"
        "import transformers;"
        "fused = lambda known: hasattr(known.forward, '_fastclip_own');"
        "print(fused(transformers.CLIPModel), siglip in sys.modules);"
        "unpatch(); print(fused(transformers.CLIPModel), fused(transformers.AlignModel))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=ROOT / "tests",
    )  # fmt: skip
    assert found.stdout.split() == ["True", "False", "False", "False"]


def test_fuse_and_patch_together() -> None:
    model, other = model_of("CLIPModel"), model_of("CLIPModel")
    patch(keep_logits=True)
    fuse(model)
    assert is_fused(model) and not is_fused(other)
    unpatch()
    assert is_fused(model) and not is_fused(unfuse(model))


def test_a_forward_that_calls_the_patched_one_is_fused() -> None:
    class Mine(type(model_of("CLIPModel"))):
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**inputs)

    model = Mine(model_of("CLIPModel").config).double()
    with pytest.raises(TypeError, match=r"forward of CLIPModel, got Mine with one of its own"):
        fuse(model)
    assert not is_fused(model)
    patch()
    assert is_fused(model)


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_DISABLE", "1")
    patch()
    assert not is_fused(fuse(model_of("CLIPModel")))


def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer("transformers"), "__version__", "6.0.0")
    for call in (patch, lambda: fuse(model_of("CLIPModel"))):
        with pytest.raises(ImportError, match=r"knows transformers 5, got 6\.0\.0"):
            call()


def changed_loss(module: Any) -> dict[str, Any]:
    def contrastive_loss(logits: torch.Tensor) -> torch.Tensor:
        labels = torch.arange(len(logits))
        return nn.functional.cross_entropy(logits, labels, label_smoothing=0.01)

    return {"contrastive_loss": contrastive_loss}


def changed_lengths(module: Any) -> dict[str, Any]:
    return {"_get_vector_norm": None}


@pytest.mark.parametrize("change, reason", [
    (changed_loss, "computes other loss"), (changed_lengths, "it fails on stand-ins"),
])  # fmt: skip
def test_a_class_of_another_form(monkeypatch: pytest.MonkeyPatch, change: Any, reason: str) -> None:
    model, siglip = model_of("CLIPModel"), model_of("SiglipModel")
    module = sys.modules[type(model).__module__]
    for name, value in change(module).items():
        monkeypatch.setattr(module, name, value)
    forms._difference.cache_clear()
    try:
        with pytest.raises(NotImplementedError, match=reason):
            fuse(model)
        with pytest.warns(
            UserWarning, match=rf"CLIPModel\.forward of 5.* unknown form, .*{reason}"
        ):
            patch()
        assert is_fused(siglip) and not hasattr(type(model).forward, "_fastclip_own")
    finally:
        forms._difference.cache_clear()


def test_an_argument_that_the_family_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = type(model_of("CLIPModel"))
    own = known.forward

    def forward(self: Any, input_ids: Any = None, temperature: Any = None, **rest: Any) -> Any:
        return own(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(known, "forward", forward)
    with pytest.raises(NotImplementedError, match=r"arguments differ: .*temperature"):
        fuse(model_of("CLIPModel"))


def test_models_that_cannot_be_fused() -> None:
    model = model_of("CLIPModel")
    for other in (nn.Linear(2, 3), torch.compile(model), nn.DataParallel(model), model.text_model):
        with pytest.raises(TypeError, match=r"fuse needs a model of CLIPModel, .*got \w+: fuse"):
            fuse(other)
    fused = fuse(model_of("CLIPModel"))
    for call, replaced in ((fuse, model), (unfuse, fused)):
        replaced.forward = replaced.forward
        with pytest.raises(ValueError, match="one whose forward has been replaced"):
            call(replaced)


def test_accelerate_unwraps_a_fused_model() -> None:
    """For mixed precision it wraps the forward, and later looks for the innermost function."""
    accelerate = peer("accelerate")
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = accelerator.prepare(fuse(model_of("CLIPModel")))
        assert is_fused(model)
        assert is_fused(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_unfuse_of_a_class_that_was_replaced_since() -> None:
    model = fuse(model_of("CLIPModel"))
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match="got Wrapped: unfuse the model before it is wrapped"):
        unfuse(model)


def test_the_integration_is_lazy() -> None:
    code = (
        "import sys, fastclip.integrations.transformers as it; it.unpatch();"
        "print([m for m in sys.modules if m.partition('.')[0] == 'transformers'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert integration.HOST.package == "transformers"
