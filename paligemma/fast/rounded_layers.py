"""Linear layers and the embedding with weights in 8 or 4 bits.

Each product has several implementations that compute the same to within rounding. `forward` takes the first that
this machine has:

    the kernels of `kernels.py`    8-bit activations, exact integer sums
    PyTorch's integer product      the same numbers, where the CPU has 8-bit dot products (VNNI)
    a product in float32           of unrounded activations

Letters: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paligemma import devices
from paligemma.fast import kernels
from paligemma.fast.products import FEW_ROWS, add_bias, multiply_in_float32, needs_gradient
from paligemma.fast.rounding import GROUP, round_activations, unpack


class Int8Linear(nn.Module):
    """`nn.Linear` with 8-bit weights: weight int8 [N, K], scale float32 [N], bias [N] or None."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed: Tensor | None = None  # a copy in the order of PyTorch's own product, made when first used
        self.register_load_state_dict_post_hook(_forget_packed)

    def forward(self, x: Tensor) -> Tensor:
        if needs_gradient(x):
            return add_bias(multiply_in_float32(x.flatten(0, -2), self.weight) * self.scale, self.bias, x)
        if kernels.kernel_available():
            return kernels.linear_int8(x, self.weight, self.scale, self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # PyTorch's operators insist on it
        if devices.has_dot_products():
            if self.packed is None:
                self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
            y = integer_product(rows, self.weight, self.scale, self.packed)
        elif len(rows) <= FEW_ROWS and x.dtype == torch.bfloat16:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
        else:
            y = multiply_in_float32(rows, self.weight) * self.scale
        return add_bias(y, self.bias, x)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight itself, float32 [..., K]."""
        return self.weight[ids].float() * self.scale[ids][..., None]


class Int4Linear(nn.Module):
    """`nn.Linear` with 4-bit weights: what `round_groups` returns, and the bias [N] or None."""

    weight: Tensor
    steps: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.packed: tuple[Tensor, Tensor] | None = None  # as in Int8Linear
        self.register_load_state_dict_post_hook(_forget_packed)

    def forward(self, x: Tensor) -> Tensor:
        if needs_gradient(x):
            return add_bias(multiply_in_float32(x.flatten(0, -2), self.weight, self.steps) * self.scale, self.bias, x)
        if kernels.kernel_available():
            return kernels.linear_int4(x, self.weight, self.steps, self.scale, self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if len(rows) <= FEW_ROWS and len(self.weight) % 16 == 0:  # what PyTorch's 4-bit operator asks for
            if self.packed is None:
                self.packed = self._pack()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.packed[0], GROUP, self.packed[1])
        elif devices.has_dot_products():
            numbers = unpack(self.weight, self.steps)  # not kept: it is twice the size
            y = integer_product(rows, numbers, self.scale, torch.ops.onednn.qlinear_prepack(numbers, None))
        else:
            y = multiply_in_float32(rows, self.weight, self.steps) * self.scale
        return add_bias(y, self.bias, x)

    def _pack(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(self.steps)
        scale = (self.steps * self.scale[:, None]).bfloat16().T[..., None]  # [K / 64, N, 1]
        return (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(self.weight, ones).int() + 8, 1),
            torch.cat((scale, torch.zeros_like(scale)), dim=-1).contiguous(),
        )


def _forget_packed(layer: Any, _: object) -> None:
    """After other weights were loaded."""
    layer.packed = None


class Int8Embedding(nn.Module):
    """`GemmaEmbedding` in 8 bits: rows of it for tokens, logits from hidden states. dtype: of both."""

    def __init__(self, dtype: torch.dtype, weight: Tensor, scale: Tensor):
        super().__init__()
        self.head = Int8Linear(weight, scale)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.head.rows(ids).to(self.dtype)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        head = self.head if ids is None else Int8Linear(self.head.weight[ids], self.head.scale[ids])
        logits: Tensor = head(hidden)
        return logits


def integer_product(x: Tensor, weight: Tensor, scale: Tensor, packed: Tensor) -> Tensor:
    """What the kernels compute, in PyTorch's operators: x [M, K], int8 weight [N, K], the same packed -> [M, N]."""
    rounded, token_scale, clipped = round_activations(x)
    unsigned = rounded.view(torch.uint8) ^ 128  # the operator takes its activations unsigned, with a zero at 128
    zeros = scale.new_zeros(len(scale), dtype=torch.int64)
    # In bfloat16 this rounds once more than the kernels do, and moves half the bytes.
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scale, zeros, None, 1.0, 0, x.dtype, "none", [], ""
    )
    y *= token_scale
    if clipped is not None:
        columns = clipped.any(0).nonzero()[:, 0]  # a handful
        y += (clipped[:, columns] @ weight[:, columns].float().T) * scale
    return y
