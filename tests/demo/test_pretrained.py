"""Loading foreign weights, on made-up state dicts: every key and option is accounted for."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import Tensor

from fastclip.clip import CLIP, CLIPConfig, load_pretrained

State = dict[str, Tensor]
TOLD: dict[str, Any] = {
    "activation": "quick_gelu", "image_heads": 2, "text_heads": 4, "text_pool": "highest",
    "causal": True,
}  # fmt: skip


def block(at: str, width: int, hidden: int) -> State:
    shapes = {
        "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,),
        "ln_2.bias": (width,), "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,), "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,), "mlp.c_fc.weight": (hidden, width),
        "mlp.c_fc.bias": (hidden,), "mlp.c_proj.weight": (width, hidden),
        "mlp.c_proj.bias": (width,),
    }  # fmt: skip
    return {f"{at}.{key}": torch.randn(shape) for key, shape in shapes.items()}


def native(layers: int = 2) -> State:
    """Returns open_clip's form: 16 x 16 pixels, 4 patches, widths 8 and 12, 6 features."""
    torch.manual_seed(0)
    state = {
        "visual.conv1.weight": torch.randn(8, 3, 8, 8), "visual.class_embedding": torch.randn(8),
        "visual.positional_embedding": torch.randn(5, 8), "visual.proj": torch.randn(8, 6),
        "token_embedding.weight": torch.randn(20, 12), "text_projection": torch.randn(12, 6),
        "positional_embedding": torch.randn(7, 12), "logit_scale": torch.tensor(3.0),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", 8), ("visual.ln_post", 8), ("ln_final", 12)):
        state |= {f"{name}.{word}": torch.randn(width) for word in ("weight", "bias")}
    for k in range(layers):
        state |= block(f"visual.transformer.resblocks.{k}", 8, 20)
        state |= block(f"transformer.resblocks.{k}", 12, 48)
    return state


def test_shapes_tell_the_sizes() -> None:
    config = load_pretrained(native(), **TOLD).config
    assert (config.image_size, config.patch_size, config.embed_dim) == (16, 8, 6)
    assert (config.image_width, config.image_layers, config.image_mlp) == (8, 2, 20)
    assert (config.text_width, config.vocab_size, config.context_length) == (12, 20, 7)
    assert config.scale == pytest.approx(torch.tensor(3.0).exp().item())
    assert (config.bias, config.image_pool, config.text_activation) == (None, "class", "quick_gelu")
    assert load_pretrained(native() | {"logit_bias": torch.ones(1)}, **TOLD).config.bias == 1


def test_a_harmless_buffer_and_another_dtype(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in native().items()}
    state["attn_mask"] = torch.zeros(7, 7)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "half.safetensors")
    model = load_pretrained(tmp_path / "half.safetensors", **TOLD)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.image_projection.weight, state["visual.proj"].T.float())
    half = load_pretrained(state, dtype=torch.bfloat16, **TOLD)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_model_has_memory_of_its_own() -> None:
    state = native()
    model = load_pretrained(state, **TOLD)
    before = state["positional_embedding"].clone()
    with torch.no_grad():
        model.text_tower.positions.zero_()
    assert torch.equal(state["positional_embedding"], before)


def changed(**new: Any) -> State:
    """Returns the state dict with other tensors; None removes a key, `__` stands for a dot."""
    state: dict[str, Any] = native() | {k.replace("__", "."): v for k, v in new.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(visual__class_embedding=None, ln_final__bias=None),
         r"missing keys: visual.class_embedding, ln_final.bias$|"
         r"missing keys: ln_final.bias, visual.class_embedding$"),
        (changed(extra=torch.zeros(1), visual__ls_1=torch.zeros(1)),
         r"unknown keys: extra, visual.ls_1$"),
        (changed(visual__proj=torch.zeros(9, 6)),
         r"wrong tensors: visual.proj must be \(8, 6\), got \(9, 6\)$"),
        (changed(visual__proj=torch.zeros(8, 6, dtype=torch.long)),
         r"visual.proj must be floating-point, got torch.int64"),
        (changed(logit_scale=torch.zeros(2)), r"logit_scale must be \(\), got \(2,\)"),
        (changed(ln_final__weight=None, other=torch.zeros(2), ln_final__bias=torch.zeros(3)),
         r"missing keys: ln_final.weight; unknown keys: other; wrong tensors: ln_final.bias"),
        (changed(visual__conv1__weight=None), r"cannot tell .*missing keys: visual.conv1.weight"),
        (changed(visual__conv1__weight=torch.zeros(8, 3)), r"must have 4 dimensions, got \(8, 3\)"),
        (changed(visual__positional_embedding=torch.zeros(4, 8)), r"squares, got .* 3 patches"),
        (changed(transformer__resblocks__3__ln_1__bias=torch.zeros(12)),
         r"missing keys: transformer.resblocks.2.ln_1.weight"),
        ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, r"a ResNet image tower is not supp"),
        ({"a": torch.zeros(1)}, r"by open_clip, OpenAI or transformers, got a$"),
        ({}, "got an empty state dict"),
        ({"a": "b"}, "must hold tensors, got others: a"),
    ],
)  # fmt: skip
def test_every_key_is_accounted_for(state: State, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(state, **TOLD)


def test_what_the_weights_do_not_tell_must_be_given() -> None:
    open_fields = "image_heads, text_heads, image_activation, text_activation, text_pool, causal"
    with pytest.raises(ValueError, match=f"the weights do not tell {open_fields}; give the model"):
        load_pretrained(native())
    clipa = changed(visual__ln_pre__weight=None, visual__ln_pre__bias=None)
    with pytest.raises(ValueError, match="the weights do not tell image_pool; give"):
        load_pretrained(clipa, **TOLD)
    assert load_pretrained(clipa, image_pool="mean", **TOLD).config.image_pool == "mean"
    with pytest.raises(ValueError, match=r"dtype must be floating-point, got torch.int8"):
        load_pretrained(native(), dtype=torch.int8, **TOLD)
    with pytest.raises(TypeError, match=r"options must be among image_heads, .*, got heads"):
        load_pretrained(native(), heads=3)
    with pytest.raises(ValueError, match="text_pool must be one of 'highest', 'end', 'last', got"):
        load_pretrained(native(), **TOLD | {"text_pool": "first"})
    with pytest.raises(ValueError, match=r"no weights for image_pool.query, .*: the options ask"):
        load_pretrained(native(), **TOLD, image_pool="attention")
    with pytest.raises(ValueError, match="unknown keys: text_projection"):
        load_pretrained(changed(text_projection=torch.zeros(12, 12), visual__proj=torch.zeros(
            8, 12)), **TOLD, text_projection="none")  # fmt: skip


def test_a_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 2, "head_width": 4}
    text = {"context_length": 7, "vocab_size": 20, "width": 12, "heads": 4, "layers": 2}
    config = {"embed_dim": 6, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    model = load_pretrained(native(), config=config)
    assert model.config == load_pretrained(native(), **TOLD).config
    config["text_cfg"] = text | {"layers": 3}
    with pytest.raises(ValueError, match="text_layers is 2, the configuration says 3"):
        load_pretrained(native(), config=config)
    config["text_cfg"] = text | {"rope": True}
    with pytest.raises(ValueError, match=r"unsupported options: text_cfg.rope=True"):
        load_pretrained(native(), config=config)
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"open_clip_config.json must be JSON, got"):
        load_pretrained(native(), config=tmp_path)
    with pytest.raises(FileNotFoundError):
        load_pretrained(native(), config=tmp_path / "absent.json")


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent"):
        load_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"must hold one of open_clip_model.safetensors, "):
        load_pretrained(tmp_path)
    (tmp_path / "words.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"cannot read weights from .*words.pt"):
        load_pretrained(tmp_path / "words.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must be a state dict, got list"):
        load_pretrained(tmp_path / "list.pt")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be in one file, got .*index.json"):
        load_pretrained(tmp_path)


def damaged(name: str) -> bytes:
    """Returns a file that holds no readable weights."""
    written = io.BytesIO()
    if name == "cut.pt":
        torch.save(native(), written)
        return written.getvalue()[:-2000]
    if name == "old_cut.pt":
        torch.save(native(), written, _use_new_zipfile_serialization=False)
        return written.getvalue()[:-2000]
    if name == "code.pt":
        torch.save({"a": torch.nn.Linear(1, 1)}, written)
        return written.getvalue()
    if name == "cut.safetensors":
        return save(native())[:-2000]
    if name == "photo.jpeg":
        Image.new("RGB", (40, 40), "red").save(written, "JPEG")
        return written.getvalue()
    generator = random.Random(name)
    return b"\x80\x02" * name.startswith("pickle") + generator.randbytes(300)


@pytest.mark.parametrize(
    "name",
    ["cut.pt", "old_cut.pt", "code.pt", "cut.safetensors", "photo.jpeg", "empty"]
    + [f"{start}_{k}" for start in ("noise", "pickle") for k in range(8)],
)
def test_a_damaged_file_is_named_in_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"" if name == "empty" else damaged(name))
    with pytest.raises(ValueError, match="cannot read weights from") as raised:
        load_pretrained(tmp_path / name, **TOLD)
    assert str(raised.value) == (
        f"cannot read weights from {tmp_path / name}: it must be a complete file of safetensors, "
        "of TorchScript, or of torch.save that holds tensors alone"
    )


def test_own_checkpoints_keep_all_options(tmp_path: Path) -> None:
    model = load_pretrained(native(), image_mean=(0.1, 0.2, 0.3), **TOLD)
    model.save(tmp_path / "clip.safetensors")
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match="has its own configuration: give no options"):
        load_pretrained(tmp_path, activation="gelu")


def test_a_checkpoint_of_an_older_version_loads(tmp_path: Path) -> None:
    """Its configuration lacks the options."""
    old = ("embed_dim", "image_size", "patch_size", "image_width", "image_layers", "image_heads",
           "vocab_size", "context_length", "text_width", "text_layers", "text_heads", "scale",
           "bias")  # fmt: skip
    model = CLIP(CLIPConfig())
    config = json.dumps({name: getattr(model.config, name) for name in old})
    save_file(model.state_dict(), tmp_path / "old.safetensors", {"fastclip_config": config})
    assert CLIP.load(tmp_path / "old.safetensors").config == CLIPConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_activation": "relu"}, "image_activation must be one of 'gelu', 'gelu_tanh', 'qui"),
        ({"image_pool": "class"}, "image_pool 'class' needs class_token, got False"),
        ({"text_pool": "end"}, "text_pool 'end' and end_id go together, got 'end' and None"),
        ({"end_id": 3}, "go together, got 'highest' and 3"),
        ({"image_norm_after_pool": True}, "needs image_pool 'class' or 'mean', got 'patches'"),
        ({"text_projection": "none", "embed_dim": 5}, "must be embed_dim, 5, got 256 in the text"),
        ({"image_std": (0.5, 0.0, 0.5)}, "image_std must be three positive numbers"),
        ({"image_std": (float("nan"), 1, 1)}, "image_std must be three positive numbers"),
        ({"image_mean": ("a", 1, 2)}, r"image_mean must be three numbers, got \('a', 1, 2\)"),
        ({"image_mean": 5}, "image_mean must be three numbers, got 5"),
        ({"image_mean": "abc"}, "image_mean must be three numbers, got 'abc'"),
        ({"image_eps": "x"}, "image_eps must be positive, got 'x'"),
        ({"scale": float("inf")}, "scale must be positive, got inf"),
        ({"bias": "x"}, "bias must be a number or None, got 'x'"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"text_eps": 0.0}, "text_eps must be positive, got 0.0"),
        ({"image_layers": True}, "image_layers must be a positive integer, got True"),
    ],
)
def test_options_that_contradict_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPConfig(**options)


@pytest.mark.parametrize("pool", ["class", "mean", "attention", "patches"])
def test_a_model_with_options_learns_everywhere(pool: str) -> None:
    """Every parameter has a gradient, and the features depend on it."""
    torch.manual_seed(0)
    config = CLIPConfig(
        embed_dim=8, image_size=16, image_width=8, image_heads=2, text_width=8, text_heads=2,
        vocab_size=20, context_length=6, class_token=True, image_norm_first=True, image_pool=pool,
        causal=False, text_pool="last", text_projection="biased", image_activation="quick_gelu",
        text_activation="gelu_tanh", image_norm_after_pool=pool == "mean", bias=-3.0,
    )  # fmt: skip
    model = CLIP(config)
    out = model(torch.randn(3, 3, 16, 16), torch.randint(0, 20, (3, 6)))
    total = sum(value.square().sum() for value in out.values())
    (total + out["image_features"][0, 0] + out["text_features"][0, 0]).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert model.image_tokens(torch.zeros(1, 3, 16, 16)).shape == (1, 5, 8)
