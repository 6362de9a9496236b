"""Muon beside AdamW, for training from scratch. (Fine-tuning an official checkpoint keeps to AdamW, see `loop.py`.)"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paligemma.devices import multiplies_bfloat16


def decays_in_reference(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter has weight decay in big_vision: the matrices of the vision tower and the projector alone.

    (Its mask is `.*/kernel$`, and no parameter of its language model is called kernel.)
    """
    decays = name.startswith(("vision_tower", "multi_modal_projector"))
    return decays and parameter.ndim > 1 and "embedding.weight" not in name.replace("patch_embedding", "")


def decayed_apart(
    model: nn.Module, weight_decay: float, lr: float = 1e-5, vision_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW with weight decay as in the reference (`decays_in_reference`).

    vision_lr: the vision tower's share of the learning rate. Weight decay does not depend on it, as in the reference.
    PyTorch multiplies it by the group's learning rate, so we divide it out here.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = vision_lr if name.startswith("vision_tower") else 1.0
            groups.setdefault((decays_in_reference(name, parameter), share), []).append(parameter)
    return [
        {"params": group, "lr": lr * share, "weight_decay": weight_decay / share if decays else 0.0}
        for (decays, share), group in groups.items()
    ]


def adamw(
    model: nn.Module,
    weight_decay: float = 0.0,
    lr: float = 1e-5,
    vision_lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW as in the reference, in one kernel (`fused`), which needs no memory beside its state."""
    groups = decayed_apart(model, weight_decay, lr, vision_lr)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)


def muon_and_adamw(
    model: nn.Module,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.02,
    slower: tuple[str, float] | None = None,
    decay_as_reference: bool = False,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden layers, AdamW for all that is not one: embeddings, heads, norms, biases.

    Muon gives every direction of a matrix the same step; scaled with `match_rms_adamw` it takes AdamW's learning rates.
    slower: (what a parameter's name contains, factor): these learn with the learning rate times the factor.
    weight_decay: times the learning rate; of all parameters. decay_as_reference: of those in `decays_in_reference`, and
    as much of those that learn more slowly.

    ValueError for a model of which no such matrix learns.
    """
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = slower[1] if slower is not None and slower[0] in name else 1.0
            hidden = ".layers." in name and parameter.ndim == 2
            decay = weight_decay
            if decay_as_reference:  # torch multiplies it with the group's own rate
                decay = weight_decay / factor if decays_in_reference(name, parameter) else 0.0
            groups.setdefault((hidden, factor, decay), []).append(parameter)

    if not any(hidden for hidden, _, _ in groups):
        raise ValueError("muon is for the matrices between hidden layers, and none of them learns: choose adamw")

    def of_kind(hidden: bool, peak: float) -> list[dict[str, Any]]:
        return [
            {"params": group, "lr": peak * factor, "weight_decay": decay}
            for (kind, factor, decay), group in groups.items()
            if kind == hidden
        ]

    optimizers: list[torch.optim.Optimizer] = [SharedMuon(of_kind(True, lr), lr, weight_decay)]
    if others := of_kind(False, adamw_lr):  # none with LoRA in hidden layers alone
        optimizers.append(
            torch.optim.AdamW(others, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
        )
    return optimizers


class SharedMuon(torch.optim.Muon):
    """Muon whose work is shared out: each process updates its part of the matrices and sends them to the others.

    Orthogonalising a momentum takes fifteen matrix products; done by every process for every matrix that would be a
    third of a small model's step. Expects that all processes have the same gradients. `state_dict` has to be called
    by all of them.

    PyTorch's own step orthogonalises in bfloat16 wherever it runs. Here it is float32 on a CPU that has no products of
    bfloat16, where Muon would otherwise take longer than all the rest.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float):
        # The size of a step of AdamW: a root mean square of 0.2 (arXiv 2502.16982).
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        places = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for parameter, group in places[rank::world]:
            if parameter.grad is not None:
                self._move(parameter, parameter.grad, group)
        if world == 1:
            return loss
        for owner in range(min(world, len(places))):
            owned = [parameter.detach() for parameter, _ in places[owner::world]]
            flat = torch.cat([parameter.flatten() for parameter in owned])
            dist.broadcast(flat, owner)
            if owner != rank:
                for parameter, values in zip(owned, flat.split([parameter.numel() for parameter in owned])):
                    parameter.copy_(values.view_as(parameter))
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of one matrix, as in `torch.optim.Muon`: Nesterov's momentum, orthogonalised; decay apart."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"])
        update = update.bfloat16() if multiplies_bfloat16(update.device) else update
        update = orthogonalised(update, *group["ns_coefficients"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))

    def state_dict(self) -> dict[str, Any]:
        own = super().state_dict()
        if not dist.is_initialized():
            return own
        rank, world = dist.get_rank(), dist.get_world_size()
        theirs: list[dict[int, dict[str, Tensor]]] = [{}] * world
        dist.all_gather_object(theirs, {i: state for i, state in own["state"].items() if i % world == rank})
        own["state"] = {i: state for part in theirs for i, state in part.items()}
        return own


def orthogonalised(matrix: Tensor, a: float, b: float, c: float, steps: int = 5) -> Tensor:
    """U V' of a matrix U S V', nearly: its singular values come out between about 0.7 and 1.2.

    Newton-Schulz steps: s becomes a s + b s^3 + c s^5, which pulls every s in 0 .. 1 towards 1, the small ones fast.
    Source: https://kellerjordan.github.io/posts/muon/, where the usual coefficients are from.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T, a, b, c, steps).T
    x = matrix / matrix.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x
