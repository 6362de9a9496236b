"""Several processes that train one model: each works on its part of the batch, then all gradients are summed.

    torchrun --nproc-per-node 2 train.py         # sets RANK, WORLD_SIZE, ...; without it everything here is a no-op
    accelerate launch --multi_gpu --num_processes 2 train.py     # does the same, on a CPU too

Gradients are *added*, not averaged: a part with few answer tokens must not count as much as a part with many. The sum
is divided by the weight of the whole batch afterwards (see `loop.py`), so two processes do what one would do with the
whole batch.

Here every process holds the whole model. `sharding.py` is for models that are too large for that.
"""

from __future__ import annotations

import atexit
import importlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The others wait while the first one validates, or reads a disk that is slow.
TIMEOUT = timedelta(hours=2)


def start() -> tuple[int, int]:
    """(rank, number of processes). The first call joins the group of processes that torchrun has announced."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        # A trap: this module's functions have the group as a default, so imported later (optimizers do that) it keeps
        # the group alive, and `leave` does not end its threads. One of them was then seen to let go of a tensor while
        # the interpreter was closing down, which aborts the process: pytorch/pytorch#190489.
        importlib.import_module("torch.distributed.nn.functional")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_weights(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place.

    A parameter without a gradient (a batch without pictures does not reach the vision tower) gets one of zeros, also
    with a single process. So Adam's momentum still moves it, as in the reference, however a batch is divided.
    The gradients of a sharded model are left as they are: the backward pass has summed them already.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad and not is_sharded(parameter)]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and dist.is_initialized():
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))


def all_reduce_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Sum numbers by name over all processes. A process that had no rows has fewer names."""
    if not dist.is_initialized():
        return dict(figures)
    theirs: list[Mapping[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(theirs, figures)
    return {
        name: sum(one.get(name, 0.0) for one in theirs) for name in sorted({name for one in theirs for name in one})
    }


def norm(gradients: Sequence[Tensor], sharded: bool) -> float:
    """The norm of all gradients together. sharded: these are the rows of this process only."""
    own = float(nn.utils.get_total_norm(gradients))
    return math.sqrt(all_reduce_figures({"square": own**2})["square"]) if sharded else own


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold rows of it each: a DTensor. (To import that class would take seconds.)"""
    return hasattr(tensor, "to_local")


def own_rows(tensor: Any) -> Tensor:
    """The rows that this process holds of a sharded tensor, in the same memory; any other tensor as it is."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def together(action: Callable[[], None]) -> None:
    """Run `action` on every process. If one of them fails, all raise, so that none waits for ever."""
    error: Exception | None = None
    try:
        action()
    except Exception as failed:
        error = failed
    failures = all_reduce_figures({"failures": float(error is not None)})["failures"]
    if error is not None:
        raise error
    if failures:
        raise OSError(f"{failures:.0f} of {dist.get_world_size()} processes failed, see what they say")


def broadcast(number: float) -> float:
    """The first process's number. For decisions that all must make alike, where their clocks would differ."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return tensor.item()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
