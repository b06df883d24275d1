"""The jobs: arguments of open_clip's trainer."""

BATCH = 22  # unlike any size inside the models
STEPS = 3

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1,
    },
}  # fmt: skip
SMALLER = {**TINY, "embed_dim": 20}
COCA = {
    **TINY,
    "embed_dim": 32,
    "vision_cfg": {
        **TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TINY["text_cfg"], "attn_pooler_heads": 2},
    "custom_text": True,
}  # fmt: skip
MODELS = {"tiny": TINY, "smaller": SMALLER, "coca_tiny": COCA}

LOCAL = ["--local-loss", "--gather-with-grad"]
CAPTIONS = ["--model", "coca_tiny", "--pretrained", "{folder}/coca_tiny.pt"]
DISTILLED = ["--distill-model", "smaller", "--distill-pretrained", "{folder}/smaller.pt"]
JOBS = {
    "fp32": [],
    "amp_bf16": ["--precision", "amp_bf16"],
    "accumulated": ["--accum-freq", "2"],
    "siglip": ["--siglip"],
    "coca": CAPTIONS,
    "distilled": DISTILLED,
    "checkpointed": ["--grad-checkpointing"],
    "validated": ["--val-data", "{folder}/66.csv", "--val-frequency", "1"],
    "compiled": ["--torchcompile"],
    "local": LOCAL,
    "local_accumulated": [*LOCAL, "--accum-freq", "2"],
    "local_coca": [*LOCAL, *CAPTIONS],
    "local_distilled": [*LOCAL, *DISTILLED],
    "siglip_gather": ["--siglip", "--loss-dist-impl", "gather"],
    # open_clip 4
    "task": ["--torchcompile", "--torchcompile-strategy", "task"],
    "step": ["--torchcompile", "--torchcompile-strategy", "step"],
    "fsdp": [*LOCAL, "--fsdp"],
}


def pairs_of(job: str, ranks: int) -> int:
    """The number of pairs that a job trains with."""
    return BATCH * STEPS * ranks * (2 if "--accum-freq" in JOBS[job] else 1)


def arguments(job: str, folder: str, ranks: int) -> list[str]:
    """The trainer's arguments."""
    given = [argument.format(folder=folder) for argument in JOBS[job]]
    pairs = f"{folder}/{pairs_of(job, ranks)}.csv"
    return [
        "--train-data", pairs, "--dataset-type", "csv", "--csv-separator", ",",
        "--csv-img-key", "image", "--csv-caption-key", "caption", "--model", "tiny",
        "--precision", "fp32", "--batch-size", str(BATCH), "--epochs", "1", "--workers", "0",
        "--lr", "3e-3", "--warmup", "1", "--seed", "3", "--log-every-n-steps", "1",
        "--device", "cpu", *given,
    ]  # fmt: skip
