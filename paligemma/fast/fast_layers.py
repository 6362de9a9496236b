"""The layers of a bfloat16 model on a CPU, computed by kernels: the same mathematics and parameters, less time.

Each class here extends one of the model's and overrides how something is computed, never what. So `swap.py` turns a
built model into a fast one by changing the class of its modules: parameters, their names and hooks stay as they are.

A kernel is used where there is one, where it is faster than PyTorch, and where nothing is being learned: the kernels
compute no gradients. On a CPU without bfloat16 instructions, what is left to PyTorch is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.fast import kernels
from paligemma.fast.kernels import kernel_available
from paligemma.fast.library import instructions
from paligemma.fast.products import FEW_ROWS, add_bias, has_few_rows, multiply_in_float32, slow_in_bfloat16
from paligemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaRMSNorm, apply_rotary
from paligemma.modeling_siglip import SiglipAttention, SiglipMLP


def kernel_applies(x: Tensor) -> bool:
    """Whether a bfloat16 kernel can compute with x, and no gradient is asked for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled() and kernel_available()


def kernels_best_for_many_rows() -> bool:
    """Whether the bfloat16 kernels are faster than PyTorch for many rows as well as for few."""
    return kernels.beats_pytorch_in_bfloat16() and kernels.supports_many_rows()


# ------------------------------------------------------------------------------------------------ linear layers


class FastLinear(nn.Linear):
    """A bfloat16 layer, as fast as its weights can be read from memory (few rows) or multiplied (many rows)."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class FastEmbedding(GemmaEmbedding):
    """The embedding, whose head is such a layer."""

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        return _linear(hidden, self.weight if ids is None else self.weight[ids], None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the fastest way there is here."""
    few = has_few_rows(x)
    if weight.dtype == torch.bfloat16 and (few or kernels_best_for_many_rows()) and kernel_applies(x):
        return kernels.linear_bf16(x, weight, bias)
    if weight.dtype == torch.bfloat16 and not few and slow_in_bfloat16(x) and not torch.is_grad_enabled():
        return add_bias(multiply_in_float32(x.flatten(0, -2), weight), bias, x)
    return F.linear(x, weight, bias)


class FastConv2d(nn.Conv2d):
    """The patch embedding. In float32 where bfloat16 is slow: a tenth of the time at 224 pixels, less at more."""

    def forward(self, x: Tensor) -> Tensor:
        if not slow_in_bfloat16(x) or torch.is_grad_enabled():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)


# ------------------------------------------------------------------------------------------------ norms and MLPs


class FastRMSNorm(GemmaRMSNorm):
    """The norm in one pass. It sums in another order in float32, then rounds once, as before."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16 and kernel_applies(x):
            return kernels.rms_norm_bf16(x, self.weight, self.eps)
        return super().forward(x)


class FastGemmaMLP(GemmaMLP):
    """GELU from a table and its product with the gate's other half in one pass: equal to the bit."""

    def forward(self, x: Tensor) -> Tensor:
        if not kernel_applies(x):
            return super().forward(x)
        hidden: Tensor = self.down_proj(kernels.gelu_bf16(self.gate_proj(x), self.up_proj(x)))
        return hidden


class FastSiglipMLP(SiglipMLP):
    """The same for the vision tower, whose MLP has no gate."""

    def forward(self, x: Tensor) -> Tensor:
        if not kernel_applies(x):
            return super().forward(x)
        hidden: Tensor = self.fc2(kernels.gelu_bf16(self.fc1(x)))
        return hidden


# ------------------------------------------------------------------------------------------------ attention


class FastGemmaAttention(GemmaAttention):
    """Attention by its kernel, which differs from PyTorch's in the order of sums (and, with AVX2, does not round the
    attention weights to bfloat16). Rotary positions by theirs, equal to the bit.
    """

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if len(cos) != len(x) or not kernel_applies(x):
            return apply_rotary(x, cos, sin)
        return kernels.rotary_bf16(x, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.explicit or not (attention_kernel_applies(*q.shape[2:]) and kernel_applies(q)):
            return _attend_by_pytorch(super().attend, q, k, v, mask)
        return kernels.attention_bf16(q, k, v, mask, self.scale, self.softcap)


class FastSiglipAttention(SiglipAttention):
    """The same for the vision tower, which has no mask and no rotary positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.explicit or not (attention_kernel_applies(*q.shape[2:]) and kernel_applies(q)):
            return _attend_by_pytorch(super().attend, q, k, v)
        return kernels.attention_bf16(q, k, v, None, q.shape[-1] ** -0.5)


def attention_kernel_applies(queries: int, head_dim: int) -> bool:
    """Whether the attention kernel is faster than PyTorch: with AVX2 for few queries, with AVX-512 as the others."""
    few = queries <= FEW_ROWS and instructions() == "AVX2"
    return head_dim % 2 == 0 and (few or kernels_best_for_many_rows())


def _attend_by_pytorch(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
    """`attend`; in float32 where the CPU would otherwise convert every single bfloat16 number and back."""
    if slow_in_bfloat16(q):
        return attend(q.float(), k.float(), v.float(), *mask).to(q.dtype)
    return attend(q, k, v, *mask)
