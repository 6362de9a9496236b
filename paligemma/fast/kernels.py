"""The kernels: linear layers, attention and what stands between them, in C++, as functions of tensors.

    if kernel_available():
        y = linear_int8(x, weight, scale, bias)

There are two files of C++. `kernels_avx512.cpp` is for CPUs with AVX-512 and 8-bit dot products. The shorter
`kernels_avx2.cpp` is for all others of the last ten years; it has the same functions, but its attention and its linear
layers in bfloat16 pay for few rows only. `kernels.h` is what they share, and `decoder_layer.h` builds a whole layer
from their functions. `library.py` compiles and loads them.

The library is called through `ctypes`, and the C++ side trusts its arguments. So everything that it needs to be safe
is checked here: dtypes, shapes, strides, and that tensors are in the CPU's memory.

Letters: M rows of activations, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from paligemma import devices
from paligemma.fast.library import instructions, library
from paligemma.fast.rounding import GROUP

MOST_INPUTS = 2**17  # of a layer in 8 or 4 bits: the sum of so many products of at most 127 * 127 fits into 32 bits


def kernel_available() -> bool:
    """Whether the kernels can be used. The first call on a machine compiles them and says so on stderr."""
    return library() is not None


def supports_many_rows() -> bool:
    """Whether attention and linear layers in bfloat16 pay for many rows as well: with AVX-512."""
    return instructions() == "AVX-512" and kernel_available()


def beats_pytorch_in_bfloat16() -> bool:
    """Whether `linear_bf16` is faster than PyTorch for many rows: where bfloat16 is in vectors but not in tiles."""
    return devices.has_bfloat16_vectors_only()


# ------------------------------------------------------------------------------------------------ linear layers


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, all in bfloat16: x [..., K], weight [N, K], bias [N] -> [..., N]. Float32 sums."""
    _expect(x.dtype == torch.bfloat16 and weight.ndim == 2, x, weight)
    _expect_weights(x, weight, None, None, *weight.shape)
    return _call("linear_bf16", x, [weight], bias, weight.shape[0], weight.shape[1])


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], bfloat16 or float32, rounded to 8 bits a row; int8 weight [N, K], float32 scale [N] -> [..., N].

    K is at most MOST_INPUTS.
    """
    _expect(weight.ndim == 2, x, weight)
    _expect_weights(x, weight, None, scale, *weight.shape)
    N, K = weight.shape
    return _call("linear_int8", x, [weight, scale], bias, N, K)


def linear_int4(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for two weights a byte: uint8 weight [N, K / 2], int8 steps [N, K / 64], float32 scale [N].

    A weight is (n - 8) * step * scale, steps being -15 to 15; K is a multiple of 128, at most MOST_INPUTS.
    """
    _expect(weight.ndim == 2, x, weight)
    N, K = weight.shape[0], weight.shape[1] * 2
    _expect_weights(x, weight, steps, scale, N, K)
    return _call("linear_int4", x, [weight, steps, scale], bias, N, K)


# ------------------------------------------------------------------------------------------------ between them


def gelu_bf16(x: Tensor, times: Tensor | None = None) -> Tensor:
    """`F.gelu(x, approximate="tanh") * times`, or without `times`; bfloat16 [..., K], equal to the bit."""
    _expect(x.dtype == torch.bfloat16, x, x if times is None else times, "a factor")
    if times is not None:
        _expect(times.dtype == x.dtype and times.shape == x.shape, x, times, "a factor")
        times = times.contiguous()
    x = x.contiguous()
    y = torch.empty_like(x)
    _run("look_up_bf16", [_gelu_table(), x, times, y], *_rows_of(x))
    return y


@cache
def _gelu_table() -> Tensor:
    """GELU of each of the 65,536 bfloat16 numbers, in the order of their bits, and one number more: 128 KB."""
    with torch.inference_mode():
        every = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16)
        return torch.cat((torch.nn.functional.gelu(every, approximate="tanh"), every[:1]))


def rms_norm_bf16(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., K] over the root of its mean square, times 1 + weight [K]: bfloat16, computed in float32."""
    _expect(x.dtype == weight.dtype == torch.bfloat16 and weight.shape == x.shape[-1:], x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _run("rms_norm_bf16", [x, weight, y], eps, *_rows_of(x))
    return y


def rotary_bf16(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`modeling_gemma.apply_rotary`: x [B, H, S, E], cos and sin [B, 1, S, E / 2]; bfloat16, equal to the bit."""
    B, H, S, E = x.shape
    _expect(x.dtype == cos.dtype == sin.dtype == torch.bfloat16, x, cos, "cosines")
    _expect(cos.shape == sin.shape == (B, 1, S, E // 2) and E % 2 == 0, x, cos, "cosines")
    x, cos, sin = x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    y = x.new_empty(B, H, S, E)
    if y.numel():
        _run("rotary_bf16", [x, cos, sin, y, (ctypes.c_int64 * 3)(*x.stride()[:3])], B, H, S, E)
    return y


def attention_bf16(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None = None
) -> Tensor:
    """softmax(scale * q k') v, each query head with the key head of its group; bfloat16, float32 inside.

    q [B, H, S, E], k and v [B, K, T, E]; mask bool [B, 1, S, T], or None if all may be seen. cap: scores become
    cap * tanh(score / cap) first. Returns [B, H, S, E], in memory as [B, S, H, E]. A query that may see nothing gets
    zeros.
    """
    (B, H, S, E), (K, T) = q.shape, k.shape[1:3]
    _expect(q.dtype == k.dtype == v.dtype == torch.bfloat16, q, k, "keys")
    _expect(k.shape == v.shape == (B, K, T, E) and T > 0 and E % 2 == 0 and H % K == 0, q, k, "keys")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    places = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0, 0]
    if mask is not None:
        _expect(mask.dtype == torch.bool and mask.shape == (B, 1, S, T), q, mask, "a mask")
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        places[-2:] = mask.stride(0), mask.stride(2)
    y = q.new_empty(B, S, H, E)
    if y.numel():
        numbers = (ctypes.c_int64 * len(places))(*places)
        _run("attention_bf16", [q, k, v, mask, y, numbers], scale, cap or 0, B, H, K, S, T, E)
    return y.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ a decoder layer


class _Linear(ctypes.Structure):
    """A linear layer, as in `decoder_layer.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "steps", "scale")),
        *((name, ctypes.c_int) for name in ("N", "K")),
    ]


class _Layer(ctypes.Structure):
    """A decoder layer, likewise."""

    _fields_ = [
        ("linears", _Linear * 7),
        ("norms", ctypes.c_void_p * 4),
        *((name, ctypes.c_float) for name in ("eps", "scale", "cap")),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "head_dim")),
    ]


Weights: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]  # of a linear layer: weight, steps, scale


def decoder_layer(
    x: Tensor,
    linears: Sequence[Weights],
    norms: Sequence[Tensor | None],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    keys: Tensor,
    values: Tensor,
    used: int,
    eps: float,
    scale: float,
    cap: float | None,
) -> Tensor:
    """A whole layer for new tokens of cached rows: x [B, S, D], bfloat16 -> [B, S, D].

    linears: q, k, v, o, gate, up and down, without biases; each bfloat16 [N, K] alone, or weight, steps and scale as
    for `linear_int8` and `linear_int4`. norms: [D] bfloat16, before attention, after it (None in Gemma 1), before the
    MLP, after it. cos, sin: [B, 1, S, E / 2]. keys, values: the cache, bfloat16 [B, KV, columns, E]. used: its columns
    in use, T, of which this call writes the last S. mask: bool [B, 1, S, T].
    """
    (B, S, D), (KV, columns, E), T = x.shape, keys.shape[1:], used
    N, wide = linears[0][0].shape[0], linears[4][0].shape[0]
    shapes = [(N, D), (KV * E, D), (KV * E, D), (D, N), (wide, D), (wide, D), (D, wide)]
    layer = _Layer()
    layer.linears = tuple(_linear(x, *weights, *shape) for weights, shape in zip(linears, shapes, strict=True))
    layer.norms = tuple(map(_address, norms))
    layer.eps, layer.scale, layer.cap = eps, scale, cap or 0
    layer.heads, layer.key_heads, layer.head_dim = N // E, KV, E
    _expect(x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and x.numel() > 0, x, cos, "cosines")
    _expect(cos.shape == sin.shape == (B, 1, S, E // 2) and E % 2 == 0 and N % (KV * E) == 0, x, cos, "cosines")
    for norm in norms:
        if norm is not None:
            _expect(norm.dtype == torch.bfloat16 and norm.shape == (D,) and norm.is_contiguous(), x, norm, "a norm")
    _expect(norms[0] is not None and norms[2] is not None, x, keys, "keys")
    _expect(keys.dtype == values.dtype == torch.bfloat16, x, keys, "keys")
    _expect(keys.shape == values.shape == (B, KV, columns, E), x, keys, "keys")
    _expect(keys.stride(-1) == values.stride(-1) == 1 and S <= T <= columns, x, keys, "keys")
    _expect(mask.dtype == torch.bool and mask.shape == (B, 1, S, T), x, mask, "a mask")
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    places = (0, 0, 0, *keys.stride()[:3], *values.stride()[:3], mask.stride(0), mask.stride(2))
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    given = [_gelu_table(), x, cos, sin, mask, keys, values, y, (ctypes.c_int64 * 11)(*places)]
    _run("decoder_layer", [ctypes.byref(layer), *given], B, S, T)
    return y


def _linear(x: Tensor, weight: Tensor, steps: Tensor | None, scale: Tensor | None, N: int, K: int) -> _Linear:
    """A linear layer with N outputs and K inputs: its shape and its addresses in memory."""
    _expect_weights(x, weight, steps, scale, N, K)
    return _Linear(_address(weight), _address(steps), _address(scale), N, K)


def _expect_weights(x: Tensor, weight: Tensor, steps: Tensor | None, scale: Tensor | None, N: int, K: int) -> None:
    if scale is not None and scale.dtype != torch.float32:
        raise ValueError(
            f"no kernel for x {x.dtype} {list(x.shape)} and a scale {scale.dtype}, expected torch.float32: choose the "
            "dtype of rounded weights when they are loaded, load(..., dtype=...), and not by .to(dtype)"
        )
    _expect(_fits(weight, steps, scale, N, K), x, weight)


def _fits(weight: Tensor, steps: Tensor | None, scale: Tensor | None, N: int, K: int) -> bool:
    """Whether these are the weights of N outputs and K inputs: in bfloat16, in 8 bits with a scale, or in 4 bits."""
    parts = [part for part in (weight, steps, scale) if part is not None]
    if not all(part.is_contiguous() for part in parts):
        return False
    if scale is None:
        return steps is None and weight.dtype == torch.bfloat16 and weight.shape == (N, K)
    if scale.shape != (N,) or K > MOST_INPUTS:
        return False
    if steps is None:
        return weight.dtype == torch.int8 and weight.shape == (N, K)
    if weight.dtype != torch.uint8 or steps.dtype != torch.int8 or K % (2 * GROUP):
        return False
    return weight.shape == (N, K // 2) and steps.shape == (N, K // GROUP)


def _rows_of(x: Tensor) -> tuple[int, int]:
    return (x.numel() // x.shape[-1], x.shape[-1]) if x.numel() else (0, 0)


def _run(name: str, given: Sequence[object], *numbers: float) -> None:
    """Calls a function of the library with pointers, then numbers, then the number of threads."""
    if (functions := library()) is None:
        raise RuntimeError(f"{name} is not available here: ask kernel_available() first")
    getattr(functions, name)(*map(_address, given), *numbers, torch.get_num_threads())


def _address(x: object) -> object:
    """The address of a tensor's numbers. Other arguments of the library's functions are passed on as they are."""
    if not isinstance(x, Tensor):
        return x
    if not x.is_cpu:  # the CPU cannot read that address
        raise ValueError(f"no kernel for a tensor {x.dtype} {list(x.shape)} on {x.device}: they are for the CPU")
    return x.data_ptr()


def _expect(fits: bool, x: Tensor, other: Tensor, name: str = "a weight") -> None:
    """ValueError that names the input and what does not fit to it."""
    if not fits:
        raise ValueError(f"no kernel for x {x.dtype} {list(x.shape)} and {name} {other.dtype} {list(other.shape)}")


def _call(name: str, x: Tensor, weights: list[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
    _expect(x.shape[-1] == K and 0 < K < 2**31 and N < 2**31, x, weights[0])
    if name != "linear_bf16":
        _expect(x.dtype in (torch.bfloat16, torch.float32), x, weights[0])
        name += "_bf16" if x.dtype == torch.bfloat16 else "_f32"
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        _expect(bias.shape == (N,), x, bias, "a bias")
    y = x.new_empty(*x.shape[:-1], N)
    M = x.numel() // K
    if M and N:
        _run(name, [x, *weights, bias, y], M, N, K)
    return y
