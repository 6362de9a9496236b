"""Matrix products in PyTorch's operators, for layers and devices that the kernels don't serve.

A CPU without bfloat16 instructions multiplies bfloat16 one number at a time. There a product is computed in float32:
the weight stays as it is in memory and becomes float32 piece by piece.

Letters: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paligemma import devices
from paligemma.fast.rounding import unpack

FEW_ROWS = 16  # up to here reading the weights limits a product; beyond, PyTorch's matrix product may be faster


def has_few_rows(x: Tensor) -> bool:
    """Whether x [..., K] has so few rows that reading the weights takes most of the time."""
    return x.numel() <= FEW_ROWS * x.shape[-1]


def slow_in_bfloat16(x: Tensor) -> bool:
    """Whether x is bfloat16 on a device that multiplies float32 many times faster."""
    return x.dtype == torch.bfloat16 and not devices.multiplies_bfloat16(x.device)


def needs_gradient(x: Tensor) -> bool:
    """Whether a gradient must flow back through x. It cannot flow through activations rounded to 8 bits."""
    return torch.is_grad_enabled() and x.requires_grad


def multiply_in_float32(x: Tensor, weight: Tensor, steps: Tensor | None = None) -> Tensor:
    """x [M, K] times weight' -> float32 [M, N]. weight: [N, K] of any dtype, or 4 bits, uint8 [N, K / 2], with steps.

    The weight becomes float32 a piece at a time: a piece stays in the CPU's cache until it is multiplied. Where x needs
    a gradient, the whole weight does, because autograd cannot see through the pieces.
    """
    if needs_gradient(x):
        return x.float() @ (weight if steps is None else unpack(weight, steps)).float().T
    x = x.float()
    y = x.new_empty(len(x), len(weight))
    piece = x.new_empty(max(1, 2**20 // max(1, x.shape[-1])), x.shape[-1])  # 4 MB
    for first in range(0, len(weight), len(piece)):
        rows = slice(first, first + len(piece))
        part = weight[rows] if steps is None else unpack(weight[rows], steps[rows])
        torch.mm(x, piece[: len(part)].copy_(part).T, out=y[:, rows])
    return y


def add_bias(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product y [M, N] plus the bias, in dtype and leading shape of the layer's input x [..., K]: [..., N]."""
    return (y if bias is None else y + bias).to(x.dtype).unflatten(0, x.shape[:-1])
