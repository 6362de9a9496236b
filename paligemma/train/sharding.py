"""A model too large for one device, in pieces: each process keeps its rows of every weight (FSDP2).

    sharded = shard(model)        # trains like `model`, which is left without its weights
    gather(sharded, model)        # the first process has the whole model again

Of every parameter, its gradient and its optimizer's state a process holds the rows `r`, and N processes need an Nth of
the memory each. A layer is whole only while it computes: just before, its rows are fetched from all processes; after
its backward pass the gradients are added up and each process gets its rows of the sum.

    process 0   rows 0-1 of W    --.                                .--> sum of the gradients' rows 0-1
    process 1   rows 2-3 of W    --+--> W, x -> layer -> gradient --+--> sum of the gradients' rows 2-3

What is unusual:
- the layers of decoder and vision tower are gathered one by one. The rest (embedding, projector, norms) stays whole
  from forward to backward: the embedding is needed first, and last as the head, after `forward` has returned;
- all processes must go through the same layers in the same order, or they wait for each other for ever. One without
  rows takes `nothing()`; where a batch has no picture, the vision tower sees a black one, and zero times its output is
  added to the result;
- gradients are summed, not averaged (see `distributed.py`).

Follows PyTorch's `fully_shard` and arXiv 1910.02054 (ZeRO, stage 3). Letters: B batch, S sequence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration
from paligemma.train import distributed
from paligemma.train.batches import Batch


def shard(model: PaliGemmaForConditionalGeneration) -> PaliGemmaForConditionalGeneration:
    """A model that shares its weights out among the processes of the group; they are those of the first process.

    The modules are new and the weights move over: `model` is an empty shell until `gather`. What was done to it before
    (frozen parts, LoRA, dropout, recomputed layers) holds for the new one. Parameters keep their names; they are
    DTensors.

    Raises ValueError for another model than PaliGemma, RuntimeError outside of a group of processes.
    """
    if not isinstance(model, PaliGemmaForConditionalGeneration):
        raise ValueError(f"only PaliGemma can be sharded, got {type(model).__name__}")
    if not dist.is_initialized():
        raise RuntimeError("sharding needs several processes: start the script with torchrun or accelerate launch")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    distributed.broadcast_weights(model)
    sharded = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    sharded.read = partial(_with_the_vision_tower, sharded.read, sharded)  # type: ignore[method-assign]
    layers = [*sharded.vision_tower.vision_model.encoder.layers, *sharded.language_model.model.layers]
    for unit in (*layers, sharded):
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not sharded)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(sharded, "read")  # which the loss calls, in place of `forward`
    empty(model)
    return sharded


def gather(sharded: nn.Module, whole: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
    """Fill the shell that `shard` has left with the present weights, on the first process. All have to call this.

    values: sharded tensors that are taken in place of the weights of the same names, such as a running average. Every
    tensor passes through every process, one at a time; only the first one keeps them.
    """
    present: dict[str, Any] = {**sharded.state_dict(), **(values or {})}
    for name, parameter in whole.named_parameters():
        full = present[name].detach().full_tensor()
        if dist.get_rank() == 0:
            parameter.data = full


def empty(whole: nn.Module) -> None:
    """Take the weights out of a shell again."""
    for parameter in whole.parameters():
        parameter.data = parameter.data.new_empty(0)


def mesh_of(sharded: nn.Module) -> Any:
    """The DeviceMesh over which `shard` has shared a model out."""
    parameter: Any = next(sharded.parameters())
    return parameter.device_mesh


# ------------------------------------------------------------------------------------------------------------- rows


def places_of_own_rows(rows: int, mesh: Any) -> tuple[int, int]:
    """(first, end) of the rows that this process holds of a tensor with so many: FSDP's way, as `torch.chunk`'s."""
    each = -(-rows // mesh.size())
    first = mesh.get_local_rank() * each
    return min(first, rows), min(first + each, rows)


def from_own_rows(own: Tensor, rows: int, mesh: Any) -> Tensor:
    """The sharded tensor [rows, ...] of which this process holds the rows `own` [r, ...]."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size([rows, *own.shape[1:]])
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(own.to(mesh.device_type), mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


# -------------------------------------------------------------------------------- taking part without anything to do


def nothing() -> Batch:
    """A batch [B=1, S=2] of padding, without labels: nothing is learned from it, and its loss is 0."""
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    return {
        "input_ids": zeros,
        "attention_mask": zeros,
        "token_type_ids": zeros,
        "labels": torch.full_like(zeros, -100),
    }


def _with_the_vision_tower(read: Callable[..., Tensor], model: Any, *inputs: Any, **named: Any) -> Tensor:
    """`model.read`, which also runs the vision tower where the batch has no pictures: on a black one, times 0."""
    pixel_values = inputs[1] if len(inputs) > 1 else named.get("pixel_values")
    if not model.training or pixel_values is not None:
        return read(*inputs, **named)
    side = model.config.vision_config.image_size
    nothing = 0 * model.encode_image(torch.zeros(1, 3, side, side, device=model.device)).sum()  # first, as elsewhere
    return read(*inputs, **named) + nothing
