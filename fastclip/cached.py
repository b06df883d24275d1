"""`cached_step`: the gradients of a batch that the towers cannot hold at once.

The towers run twice and the loss once (GradCache: Gao et al., arXiv 2101.06983). All micro-batches
are encoded without a graph. One loss over all features gives the features' gradients. Each
micro-batch is encoded again with a graph, and these gradients go on into the towers. Memory holds
the activations of one micro-batch and the features of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine.checks import check_features

TOWERS = ("image_features", "text_features")


class _Encoded(NamedTuple):
    """A model's outputs: both towers' features, and what all pairs share (scale, bias)."""

    towers: tuple[Tensor, Tensor]
    shared: tuple[Any, ...]
    names: tuple[str, ...] | None  # the keys, if the model returns a dictionary

    @classmethod
    def of(cls, outputs: Any) -> _Encoded:
        if isinstance(outputs, Mapping):
            missing = [name for name in TOWERS if name not in outputs]
            if missing:
                raise ValueError(
                    f"the model must return {' and '.join(TOWERS)}, got {', '.join(outputs)}"
                )
            others = [name for name in outputs if name not in TOWERS]
            towers = outputs[TOWERS[0]], outputs[TOWERS[1]]
            return cls(towers, tuple(outputs[n] for n in others), (*TOWERS, *others))
        if not isinstance(outputs, Sequence) or len(outputs) < 3:
            raise ValueError(
                "the model must return (image_features, text_features, logit_scale) or more, or "
                f"a dictionary of them, got {type(outputs).__name__}"
            )
        return cls((outputs[0], outputs[1]), tuple(outputs[2:]), None)

    def check_shared(self) -> None:
        for value in self.shared:
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(
                    "the model's outputs besides features must be one number each, such as "
                    f"logit_scale, got shape {tuple(value.shape)}"
                )

    def call(self, loss: Callable[..., Any]) -> Tensor:
        values = (*self.towers, *self.shared)
        if self.names is None:
            value = loss(*values)
        else:
            value = loss(**dict(zip(self.names, values, strict=True)))
        return sum(value.values()) if isinstance(value, Mapping) else value


def cached_step(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *inputs: Tensor,
    micro_batch: int,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Adds the gradients of `loss(**model(*inputs))` to the model's parameters, in micro-batches.

        outputs = model(*inputs)
        loss(**outputs).backward()  # or loss(*outputs)

    Args:
        model: a module or function that takes `micro_batch` rows of every input. It returns image
            features and text features (m, D), then values that all pairs share, such as
            `logit_scale`; as a tuple, or as a dictionary with open_clip's keys. It is called twice
            for every micro-batch with the same state of the random number generators, so dropout
            is the same. Running statistics, such as batch normalisation's, are updated twice and
            are those of micro-batches. A model in DDP or FSDP2 exchanges gradients once, after the
            last micro-batch. FSDP2 gathers parameters for each micro-batch, so all ranks must have
            the same number of them.
        loss: a function of the model's outputs for the whole batch; it is called once. For a batch
            that is spread over processes use a loss of `fastclip.distributed`, or `ClipLoss` with
            its world size.
        inputs: (N, ...) each, N pairs.
        micro_batch: the number of pairs that are encoded at once; the last one may be smaller.
        scaler: scales the loss before its backward, for fp16 autocast. The caller calls
            `scaler.step`, and enters `torch.autocast` around this call.

    Returns:
        The loss, detached.

    Raises:
        ValueError: a micro_batch below 1, no inputs, inputs with different numbers of rows, a model
            that returns something else, or DDP with a static graph, which allows one backward a
            step.
    """
    if getattr(model, "static_graph", False):
        raise ValueError(
            "DDP must have static_graph=False for cached_step, which runs backward several times a "
            "step, got True"
        )
    micro_batches = list(_split(inputs, micro_batch))
    devices = _devices(model, inputs)
    states = []
    with torch.no_grad():
        encoded = []
        for rows in micro_batches:
            states.append(_RandomState(devices))
            encoded.append(_Encoded.of(model(*rows)))
            encoded[-1].check_shared()
    whole = _Encoded(
        tuple(
            torch.cat(parts).requires_grad_()
            for parts in zip(*(e.towers for e in encoded), strict=True)
        ),
        tuple(_leaf(s) if isinstance(s, Tensor) else s for s in encoded[0].shared),
        encoded[0].names,
    )
    del encoded
    check_features(*whole.towers)
    with torch.enable_grad():
        value = whole.call(loss)
    (value if scaler is None else scaler.scale(value)).backward()
    sizes = [len(rows[0]) for rows in micro_batches]
    of_rows = [
        [None] * len(sizes) if tower.grad is None else tower.grad.split(sizes)
        for tower in whole.towers
    ]
    last = len(micro_batches) - 1
    with _restored(devices):
        for index, (rows, state) in enumerate(zip(micro_batches, states, strict=True)):
            state.set()
            with nullcontext() if index == last else _without_exchange(model):
                with torch.enable_grad():
                    again = _Encoded.of(model(*rows))
                pairs = list(zip(again.towers, (g[index] for g in of_rows), strict=True))
                # A shared value has one gradient for the whole batch. It goes into the model once,
                # with the last micro-batch.
                if index == last:
                    pairs += [
                        (s, leaf.grad)
                        for s, leaf in zip(again.shared, whole.shared, strict=True)
                        if isinstance(s, Tensor)
                    ]
                pairs = [(t, g) for t, g in pairs if t.requires_grad and g is not None]
                if pairs:
                    torch.autograd.backward(*zip(*pairs, strict=True))
    return value.detach()


def _split(inputs: tuple[Tensor, ...], micro_batch: int) -> Iterator[tuple[Tensor, ...]]:
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    sizes = [len(x) for x in inputs]
    if not sizes or len(set(sizes)) > 1:
        raise ValueError(f"all inputs must have one number of rows, got {sizes}")
    return zip(*(x.split(micro_batch) for x in inputs), strict=True)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _without_exchange(model: Any) -> AbstractContextManager[Any]:
    """A context in which DDP or FSDP does not exchange gradients."""
    if hasattr(model, "no_sync"):
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        return _fsdp_without_exchange(model)
    return nullcontext()


@contextmanager
def _fsdp_without_exchange(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _devices(model: Any, inputs: tuple[Tensor, ...]) -> list[torch.device]:
    """The devices besides the CPU that may draw random numbers; a model may move its inputs."""
    found = {x.device for x in inputs}
    if isinstance(model, torch.nn.Module):
        found |= {t.device for t in (*model.parameters(), *model.buffers())}
    if torch.cuda.is_initialized():
        found.add(torch.device("cuda", torch.cuda.current_device()))
    return [device for device in found if device.type not in ("cpu", "meta")]


class _RandomState:
    """The state of the random number generators of the CPU and of some devices."""

    def __init__(self, devices: list[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {
            device: torch.get_device_module(device).get_rng_state(device) for device in devices
        }

    def set(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _restored(devices: list[torch.device]) -> Iterator[None]:
    """Restores, on exit, the state that the generators have on entry: their state after the first
    encoding of all micro-batches."""
    after = _RandomState(devices)
    try:
        yield
    finally:
        after.set()
