"""The code of the page about pretrained weights runs, and so does its command."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.installation import ROOT
from support.peers import peer
from support.pretrained import NATIVE, open_clip_model

from fastclip import zero_shot
from fastclip.clip.byte_pairs import SPECIAL, read
from fastclip.clip.pretrained import rules


def test_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = peer("transformers")
    bpe = read(Path(peer("open_clip").__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
    bpe.add_special_tokens(list(SPECIAL))
    bpe.save(str(tmp_path / "tokenizer.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    Image.new("RGB", (40, 50), "red").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs/pretrained.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    names = {"folder": tmp_path}
    exec(blocks[0], names)
    torch.testing.assert_close(names["p"].sum(1), torch.ones(1))  # type: ignore[attr-defined]


def test_the_command_with_open_clips_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of CLIP's vocabulary without a tokenizer beside them."""
    config = {**NATIVE, "text_cfg": NATIVE["text_cfg"] | {"vocab_size": 49408}}
    theirs = open_clip_model(config, quick_gelu=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    colours = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(colours.numpy()).save(tmp_path / "a.png")
    labels = ["a cat", "two dogs", "café"]
    command = ["--weights", str(tmp_path / "weights.pt"), "--images", str(tmp_path / "a.png"),
               "--labels", ", ".join(labels), "--template", "{}."]  # fmt: skip
    with pytest.raises(SystemExit):
        zero_shot.main(command)
    assert "the weights do not tell image_heads, text_heads, image" in capsys.readouterr().err
    zero_shot.main([*command, "--set", "activation=quick_gelu", "image_heads=3", "text_heads=5"])
    out = capsys.readouterr()
    assert out.err.startswith("tokenizer: ") and out.err.endswith("bpe_simple_vocab_16e6.txt.gz\n")
    tokens = peer("open_clip").tokenizer.SimpleTokenizer(context_length=12)(
        [f"{label}." for label in labels]
    )
    mean, std = (torch.tensor(rules.OPENAI[f"image_{name}"]) for name in ("mean", "std"))
    image = ((colours / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        x, y, scale = theirs(image, tokens).values()
    best = sorted(zip((scale * x @ y.T).softmax(1)[0].tolist(), labels, strict=True), reverse=True)
    assert out.out.strip().endswith("  ".join(f"{100 * v:5.1f} % {label}" for v, label in best))
