"""The arithmetic of rounding to 8 and 4 bits: weights once, activations for every product.

    8 bits   weight = int8 * scale             one scale for each output
    4 bits   weight = (n - 8) * step * scale   n in 0 .. 15; an 8-bit step for each group of 64 inputs, and that scale

Activations are rounded to 8 bits, with one scale for each token. Trained networks have a few channels that are a
hundred times larger than the rest (LLM.int8, arXiv 2208.07339). A scale that reached those would leave nothing for the
others. So numbers beyond 16 times the mean of their token are clipped, and what was clipped is multiplied separately in
float32.

Letters: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64  # 4-bit weights that share a step, as in the C++ files
OUTLIER = 16  # in means of the absolute values of a token, as in the C++ files


def check_finite(name: str, weight: Tensor) -> None:
    """ValueError for a weight with NaN or infinity: there is no scale for it."""
    if not all(bool(part.isfinite().all()) for part in weight.split(4096)):
        raise ValueError(f"{name} has numbers that are not finite: the checkpoint is damaged")


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits with a scale per row: [N, K] -> int8 [N, K] in [-127, 127], float32 [N]; weight = int8 * scale + error.

    The error of a weight is at most half its scale, 1/254 of the largest weight of its row.
    """
    rounded = weight.new_empty(weight.shape, dtype=torch.int8)
    scale = weight.new_empty(weight.shape[0], dtype=torch.float32)
    for part, out, out_scale in zip(weight.split(4096), rounded.split(4096), scale.split(4096)):
        part = part.float()  # a part at a time: the embedding alone would be 2 GB in float32
        out_scale.copy_(part.abs().amax(-1) / 127)
        out.copy_((part / out_scale.clamp(min=1e-30)[:, None]).round())
    return rounded, scale


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: [N, K], K a multiple of 128 -> uint8 [N, K / 2], steps int8 [N, K / 64], scale float32 [N].

    A step is in -15 .. 15. Of 64 bytes (128 weights) the lower halves are the first group, the upper halves the second.
    The largest weight of a group gets n = 0, because -8 is the one number without an opposite; so a step may be
    negative. (Searching for the steps of least squared error gives smaller errors, but no better predictions.)
    """
    N, K = weight.shape
    rounded, steps = weight.new_empty(N, K // 2, dtype=torch.uint8), weight.new_empty(N, K // GROUP, dtype=torch.int8)
    scale = weight.new_empty(N, dtype=torch.float32)
    for part, out, out_steps, out_scale in zip(*(t.split(1024) for t in (weight, rounded, steps, scale))):
        groups = part.float().unflatten(-1, (-1, GROUP))  # [n, K / 64, 64]
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8  # [n, K / 64]
        out_scale.copy_(largest.abs().amax(-1) / 15)
        step = (largest / out_scale.clamp(min=1e-30)[:, None]).round()
        step = torch.where(step == 0, 1, step)  # a group of small weights beside groups of large ones
        out_steps.copy_(step)
        n = (groups / (step * out_scale.clamp(min=1e-30)[:, None])[..., None]).round().clamp(-8, 7) + 8
        halves = n.to(torch.uint8).unflatten(-2, (-1, 2))  # [n, K / 128, 2, 64]
        out.copy_((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1))
    return rounded, steps, scale


def unpack(weight: Tensor, steps: Tensor) -> Tensor:
    """4-bit weights as 8-bit numbers, (n - 8) * step: uint8 [N, K / 2], steps [N, K / 64] -> int8 [N, K]."""
    halves = weight.unflatten(-1, (-1, GROUP))  # [N, K / 128, 64]
    n = torch.stack((halves & 15, halves >> 4), dim=-2).flatten(1).to(torch.int8) - 8
    return (n.unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(1)


def round_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """[M, K] -> int8 [M, K], scale float32 [M, 1], and what was clipped, float32 [M, K], or None if nothing was.

    x = int8 * scale + clipped, with an error of at most half a scale. The scale is at most 16/127 of the mean of the
    token's absolute values. The result for a token depends on that token alone.
    """
    x = x.float()
    total = torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True)
    low, high = x.aminmax(dim=-1, keepdim=True)
    largest = torch.maximum(-low, high)
    bound = total * (OUTLIER / x.shape[-1])
    outlier = None
    if bool((largest > bound).any()):
        outlier = x.abs() > bound
        largest = x.abs().masked_fill(outlier, 0).amax(-1, keepdim=True)
    # A trap: PyTorch computes `127 / largest` as 127 times the reciprocal. That rounds twice and sometimes differs.
    steps = (x * torch.where(largest > 0, largest.new_tensor(127) / largest, 0)).round_()
    # NaN or infinity anywhere in a token shows in its sum. Its result must then be NaN as well.
    scale = torch.where(total.isfinite(), largest / 127, torch.nan)
    if outlier is None:
        return steps.to(torch.int8), scale, None
    steps.clamp_(-127, 127)
    return steps.to(torch.int8), scale, (x - steps * scale).masked_fill_(~outlier, 0)
