"""Muon beside AdamW, for training from scratch. (Fine-tuning an official checkpoint keeps to AdamW, see `loop.py`.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def muon_and_adamw(
    model: nn.Module,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.98),
    slower: tuple[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden layers, AdamW for all that is not one: embeddings, heads, norms, biases.

    Muon gives every direction of a matrix the same step; scaled with `match_rms_adamw` it takes AdamW's learning rates.
    slower: (what a parameter's name contains, factor): these learn with the learning rate times the factor.

    ValueError for a model of which no such matrix learns.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = slower[1] if slower is not None and slower[0] in name else 1.0
            hidden = ".layers." in name and parameter.ndim == 2
            groups.setdefault((hidden, factor), []).append(parameter)

    if not any(hidden for hidden, _ in groups):
        raise ValueError("muon is for the matrices between hidden layers, and none of them learns: choose adamw")

    def of_kind(hidden: bool, peak: float) -> list[dict[str, Any]]:
        return [{"params": group, "lr": peak * key[1]} for key, group in groups.items() if key[0] == hidden]

    optimizers: list[torch.optim.Optimizer] = [
        SharedMuon(of_kind(True, lr), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    ]
    if others := of_kind(False, adamw_lr):  # none with LoRA in hidden layers alone
        optimizers.append(torch.optim.AdamW(others, lr=adamw_lr, betas=betas, weight_decay=weight_decay))
    return optimizers


class SharedMuon(torch.optim.Muon):
    """Muon whose work is shared out: each process updates its part of the matrices and sends them to the others.

    Orthogonalising a momentum takes fifteen matrix products; done by every process for every matrix that would be a
    third of a small model's step. Expects that all processes have the same gradients. `state_dict` has to be called
    by all of them.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if not dist.is_initialized():
            return super().step(closure)
        rank, world = dist.get_rank(), dist.get_world_size()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in enumerate(parameters):
            if i % world != rank:
                parameter.grad = None  # Muon skips what has no gradient
        loss = super().step(closure)
        for owner in range(world):
            owned = [parameter.detach() for parameter in parameters[owner::world]]
            flat = torch.cat([parameter.flatten() for parameter in owned])
            dist.broadcast(flat, owner)
            if owner != rank:
                for parameter, values in zip(owned, flat.split([parameter.numel() for parameter in owned])):
                    parameter.copy_(values.view_as(parameter))
        return loss

    def state_dict(self) -> dict[str, Any]:
        own = super().state_dict()
        if not dist.is_initialized():
            return own
        rank, world = dist.get_rank(), dist.get_world_size()
        theirs: list[dict[int, dict[str, Tensor]]] = [{}] * world
        dist.all_gather_object(theirs, {i: state for i, state in own["state"].items() if i % world == rank})
        own["state"] = {i: state for part in theirs for i, state in part.items()}
        return own
