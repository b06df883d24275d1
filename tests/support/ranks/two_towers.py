"""transformers' models on ranks and in its Trainer, for `tests/peers/test_transformers_*.py`."""

import tempfile
from typing import Any

import torch
from support.peers import peer
from support.ranks.trainers import environment
from support.two_towers import batch_of, model_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastclip.integrations.transformers import fuse

B_EACH = 5
UNUSED = "AlignModel", "Tipsv2Model"


def rows_of(name: str, start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch_of(name).items()}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    value = model(**batch, return_loss=True).loss
    value.backward()
    inside = getattr(model, "module", model)
    return {n: p.grad for n, p in inside.named_parameters() if p.grad is not None}, float(
        value.detach()
    )


def without_dropout(name: str) -> nn.Module:
    """A model in train mode whose features of a row depend on that row alone."""
    model = model_of(name)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and (key == "p" or "drop" in key):
                setattr(module, key, 0.0)
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def under_ddp(
    rank: int, world_size: int, name: str, ends: list[int], options: dict[str, Any] | None,
    compiled: bool = False,
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """Gradients after DDP's mean, and this rank's loss. ends: rank r has the rows between entries r
    and r + 1. options: None leaves transformers' own loss."""
    model = without_dropout(name)
    if options is not None:
        fuse(model, **options)
    # These have parameters without use.
    wrapped = DistributedDataParallel(model, find_unused_parameters=name in UNUSED)
    run = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    value = run(**rows_of(name, ends[rank], ends[rank + 1]), return_loss=True).loss
    value.backward()
    return {n: p.grad for n, p in model.named_parameters()}, float(value.detach())


def under_fsdp(rank: int, world_size: int, name: str) -> float:
    """The largest error of a gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, whole = fuse(without_dropout(name)), without_dropout(name)
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (model.vision_model, model.text_model, model):
        fully_shard(part, mesh=mesh)
    model(**rows_of(name, rank * B_EACH, (rank + 1) * B_EACH), return_loss=True).loss.backward()
    exact, _ = gradients(whole, rows_of(name, 0, world_size * B_EACH))
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    return max(float((found[n] - g).abs().max()) for n, g in exact.items())


def evaluated(rank: int, world_size: int, name: str) -> list[float] | None:
    """The first rank evaluates alone, in eval mode and in train mode without gradients."""
    if rank:
        return None
    model, batch = fuse(without_dropout(name)), rows_of(name, 0, B_EACH)
    values = [float(model.eval()(**batch, return_loss=True).loss)]
    with torch.no_grad():
        values.append(float(model.train()(**batch, return_loss=True).loss))
    return values


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]} | {"return_loss": True}


def trained(
    rank: int, world_size: int, name: str, fused: bool, rows: list[int], arguments: dict[str, Any]
) -> dict[str, Any]:
    """Trains with transformers' Trainer on these rows, in this order. Returns parameters, logged
    losses, the loss of an evaluation, whether the model gives logits at the end, and what the first
    rank saved.

    The step is plain descent, so that parameters tell the gradients' size.
    """
    transformers = peer("transformers")
    environment(rank, world_size)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *dataset: Any) -> Any:
            return torch.utils.data.SequentialSampler(*(dataset or (self.train_dataset,)))

    batch = batch_of(name)
    data = [{key: value[row] for key, value in batch.items()} for row in rows]
    model = without_dropout(name)
    if fused:
        fuse(model)
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "output_dir": folder, "use_cpu": True, "report_to": [], "save_strategy": "no",
            "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0, "num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True,
            "remove_unused_columns": False, "per_device_eval_batch_size": 4,
        }  # fmt: skip
        trainer = InOrder(
            model, transformers.TrainingArguments(**defaults | arguments),
            data_collator=collate, train_dataset=data, eval_dataset=data[:8],
        )  # fmt: skip
        trainer.train()
        evaluation = trainer.evaluate()["eval_loss"]
        saved = {}
        if rank == 0:
            trainer.save_model(folder)
            saved = type(model).from_pretrained(folder, dtype=torch.float64).state_dict()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with torch.no_grad():
        logits = model(**rows_of(name, 0, 2), return_loss=True).logits_per_text
    return {
        "parameters": {n: p.detach() for n, p in model.named_parameters()}, "losses": losses,
        "evaluation": evaluation, "logits": logits is not None, "saved": saved,
    }  # fmt: skip
