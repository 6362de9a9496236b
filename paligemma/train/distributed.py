"""Several processes that train one model: each works on its part of the batch, then gradients are added up.

    torchrun --nproc-per-node 2 train.py         # sets RANK, WORLD_SIZE, ...; without it everything here is a no-op

Gradients are *added*, not averaged: a part with few answer tokens must not count as much as a part with many. The sum
is divided by the weight of the whole batch afterwards (see `loop.py`), so two processes do what one would do with the
whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn


def start() -> tuple[int, int]:
    """(rank, number of processes). Joins the group that torchrun has announced, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def same_everywhere(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first one."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def add_up(parameters: Iterable[nn.Parameter], numbers: Sequence[float]) -> list[float]:
    """Sum the gradients and some numbers over all processes, in place and as the result. One message for all of it.

    A parameter without a gradient on one process (a text-only part leaves the vision tower alone) counts as zero there.
    """
    if not dist.is_initialized():
        return list(numbers)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    device = parameters[0].device
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(summed.view_as(gradient))
    totals = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def from_the_first(number: float) -> float:
    """The first process's number, for what all have to decide alike and clocks would decide differently."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.broadcast(tensor, 0)
    return tensor.item()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
