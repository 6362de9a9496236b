"""A whole decoder layer for the next tokens in one call of a kernel, instead of some twenty calls of PyTorch.

One token needs so little arithmetic between the large products that calling each operation from Python would take a
noticeable part of the time. The result is equal to the bit to calling the fast layers one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor, nn

from paligemma.fast import kernels
from paligemma.fast.fast_layers import (
    FastGemmaAttention,
    FastGemmaMLP,
    FastLinear,
    FastRMSNorm,
    attention_kernel_applies,
    kernel_applies,
)
from paligemma.fast.products import has_few_rows
from paligemma.fast.rounded_layers import Int4Linear, Int8Linear
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import Gemma2DecoderLayer, GemmaDecoderLayer, GemmaRMSNorm

Norms: TypeAlias = Sequence[GemmaRMSNorm | None]  # before attention, after it, before the MLP, after it


class FastGemmaDecoderLayer(GemmaDecoderLayer):
    """A layer of Gemma 1, with norms before attention and MLP only."""

    def norms(self) -> Norms:
        return self.input_layernorm, None, self.post_attention_layernorm, None

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        y = in_one_call(self, x, mask, cos, sin, cache)
        return super().forward(x, mask, cos, sin, cache) if y is None else y


class FastGemma2DecoderLayer(Gemma2DecoderLayer):
    """A layer of Gemma 2, with all four norms."""

    def norms(self) -> Norms:
        of_mlp = self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        return self.input_layernorm, self.post_attention_layernorm, *of_mlp

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        y = in_one_call(self, x, mask, cos, sin, cache)
        return super().forward(x, mask, cos, sin, cache) if y is None else y


def in_one_call(
    layer: FastGemmaDecoderLayer | FastGemma2DecoderLayer,
    x: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: KVCache | None,
) -> Tensor | None:
    """The output of the layer; None where `why_not_in_one_call` has a reason to call its parts one by one."""
    if why_not_in_one_call(layer, x, mask, cos, cache) is not None:
        return None
    assert cache is not None
    attention = layer.self_attn
    weights = [_weights(linear) for linear in _linears(layer)]  # looked up for each call: any of them may be replaced
    of_norms = [None if norm is None else norm.weight for norm in layer.norms()]
    eps = layer.input_layernorm.eps  # all norms of a layer have the same
    in_cache = cache.keys[attention.layer], cache.values[attention.layer], cache.used
    return kernels.decoder_layer(
        x, weights, of_norms, cos, sin, mask, *in_cache, eps, attention.scale, attention.softcap
    )


def why_not_in_one_call(
    layer: FastGemmaDecoderLayer | FastGemma2DecoderLayer,
    x: Tensor,
    mask: Tensor,
    cos: Tensor,
    cache: KVCache | None,
) -> str | None:
    """Why the parts of this layer have to be called one by one for this input; None if one call can do it.

    One call bypasses hooks, and whatever replaced a part of the layer, such as LoRA: so there must be none of these.
    """
    attention, mlp, norms = layer.self_attn, layer.mlp, layer.norms()
    if cache is None:
        return "there is no cache"
    if type(cache) is not KVCache:  # a StaticKVCache chooses other columns than the last ones in use
        return "the cache is not a plain KVCache"
    if mask.shape[2] != x.shape[1]:
        return "not all positions are queries"
    if len(cos) != len(x) or not x.numel():
        return "there is no row, or all rows share one row of positions"
    if not has_few_rows(x):
        return "there are many tokens"
    if not kernel_applies(x):
        return "the input is not bfloat16 on a CPU with kernels, or gradients are enabled"
    if not attention_kernel_applies(x.shape[1], attention.head_dim):
        return "PyTorch's attention is the faster"
    if type(attention) is not FastGemmaAttention or type(mlp) is not FastGemmaMLP:
        return "attention or MLP was replaced"
    if attention.explicit:
        return "attention is explicit"
    if any(norm is not None and (type(norm) is not FastRMSNorm or norm.weight.dtype != x.dtype) for norm in norms):
        return "a norm was replaced, or is not bfloat16"
    linears = _linears(layer)
    if any(type(linear) not in (FastLinear, Int8Linear, Int4Linear) or linear.bias is not None for linear in linears):
        return "a linear layer was replaced, or has a bias"
    if cache.keys[attention.layer].dtype != x.dtype:
        return "the cache is not bfloat16"
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return "a hook watches all modules"
    for part in (attention, mlp, *linears, *norms):
        if part is not None and (part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__):
            return "a hook watches a part, or its forward was replaced"
    return None


def _linears(layer: FastGemmaDecoderLayer | FastGemma2DecoderLayer) -> tuple[nn.Module, ...]:
    """In the order of `kernels.decoder_layer`."""
    attention, mlp = layer.self_attn, layer.mlp
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return *projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _weights(linear: nn.Module) -> kernels.Weights:
    """The weights of a linear layer as `kernels.decoder_layer` wants them."""
    if isinstance(linear, Int4Linear):
        return linear.weight, linear.steps, linear.scale
    if isinstance(linear, Int8Linear):
        return linear.weight, None, linear.scale
    assert isinstance(linear, FastLinear)
    return linear.weight, None, None
