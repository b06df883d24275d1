"""`cached_step`: the gradients of a batch that the towers cannot hold at once.

The towers run twice and the loss once (GradCache: Gao et al., arXiv 2101.06983). All micro-batches
are encoded without a graph. One loss over all features gives the features' gradients. Each
micro-batch is encoded again with a graph, and these gradients go on into the towers. Memory holds
the activations of one micro-batch and the features of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .comparison import Comparison
from .gradients import evaluated, gradients_of
from .outputs import Outputs
from .random_state import RandomState, restored
from .ranks import StepRanks, warn_of_separate_gradients
from .second_pass import SecondPass
from .towers import Towers, towers_of
from .wrappers import wrappers_of


def cached_step(
    model: Callable[..., Any] | tuple[Callable[..., Any], Callable[..., Any]],
    loss: Callable[..., Any],
    *inputs: Any,
    micro_batch: int | tuple[int, int],
    scaler: torch.amp.GradScaler | None = None,
    backward: Callable[[Tensor], Any] | None = None,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    check: bool = True,
    outputs: Any = None,
    shared: Any = None,
    **keyword_inputs: Any,
) -> Tensor:
    """Adds the gradients of the loss to the model's parameters, in micro-batches.

        outputs = model(*inputs, **keyword_inputs)
        loss(**outputs).backward()  # or loss(*outputs)

    It is exact, dropout included. Without gradients (`torch.no_grad`, `torch.inference_mode`) it
    encodes once and returns the loss.

    Args:
        model: a module or function that takes `micro_batch` rows of every input. It returns a
            dictionary with image_features and text_features (m, D), as open_clip's models do, or a
            tuple. Further entries are tensors with m rows, such as a teacher's features, or what
            all pairs share: one number, such as `logit_scale`, or None. It is called twice for
            every micro-batch. A model in DDP or FSDP exchanges gradients once, with the last
            micro-batch.
            Two towers, `(image_tower, text_tower)`, have one input each and return features (m, D).
        loss: a function of the model's outputs for the whole batch; it is called once, with keyword
            arguments if the model returns a dictionary. It returns one number, or a dictionary of
            numbers to add. For a batch that is spread over processes use a loss of
            `fastclip.distributed`, or `ClipLoss` with its world size. Parameters of its own get
            their gradients with the last micro-batch.
        inputs, keyword_inputs: the model's arguments for N pairs: tensors (N, ...), numpy arrays,
            lists of N strings, or dictionaries, lists and tuples of these. Other objects are passed
            on whole. The input of one of two towers is its argument, a tuple of its arguments or a
            dictionary of its keyword arguments, with any number of rows.
        micro_batch: the number of rows that are encoded at once; the last micro-batch may be
            smaller. For two towers also a pair.
        scaler: scales the loss before its backward, for fp16 autocast. The caller calls
            `scaler.step`, and enters `torch.autocast` around this call. With `backward`, which
            scales by itself, it only keeps the gradients of fp16 features from underflow.
        backward: takes the place of `loss.backward()`, such as Accelerate's `accelerator.backward`
            or Lightning's `self.manual_backward`. It is called once for each micro-batch, and for
            each tower of two, with a scalar, the surrogate. The surrogate's value is the loss, and
            its backward adds what the micro-batch contributes to the gradients, so that a factor
            such as 1 / accumulation steps enters once. It must not step the optimizer, as
            Accelerate's does with DeepSpeed.
        no_sync: returns a context in which `backward` does not exchange gradients between ranks. It
            is entered for all micro-batches but each tower's last. Default: that of DDP or FSDP, if
            `model` is, contains or refers to such a module.
        check: compares both encodings of each micro-batch. The comparison is read at the end, so
            that nothing waits for the device before.
        outputs: chooses the entries of a model that names them otherwise: a dictionary from the
            loss's keywords to the model's keys, attributes or indices, such as
            `{"image_features": "image_embeds", "text_features": "text_embeds"}`, or a function of
            the model's result. For two towers a key or function, or a pair of them.
        shared: for two towers, what all pairs share: a number or tensor such as `logit_scale`, or a
            tuple or dictionary of them. Tensors may carry a graph.

    Returns:
        The loss, detached.

    Randomness of both encodings is the same if it comes from the global generators of torch, numpy
    or Python. Running statistics, such as batch normalisation's, are updated twice and are those of
    micro-batches. All ranks must have the same number of micro-batches with FSDP, which gathers
    parameters for each of them, and with DDP that broadcasts buffers or holds SyncBatchNorm.

    If the model is DDP or FSDP, `backward` is given, or the loss is fastclip's own across ranks,
    all ranks must call this together: those of the wrapper's group, else of the loss's, else of the
    default group. An error of one rank in its arguments, in its encodings or in the loss's forward
    is raised on all ranks, and so are encodings that differ, unless their group only moves GPU
    tensors. After an error within an exchange (in the loss's backward, in a micro-batch whose
    gradients are exchanged, in a forward of FSDP or of DDP that broadcasts buffers) the others wait
    until that rank ends or the group's timeout is over.

    Raises:
        ValueError: a micro_batch below 1, inputs without rows, with different numbers of rows or
            with a graph, a model that returns something else, a loss that is not one number, or DDP
            with a static graph, which allows one backward a step.
        RuntimeError: the encodings of a micro-batch differ by more than rounding. The gradients are
            added by then.

    Warns:
        Once, in a group of several ranks, if the model is neither DDP nor FSDP, and `backward` is
        not given: gradients then differ between ranks.
    """
    if isinstance(model, nn.ModuleList):
        model = tuple(model)
    parts = model if isinstance(model, (tuple, list)) else (model,)
    wrappers = [wrapper for part in parts for wrapper in wrappers_of(part)]
    ranks = StepRanks(wrappers, loss, backward is not None)

    def checked() -> Towers:
        _refuse_static_graph(wrappers)
        return towers_of(model, inputs, keyword_inputs, micro_batch, outputs, shared)

    with_gradients = torch.is_grad_enabled()

    def compared(towers: Towers) -> dict[str, int]:
        number = {"number of micro-batches": towers.micro_batches} if ranks.in_step else {}
        return {**number, "check": int(check), "torch.is_grad_enabled()": int(with_gradients)}

    towers = ranks.check("arguments that it accepts", checked, compared)
    if with_gradients and not wrappers and backward is None:
        warn_of_separate_gradients()
    devices = towers.devices()
    states: list[list[RandomState]] = [[] for _ in towers.parts]

    def encode() -> Outputs:
        encoded: list[list[Outputs]] = [[] for _ in towers.parts]
        with torch.no_grad():
            for tower, own_states, own in zip(towers.parts, states, encoded, strict=True):
                for index in range(len(tower.sizes)):
                    if with_gradients:
                        own_states.append(RandomState(devices))
                    own.append(tower.encode(index))
        # torch 2.10 would reuse autocast's copies of parameters, which have no graph.
        torch.clear_autocast_cache()
        return towers.whole(encoded, with_gradients)

    # Ranks that exchange in their forwards could not hear of an error.
    whole = encode() if ranks.in_step else ranks.check("a model that encodes their inputs", encode)
    if not with_gradients:
        return ranks.check("a loss of their outputs", lambda: whole.of_loss(loss)).detach()
    value = ranks.check("a loss of their outputs", lambda: evaluated(loss, whole, scaler))
    # The loss's backward may be an exchange, in which no rank can hear of another one's error.
    found = gradients_of(value, whole)
    again = SecondPass(towers, states, whole, found, backward, no_sync)
    if scaler is not None and backward is not None:
        again.divisor = scaler.scale(torch.ones((), device=found.value.device))
    if check:
        again.comparison = Comparison(towers.parameters(), found.value.device)
    first = again.jobs_before_exchange(ranks.in_step)
    with restored(devices):
        ranks.check("a model that encodes them again", lambda: again.run(slice(first)))
        again.run(slice(first, None))
    if again.comparison is not None:
        ranks.check_equal(again.comparison)
    return found.value


def _refuse_static_graph(wrappers: list[nn.Module]) -> None:
    if any(getattr(wrapper, "static_graph", False) for wrapper in wrappers):
        raise ValueError(
            "DDP must have static_graph=False for cached_step, which runs backward several times a "
            "step, got True"
        )
