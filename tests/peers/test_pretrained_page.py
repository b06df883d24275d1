"""The code of the page about pretrained weights runs on a small model of transformers."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.installation import ROOT
from support.peers import peer

from fastclip.clip.byte_pairs import SPECIAL, read


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
