"""Smaller weights and faster linear layers, put into a finished model from outside.

    quantize(model, "int8")                          a built model, in place
    load_quantized(path) / load_hf_model(..., quantize="int8")
    quantize_checkpoint("official/", "small/", "int8")   on disk, tensor by tensor; `load` then maps the result

    mode   decoder          eye, projector, head   bytes of a 3b   arithmetic
    bf16   as it is         as it is               5.8 GB          exact products, float32 sums, rounded once
    int8   8 bits           8 bits                 2.9 GB          8-bit activations, exact integer sums
    int4   4 bits           8 bits                 2.0 GB          8-bit activations, exact integer sums

8 bits: a whole number times the scale of its output. 4 bits: a number of 16 times the step of its group of 64 inputs,
which is a whole number of 8 bits, times the scale of its output. Norms, softmax, the stream between the layers, biases
and the patch embedding stay in the model's dtype.

Activations are rounded to 8 bits with a scale per token, `round_activations`. Trained networks have a few channels a
hundred times larger than the rest (arXiv 2208.07339), and a scale that reaches these leaves nothing for the others.
So what lies beyond 16 times the mean of its token is clipped, and what was clipped is multiplied apart in float32.

In all three modes GELU, norms and rotary positions of a bfloat16 model go through kernels as well, and attention where
its kernel is the faster: with AVX2 for few queries, with AVX-512 where the CPU has bfloat16 in vectors and none in
tiles. The decoder's layers take the next tokens in one call each. See `FAST`.

Two ways to compute the same: the kernels of `linear_kernels.py`, or PyTorch's own operators where those can't be had. A
CPU with neither VNNI (dot products of 8 bits) nor products of bfloat16 multiplies many rows in float32, whose sums are
rounded: 8-bit activations are then those of the kernels, or, without any kernel, left as they are.
The model's files know nothing of all this: modules are swapped, and what they are is seen in `swap` alone.

bitsandbytes, for CUDA, is taken as it is: modes "bnb-int8" and "nf4".

Letters: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from paligemma import devices
from paligemma.devices import multiplies_bfloat16
from paligemma.fast import kernels
from paligemma.fast.kernels import GROUP, kernel_available
from paligemma.files import read_json
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import (
    Gemma2DecoderLayer,
    GemmaAttention,
    GemmaDecoderLayer,
    GemmaEmbedding,
    GemmaMLP,
    GemmaRMSNorm,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)
from paligemma.modeling_siglip import SiglipAttention, SiglipMLP
from paligemma.weights.expected import check_tensors, empty_model, expected_shapes
from paligemma.weights.layouts import POSITIONS
from paligemma.weights.loading import (
    at_image_size,
    config_at_image_size,
    default_dtype,
    parse_dtype,
    resample_positions,
)
from paligemma.weights.npz import damaged
from paligemma.weights.opening import INDEX, WEIGHTS, Checkpoint, files_of_index, open_checkpoint
from paligemma.weights.safetensors_file import DTYPES, MappedFile, Shape
from paligemma.weights.saving import check_apart, write_folder

STORED = ("int8", "int4")  # modes that a checkpoint on disk can have
MODES = ("bf16", *STORED, "bnb-int8", "nf4")
OUTLIER = 16  # in means of the absolute values of a token, as in the C++ files
FEW_ROWS = 16  # up to here a product is limited by reading the weights; beyond, PyTorch's matrix product is better

# ---------------------------------------------------------------------------------------------- rounding weights


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8 bits with a scale per row: [N, K] -> int8 [N, K] in [-127, 127], float32 [N]; weight = int8 * scale + error.

    The error of a weight is at most half its scale, 1/254 of the largest weight of its row.
    """
    rounded = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=torch.float32)
    for part, out, out_scale in zip(weight.split(4096), rounded.split(4096), scale.split(4096)):
        part = part.float()  # a part at a time: the embedding alone would be 2 GB in float32
        out_scale.copy_(part.abs().amax(-1) / 127)
        out.copy_((part / out_scale.clamp(min=1e-30)[:, None]).round())
    return rounded, scale


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """4 bits: [N, K], K a multiple of 128 -> uint8 [N, K / 2], steps int8 [N, K / 64], scale float32 [N].

    A weight is (n - 8) * step * scale: n in 0 .. 15 its own, the step, in -15 .. 15, of its group, the scale of its
    row. Of 64 bytes (128 weights) the lower halves are the first group, the upper halves the second. The largest weight
    of a group gets n = 0, for -8 is the one number without an opposite; so a step may be negative. (Searching for the
    steps of least squared error gives smaller errors and, measured, no better predictions.)
    """
    N, K = weight.shape
    rounded, steps = torch.empty(N, K // 2, dtype=torch.uint8), torch.empty(N, K // GROUP, dtype=torch.int8)
    scale = torch.empty(N, dtype=torch.float32)
    for part, out, out_steps, out_scale in zip(*(t.split(1024) for t in (weight, rounded, steps, scale))):
        groups = part.float().unflatten(-1, (-1, GROUP))  # [n, K / 64, 64]
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0] / -8  # [n, K / 64]
        out_scale.copy_(largest.abs().amax(-1) / 15)
        step = (largest / out_scale.clamp(min=1e-30)[:, None]).round()
        step = torch.where(step == 0, 1, step)  # a group of small weights, beside large ones
        out_steps.copy_(step)
        n = (groups / (step * out_scale.clamp(min=1e-30)[:, None])[..., None]).round().clamp(-8, 7) + 8
        halves = n.to(torch.uint8).unflatten(-2, (-1, 2))  # [n, K / 128, 2, 64]
        out.copy_((halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1))
    return rounded, steps, scale


def unpack(weight: Tensor, steps: Tensor) -> Tensor:
    """uint8 [N, K / 2], steps [N, K / 64] -> the 8-bit numbers that they stand for, int8 [N, K]."""
    halves = weight.unflatten(-1, (-1, GROUP))  # [N, K / 128, 64]
    n = torch.stack((halves & 15, halves >> 4), dim=-2).flatten(1).to(torch.int8) - 8
    return (n.unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(1)


# ---------------------------------------------------------------------------------------------- rounding activations


def round_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """[M, K] -> int8 [M, K], scale float32 [M, 1], and what was clipped, float32 [M, K], None if nothing was.

    x = int8 * scale + clipped, up to half a scale, which is at most 16/254 of the mean of the token's absolute values.
    A token's numbers depend on that token alone.
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
    # A trap: `127 / largest` would be 127 times the reciprocal, rounded twice, and now and then the next number.
    steps = (x * torch.where(largest > 0, largest.new_tensor(127) / largest, 0)).round_()
    # Not a number, or infinite: the sum tells, and the result is then no number either.
    scale = torch.where(total.isfinite(), largest / 127, torch.nan)
    if outlier is None:
        return steps.to(torch.int8), scale, None
    steps.clamp_(-127, 127)
    return steps.to(torch.int8), scale, (x - steps * scale).masked_fill_(~outlier, 0)


# ---------------------------------------------------------------------------------------------- the layers


class FastLinear(nn.Linear):
    """A bfloat16 layer whose products are computed as fast as memory can be read, or the CPU can multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self.weight, self.bias)


class FastEmbedding(GemmaEmbedding):
    """The embedding with such a head."""

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        return _product(hidden, self.weight if ids is None else self.weight[ids], None)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the kernel where that is the faster one and nothing is being learned."""
    few = _few(x)
    if weight.dtype == torch.bfloat16 and (few or _many_for_kernel()) and _for_kernel(x):
        return kernels.linear_bf16(x, weight, bias)
    if weight.dtype == torch.bfloat16 and not few and slow_in_bfloat16(x) and not torch.is_grad_enabled():
        return with_bias(in_float32(x.flatten(0, -2), weight), bias, x)
    return F.linear(x, weight, bias)


def _few(x: Tensor) -> bool:
    return x.numel() <= FEW_ROWS * x.shape[-1]


def _many_for_kernel() -> bool:
    """Whether kernels for bfloat16 are the faster also where rows are many."""
    return kernels.beats_pytorch_in_bfloat16() and kernels.takes_many_rows()


def slow_in_bfloat16(x: Tensor) -> bool:
    """Whether x would be multiplied number by number, and float32 is better."""
    return x.dtype == torch.bfloat16 and not multiplies_bfloat16(x.device)


def _learns(x: Tensor) -> bool:
    """Whether something before x wants its gradient. Rounded to 8 bits it would have none: activations stay whole."""
    return torch.is_grad_enabled() and x.requires_grad


def in_float32(x: Tensor, weight: Tensor, steps: Tensor | None = None) -> Tensor:
    """x [M, K], weight [N, K] in another dtype, or in 4 bits [N, K / 2] with its steps -> x weight' [M, N], float32.

    The weight is made float32 a piece at a time, which stays in the cache until it is multiplied; at once where a
    gradient for x is wanted.
    """
    if _learns(x):
        return x.float() @ (weight if steps is None else unpack(weight, steps)).float().T
    x, y = x.float(), torch.empty(len(x), len(weight), dtype=torch.float32)
    piece = torch.empty(max(1, 2**20 // max(1, x.shape[-1])), x.shape[-1])  # 4 MB
    for first in range(0, len(weight), len(piece)):
        rows = slice(first, first + len(piece))
        part = weight[rows] if steps is None else unpack(weight[rows], steps[rows])
        torch.mm(x, piece[: len(part)].copy_(part).T, out=y[:, rows])
    return y


def _for_kernel(x: Tensor) -> bool:
    """Whether a kernel for bfloat16 can take x, and nothing is being learned: the kernels know no gradients."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled() and kernel_available()


class FastRMSNorm(GemmaRMSNorm):
    """The norm in one pass; float32 sums in another order, then rounded once, as before."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16 and _for_kernel(x):
            return kernels.rms_norm_bf16(x, self.weight, self.eps)
        return super().forward(x)


class FastGemmaMLP(GemmaMLP):
    """GELU, found in a table, and what it gates in one pass: equal to the bit."""

    def forward(self, x: Tensor) -> Tensor:
        if not _for_kernel(x):
            return super().forward(x)
        hidden: Tensor = self.down_proj(kernels.gelu_bf16(self.gate_proj(x), self.up_proj(x)))
        return hidden


class FastSiglipMLP(SiglipMLP):
    """The same for the eye, where nothing is gated."""

    def forward(self, x: Tensor) -> Tensor:
        if not _for_kernel(x):
            return super().forward(x)
        hidden: Tensor = self.fc2(kernels.gelu_bf16(self.fc1(x)))
        return hidden


class FastGemmaAttention(GemmaAttention):
    """Attention by its kernel: as in PyTorch's, but for the order of sums (and with AVX2 unrounded weights). Rotary
    positions by theirs: equal to the bit."""

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if len(cos) != len(x) or not _for_kernel(x):
            return super().turn(x, cos, sin)
        return kernels.rotary_bf16(x, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.explicit or not (_attention_for_kernel(*q.shape[2:]) and _for_kernel(q)):
            return _in_good_numbers(super().attend, q, k, v, mask)
        return kernels.attention_bf16(q, k, v, mask, self.scale, self.softcap)


class FastSiglipAttention(SiglipAttention):
    """The same for the eye, where nothing is hidden."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.explicit or not (_attention_for_kernel(*q.shape[2:]) and _for_kernel(q)):
            return _in_good_numbers(super().attend, q, k, v)
        return kernels.attention_bf16(q, k, v, None, q.shape[-1] ** -0.5)


class FastGemmaDecoderLayer(GemmaDecoderLayer):
    """The next tokens of cached rows in one call. Equal to the bit."""

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        norms = self.input_layernorm, None, self.post_attention_layernorm, None
        y = _in_one_call(self.self_attn, self.mlp, norms, x, mask, cos, sin, cache, last)
        return super().forward(x, mask, cos, sin, cache, last) if y is None else y


class FastGemma2DecoderLayer(Gemma2DecoderLayer):
    """The same with the four norms of Gemma 2."""

    def forward(
        self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, last: int = 0
    ) -> Tensor:
        norms_of_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        norms = self.input_layernorm, self.post_attention_layernorm, *norms_of_mlp
        y = _in_one_call(self.self_attn, self.mlp, norms, x, mask, cos, sin, cache, last)
        return super().forward(x, mask, cos, sin, cache, last) if y is None else y


def _in_one_call(
    attention: GemmaAttention,
    mlp: GemmaMLP,
    norms: Sequence[GemmaRMSNorm | None],
    x: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache | None,
    last: int,
) -> Tensor | None:
    """A decoder layer by `kernels.decoder_layer`, or None where its parts have to be called one by one.

    A kernel passes by the hooks of a module, and what was put in its place, such as LoRA. So there must be none.
    """
    if cache is None or last not in (0, x.shape[1]) or len(cos) != len(x) or not x.numel():
        return None
    if not (_few(x) and _for_kernel(x) and _attention_for_kernel(x.shape[1], attention.head_dim)):
        return None
    if type(attention) is not FastGemmaAttention or attention.explicit or type(mlp) is not FastGemmaMLP:
        return None
    if any(n is not None and (type(n) is not FastRMSNorm or n.weight.dtype != x.dtype) for n in norms):
        return None
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    weights = [weights for linear in linears if (weights := _weights(linear)) is not None]
    keys, values = cache.keys[attention.layer], cache.values[attention.layer]
    if len(weights) < len(linears) or keys.dtype != x.dtype:
        return None
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return None
    for part in (attention, mlp, *linears, *norms):
        if part is not None and (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__):
            return None
    of_norms = [None if norm is None else norm.weight for norm in norms]
    eps = max(norm.eps for norm in norms if norm is not None)  # of a layer, all have the same
    in_cache = keys, values, cache.used
    return kernels.decoder_layer(
        x, weights, of_norms, cos, sin, mask, *in_cache, eps, attention.scale, attention.softcap
    )


def _weights(linear: nn.Module) -> kernels.Weights | None:
    """What a linear layer multiplies with, as `kernels.decoder_layer` wants it; None for what it cannot take."""
    if type(linear) not in (FastLinear, Int8Linear, Int4Linear) or linear.bias is not None:
        return None
    if isinstance(linear, Int4Linear):
        return linear.weight, linear.steps, linear.scale
    return linear.weight, None, linear.scale if isinstance(linear, Int8Linear) else None


def _attention_for_kernel(queries: int, head_dim: int) -> bool:
    few = queries <= FEW_ROWS and kernels.instructions() == "AVX2"
    return head_dim % 2 == 0 and (few or _many_for_kernel())


def _in_good_numbers(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
    """`attend` in float32 where the CPU would have to make each bfloat16 a float32 by itself, and back."""
    if slow_in_bfloat16(q):
        return attend(q.float(), k.float(), v.float(), *mask).to(q.dtype)
    return attend(q, k, v, *mask)


class FastConv2d(nn.Conv2d):
    """The patches of a picture, in float32 where a CPU has no fast products of bfloat16: a tenth of the time at 224
    pixels, and less at more."""

    def forward(self, x: Tensor) -> Tensor:
        if not slow_in_bfloat16(x) or torch.is_grad_enabled():
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)


# What stands between the linear layers, and what takes its place in a built model.
FAST: dict[type[nn.Module], type[nn.Module]] = {
    GemmaDecoderLayer: FastGemmaDecoderLayer,
    Gemma2DecoderLayer: FastGemma2DecoderLayer,
    GemmaAttention: FastGemmaAttention,
    SiglipAttention: FastSiglipAttention,
    GemmaRMSNorm: FastRMSNorm,
    GemmaMLP: FastGemmaMLP,
    SiglipMLP: FastSiglipMLP,
    nn.Conv2d: FastConv2d,
}


def speed_up_the_rest(model: nn.Module) -> None:
    """Puts the classes of FAST in their places. Only the class of a module changes: see `_with_fast_rows`."""
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]


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
        self.packed: Tensor | None = None  # a copy in the order that PyTorch's own product wants, made when first used

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x):
            return with_bias(weights_only(x.flatten(0, -2), self.weight, self.scale), self.bias, x)
        if kernel_available() and (_few(x) or kernels.takes_many_rows()):
            return kernels.linear_int8(x, self.weight, self.scale, self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # PyTorch's operators insist on it
        if devices.has_dot_products():
            if self.packed is None:
                self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
            y = exact_product(rows, self.weight, self.scale, self.packed)
        elif kernel_available():
            y = weights_only(as_rounded(rows), self.weight, self.scale)
        elif len(rows) <= FEW_ROWS and x.dtype == torch.bfloat16:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale.bfloat16())
        else:
            y = weights_only(rows, self.weight, self.scale)
        return with_bias(y, self.bias, x)

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

    def forward(self, x: Tensor) -> Tensor:
        if _learns(x):
            return with_bias(weights_only(x.flatten(0, -2), self.weight, self.scale, self.steps), self.bias, x)
        if kernel_available() and (_few(x) or kernels.takes_many_rows()):
            return kernels.linear_int4(x, self.weight, self.steps, self.scale, self.bias)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if len(rows) <= FEW_ROWS and len(self.weight) % 16 == 0:  # what the operator for few rows asks for
            if self.packed is None:
                self.packed = self._pack()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), self.packed[0], GROUP, self.packed[1])
        elif devices.has_dot_products():
            numbers = unpack(self.weight, self.steps)  # layer by layer, never all of them
            y = exact_product(rows, numbers, self.scale, torch.ops.onednn.qlinear_prepack(numbers, None))
        else:
            y = weights_only(as_rounded(rows) if kernel_available() else rows, self.weight, self.scale, self.steps)
        return with_bias(y, self.bias, x)

    def _pack(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(self.steps)
        scale = (self.steps * self.scale[:, None]).bfloat16().T[..., None]  # [K / 64, N, 1]
        return (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(self.weight, ones).int() + 8, 1),
            torch.cat((scale, torch.zeros_like(scale)), dim=-1).contiguous(),
        )


def exact_product(x: Tensor, weight: Tensor, scale: Tensor, packed: Tensor) -> Tensor:
    """What the kernels compute, in PyTorch's operators: x [M, K], int8 weight [N, K], also packed -> [M, N] as x."""
    rounded, token_scale, clipped = round_activations(x)
    unsigned = rounded.view(torch.uint8) ^ 128  # the operator takes its activations unsigned, with a zero at 128
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    # In bfloat16 this rounds once more than the kernels do, and moves half the bytes.
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scale, zeros, None, 1.0, 0, x.dtype, "none", [], ""
    )
    y *= token_scale
    if clipped is not None:
        columns = clipped.any(0).nonzero()[:, 0]  # a handful
        y += (clipped[:, columns] @ weight[:, columns].float().T) * scale
    return y


def weights_only(x: Tensor, weight: Tensor, scale: Tensor, steps: Tensor | None = None) -> Tensor:
    """x [M, K] times rounded weights, for CPUs without 8-bit products -> [M, N]. steps: of a weight in 4 bits."""
    return in_float32(x, weight, steps) * scale


def as_rounded(x: Tensor) -> Tensor:
    """What `round_activations` makes of x [M, K], in float32: many tokens see what the kernel makes of a few."""
    rounded, scale, clipped = round_activations(x)
    return rounded * scale if clipped is None else rounded * scale + clipped


def with_bias(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The rows y [M, N] in dtype and shape of the layer's input x [..., K]: [..., N]."""
    return (y if bias is None else y + bias).to(x.dtype).unflatten(0, x.shape[:-1])


class Int8Embedding(nn.Module):
    """The table of tokens in 8 bits, rows in and logits out as in `GemmaEmbedding`."""

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


# ---------------------------------------------------------------------------------------------- which layers


def kinds(model: nn.Module, mode: str) -> dict[str, str]:
    """What becomes of each module, by its name: "int8" or "int4" for every linear layer, "table" for the embedding.

    4 bits are for the decoder, whose weights are read for every token; the eye reads an image once. A layer whose
    inputs don't divide by 128 (no published decoder has one) keeps 8.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            small = mode == "int4" and name.startswith("language_model.") and module.in_features % (2 * GROUP) == 0
            found[name] = "int4" if small else "int8"
        elif isinstance(module, GemmaEmbedding):
            found[name] = "table"
    return found


def parts_of(name: str, kind: str) -> list[str]:
    """The names of the tensors that the weight of module `name` becomes."""
    stem = f"{name}.head" if kind == "table" else name
    return [f"{stem}.{part}" for part in (("weight", "steps", "scale") if kind == "int4" else ("weight", "scale"))]


def rounded_parts(name: str, weight: Tensor, kind: str) -> tuple[Tensor, ...]:
    """These tensors. ValueError for a weight with numbers that are not finite, for which there is no scale."""
    if not all(bool(part.isfinite().all()) for part in weight.split(4096)):
        raise ValueError(f"{name}.weight has numbers that are not finite: the checkpoint is damaged")
    return round_groups(weight) if kind == "int4" else round_rows(weight)


def rounded_shapes(shape: Shape, kind: str) -> list[tuple[Shape, torch.dtype]]:
    """Shape and dtype of these tensors, for a weight of the given shape."""
    N, K = shape
    if kind == "int4":
        return [((N, K // 2), torch.uint8), ((N, K // GROUP), torch.int8), ((N,), torch.float32)]
    return [((N, K), torch.int8), ((N,), torch.float32)]


def swap(model: nn.Module, name: str, kind: str, parts: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Puts a quantised module in the place of module `name`, with its bias."""
    old = model.get_submodule(name)
    new: Int8Embedding | Int8Linear | Int4Linear
    if kind == "table":
        new = Int8Embedding(dtype, *parts)
    else:
        new = Int4Linear(*parts) if kind == "int4" else Int8Linear(*parts)
        new.bias = old.bias.detach() if isinstance(old.bias, Tensor) else None
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new.train(old.training))


def check_mode(mode: str, device: torch.device) -> None:
    """ValueError for a mode that does not exist, or not on this device."""
    if mode not in MODES:
        raise ValueError(f"quantize is {mode!r}, expected one of {', '.join(MODES)}")
    if mode in ("bf16", *STORED) and device.type != "cpu":
        raise ValueError(f"quantize={mode!r} is for the CPU, not for {device}: use bnb-int8 or nf4 there")


# ---------------------------------------------------------------------------------------------- a built model


def quantize(model: PaliGemmaForConditionalGeneration, mode: str) -> PaliGemmaForConditionalGeneration:
    """Swaps the linear layers of a built model, in place, one after the other. Returns the model.

    mode: "bf16" changes how bfloat16 layers are computed, not what; "int8" and "int4" round the weights (see the head
    of this file); "bnb-int8" and "nf4" use bitsandbytes. Rounded weights are for answering: they can't be trained
    (LoRA beside those of bitsandbytes can).
    Raises ValueError for an unknown mode, a model that is quantised already or is not on the CPU.
    """
    check_mode(mode, model.device)
    if is_quantized(model):
        raise ValueError("the model is quantised already: load it anew to choose another mode")
    if mode in ("bnb-int8", "nf4"):
        return _with_bitsandbytes(model, mode)
    if mode == "bf16":
        return _with_fast_rows(model)
    dtype = model.dtype
    for name, kind in kinds(model, mode).items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        swap(model, name, kind, rounded_parts(name, weight.detach(), kind), dtype)
    speed_up_the_rest(model)
    return model.requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    """Whether some layers hold rounded weights, ours or those of bitsandbytes."""
    ours = (Int8Linear, Int4Linear)
    return any(isinstance(m, ours) or type(m).__module__.startswith("bitsandbytes") for m in model.modules())


def _with_fast_rows(model: PaliGemmaForConditionalGeneration) -> PaliGemmaForConditionalGeneration:
    for name in kinds(model, "bf16"):
        old = model.get_submodule(name)
        # Only what is computed changes: the class. Parameters, their names and hooks stay what and where they are.
        if type(old) is nn.Linear:
            old.__class__ = FastLinear
        elif type(old) is GemmaEmbedding:
            old.__class__ = FastEmbedding
    speed_up_the_rest(model)
    return model


def _with_bitsandbytes(model: PaliGemmaForConditionalGeneration, mode: str) -> PaliGemmaForConditionalGeneration:
    """LLM.int8() or nf4 (arXiv 2305.14314) of bitsandbytes, for every linear layer; the tied embedding stays."""
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(f"quantize={mode!r} needs bitsandbytes: pip install bitsandbytes") from None
    device, dtype = model.device, model.dtype
    for name, kind in kinds(model, mode).items():
        old = model.get_submodule(name)
        if kind == "table" or not isinstance(old, nn.Linear):
            continue
        sizes, bias = (old.in_features, old.out_features), old.bias is not None
        weight = old.weight.detach().cpu()  # they are rounded when they are moved to the device
        new: Any
        if mode == "nf4":
            new = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, compute_dtype=dtype, quant_type="nf4", device="meta")
            new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, device="meta")
            new.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(device).train(old.training))
    return model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- a checkpoint

QUANT_METHOD = "paligemma"  # in `quantization_config` of config.json


def stored_tensors(config: PaliGemmaConfig, mode: str, dtype: torch.dtype) -> dict[str, tuple[Shape, torch.dtype]]:
    """Name, shape and dtype of every tensor of a quantised checkpoint, in the order in which it is written."""
    layers = kinds(empty_model(config), mode)
    stored: dict[str, tuple[Shape, torch.dtype]] = {}
    for name, shape in expected_shapes(config).items():
        kind = layers.get(module := name.removesuffix(".weight"))
        if kind is None:
            stored[name] = shape, dtype
        else:
            stored.update(zip(parts_of(module, kind), rounded_shapes(shape, kind)))
    return stored


def rounded_reader(checkpoint: Checkpoint, mode: str, dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads the tensors of `stored_tensors` by rounding those of a checkpoint, each when it is asked for."""
    layers = kinds(empty_model(checkpoint.config), mode)
    source = {part: (name, kind) for name, kind in layers.items() for part in parts_of(name, kind)}
    kept: dict[str, Tensor] = {}  # what else the weight just rounded has become: asked for next

    def read(name: str) -> Tensor:
        if name in kept:
            return kept.pop(name)
        if name not in source:
            return checkpoint.read(name, mapped=checkpoint.tensors[name][1] == dtype).to(dtype)
        module, kind = source[name]
        parts = parts_of(module, kind)
        rounded = dict(zip(parts, rounded_parts(module, checkpoint.read(f"{module}.weight"), kind)))
        kept.clear()
        kept.update({part: tensor for part, tensor in rounded.items() if part != name})
        return rounded[name]

    return read


def quantize_checkpoint(
    source: Checkpoint | QuantizedCheckpoint | str | os.PathLike[str],
    target: str | os.PathLike[str],
    mode: str,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = 5 * 10**9,
    folders: Sequence[Path] = (),
) -> list[Path]:
    """Writes a quantised checkpoint into a folder, tensor by tensor; `load` maps it and needs no work on it.

    source: a folder, a `.safetensors` file, a big_vision `.npz`, or one of these opened. mode: "int8" or "int4".
    dtype: of what is not rounded; default bfloat16 for the published sizes, the checkpoint's own for all others.
    folders: where tokenizer and the like are taken from, the first that has one; default the source's own.
    In memory at any time: one matrix, as it was and as it becomes. If anything fails, the folder is as it was.
    Returns the files written. Raises ValueError and OSError as `open_checkpoint` and `convert` do.
    """
    if mode not in STORED:
        raise ValueError(f"mode is {mode!r}, expected {' or '.join(STORED)}: the others change nothing on disk")
    if isinstance(source, QuantizedCheckpoint):
        raise ValueError(f"{source.folder} is quantised already: start from the checkpoint that it was made of")
    checkpoint, folder = source if isinstance(source, Checkpoint) else open_checkpoint(source), Path(target)
    folders = folders or [checkpoint.folder]
    check_apart(folder, [checkpoint.folder, *folders])
    kept = parse_dtype(dtype) or default_dtype(checkpoint)
    settings = {
        **checkpoint.config.to_dict(),
        "torch_dtype": str(kept).removeprefix("torch."),
        "quantization_config": {"quant_method": QUANT_METHOD, "mode": mode, "group_size": GROUP},
    }
    stored, read = stored_tensors(checkpoint.config, mode, kept), rounded_reader(checkpoint, mode, kept)
    return write_folder(folder, folders, settings, stored, read, max_shard_size)


def load_quantizing(
    checkpoint: Checkpoint, mode: str, dtype: torch.dtype | str | None = None, image_size: int | None = None
) -> PaliGemmaForConditionalGeneration:
    """A checkpoint -> the quantised model, rounding matrix by matrix as they are read. mode: "int8" or "int4".

    dtype, image_size: as for `load_model`.
    """
    if image_size is not None:
        checkpoint = at_image_size(checkpoint, image_size)
    kept = parse_dtype(dtype) or default_dtype(checkpoint)
    names = stored_tensors(checkpoint.config, mode, kept)
    return _assemble(checkpoint.config, mode, kept, names, rounded_reader(checkpoint, mode, kept))


def stored_mode(path: Path) -> str | None:
    """The mode of a quantised checkpoint of ours, None for all others. ValueError for one that others quantised."""
    folder = path if path.is_dir() else path.parent
    try:
        given = read_json(folder / "config.json").get("quantization_config")
    except (OSError, ValueError):
        return None  # whatever is wrong with it, `open_checkpoint` says it better
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method != QUANT_METHOD:
        raise ValueError(
            f"{folder} holds weights that were quantised by {method!r}, whose format is not read here: take the "
            "checkpoint they were made of, and `--quantize int8`"
        )
    mode, group = given.get("mode"), given.get("group_size")
    if mode not in STORED or group != GROUP:
        raise ValueError(
            f"{folder / 'config.json'}: quantization_config has mode {mode!r} and group_size {group!r}, expected "
            f"{' or '.join(STORED)} and {GROUP}: write it anew with `paligemma quantize`"
        )
    return str(mode)


@dataclass
class QuantizedCheckpoint:
    """An opened and checked checkpoint of ours: where each tensor lies. It can be loaded, and nothing else."""

    folder: Path
    config: PaliGemmaConfig
    mode: str
    dtype: torch.dtype
    place: dict[str, Path]

    def load(
        self, mode: str | None = None, dtype: torch.dtype | str | None = None, image_size: int | None = None
    ) -> PaliGemmaForConditionalGeneration:
        """The model, in evaluation mode: its weights are views of the files, read when they are first used.

        mode: what was asked for; ValueError if the files hold something else. dtype, image_size: as for `load_model`.
        """
        if mode not in (None, self.mode):
            raise ValueError(f"{self.folder} holds {self.mode} weights, not {mode}: leave out `quantize`")
        kept, config = parse_dtype(dtype) or self.dtype, self.config
        if image_size is not None:
            config = config_at_image_size(config, image_size)
        maps = {file: MappedFile(file) for file in set(self.place.values())}
        not_rounded = expected_shapes(config)

        def read(name: str) -> Tensor:
            tensor = maps[self.place[name]].read(name)
            if name == POSITIONS and image_size is not None:
                tensor = resample_positions(tensor, config.vision_config.num_patches).to(tensor.dtype)
            return tensor.to(kept) if name in not_rounded and tensor.is_floating_point() else tensor

        return _assemble(config, self.mode, kept, list(self.place), read)


def open_quantized(path: Path) -> QuantizedCheckpoint:
    """Opens a folder that `quantize_checkpoint` wrote, and reads headers only.

    Raises ValueError or FileNotFoundError, naming what does not fit, all of it at once.
    """
    folder = path if path.is_dir() else path.parent
    config, mode = _config_of(folder), stored_mode(folder)
    assert mode is not None
    files = [folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():
        files = files_of_index(folder / INDEX)
    if not files[0].is_file():
        raise FileNotFoundError(f"{folder} holds no weights: expected {WEIGHTS} or {INDEX}")
    place: dict[str, Path] = {}
    found: dict[str, tuple[Shape, torch.dtype | str]] = {}
    for file in files:
        try:
            tensors = MappedFile(file).tensors
        except SafetensorError as error:
            raise damaged(file, error) from None
        for name, (shape, code) in tensors.items():
            if name in place:
                raise ValueError(f"{folder} holds {name} twice, in {place[name].name} and in {file.name}")
            place[name] = file
            found[name] = shape, DTYPES.get(code, code)
    norm = found.get("language_model.model.norm.weight", ((), torch.bfloat16))[1]
    dtype = norm if isinstance(norm, torch.dtype) and norm.is_floating_point else torch.bfloat16
    expected = stored_tensors(config, mode, dtype)
    check_tensors(str(folder), found, {name: shape for name, (shape, _) in expected.items()})
    for name, (_, kind) in expected.items():
        if found[name][1] != kind:
            raise ValueError(f"{folder}: {name} is {found[name][1]}, expected {kind}: write it anew")
    return QuantizedCheckpoint(folder, config, mode, dtype, {name: place[name] for name in expected})


def _config_of(folder: Path) -> PaliGemmaConfig:
    settings = read_json(folder / "config.json")
    del settings["quantization_config"]  # read already; the model's own configuration knows nothing of it
    try:
        return PaliGemmaConfig.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def _assemble(
    config: PaliGemmaConfig, mode: str, dtype: torch.dtype, names: Iterable[str], read: Callable[[str], Tensor]
) -> PaliGemmaForConditionalGeneration:
    """The quantised model, built empty and filled with one tensor after the other."""
    model, shapes = empty_model(config), expected_shapes(config)
    for name, kind in kinds(model, mode).items():
        shape = shapes[f"{name}.weight"]
        parts = [torch.empty(size, dtype=kept, device="meta") for size, kept in rounded_shapes(shape, kind)]
        swap(model, name, kind, parts, dtype)
    speed_up_the_rest(model)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(parent), read(name)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(module, leaf, tensor)
    return model.eval()
