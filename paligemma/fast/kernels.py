"""Linear layers, and what stands between them, in C++: compiled on first use for this CPU, kept, and called.

    if kernel_available():
        y = linear_int8(x, weight, scale, bias)

There are two files. `linear_kernels.cpp` is for CPUs with AVX-512 and 8-bit dot products, and has everything below. The
shorter `linear_kernels_avx2.cpp` is for all others of the last ten years: the same, but linear layers and attention for
few rows alone. What they share is in `linear_kernels.h`; `decoder_layer.h` makes a whole layer of their functions.

Nobody has to have a compiler: without one, or without such a CPU, `kernel_available()` is False, a line on stderr says
why, and the layers of this folder use what PyTorch brings along. PALIGEMMA_KERNEL=0 asks for just that,
PALIGEMMA_KERNEL=avx2 for the shorter file.

The library speaks plain C and is called through `ctypes`. PyTorch's own extension loader would do as well, but it needs
ninja and setuptools at run time and half a minute to get through PyTorch's headers; this takes about four seconds, once
per machine. What it takes to be safe is checked here: the C++ side trusts its arguments.

Letters: M rows of activations, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paligemma import devices
from paligemma.fast.products import has_few_rows
from paligemma.fast.rounding import GROUP
from paligemma.files import written_whole

SOURCES = {
    "AVX-512": Path(__file__).parent / "linear_kernels.cpp",
    "AVX2": Path(__file__).parent / "linear_kernels_avx2.cpp",
}
HEADERS = [Path(__file__).parent / name for name in ("linear_kernels.h", "decoder_layer.h")]  # of both
MOST_INPUTS = 2**17  # of a layer in 8 or 4 bits: so many products of whole numbers, at most 127 * 127, fit into 32 bits
ASKED = os.environ.get("PALIGEMMA_KERNEL", "1")  # once: each layer asks for it, and the environment takes its time
# No contraction: a product and a sum are rounded each, as PyTorch does, so that results can be compared bit by bit.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fPIC", "-w"]

# The functions and what they take: pointers, floats, and whole numbers (sizes, and last the number of threads).
FUNCTIONS = {
    "linear_bf16": "pppp iiii",
    "linear_int8_bf16": "ppppp iiii",
    "linear_int8_f32": "ppppp iiii",
    "linear_int4_bf16": "pppppp iiii",
    "linear_int4_f32": "pppppp iiii",
    "look_up_bf16": "pppp iii",
    "rms_norm_bf16": "ppp f iii",
    "rotary_bf16": "ppppp iiiii",
    "attention_bf16": "pppppp ff iiiiiii",
    "decoder_layer": "pppppppppp iiii",
}


class _Linear(ctypes.Structure):
    """As in `decoder_layer.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "steps", "scale")),
        *((name, ctypes.c_int) for name in ("N", "K")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("linears", _Linear * 7),
        ("norms", ctypes.c_void_p * 4),
        *((name, ctypes.c_float) for name in ("eps", "scale", "cap")),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "head_dim")),
    ]


def kernel_available() -> bool:
    """Whether the compiled layers can be used. The first time on a machine this compiles them and says so on stderr."""
    return ASKED != "0" and _library(instructions()) is not None


def kernel_takes(x: Tensor) -> bool:
    """Whether the kernels for 8 and 4 bits are there for as many rows as x [..., K] has."""
    return kernel_available() and (has_few_rows(x) or takes_many_rows())


def takes_many_rows() -> bool:
    """Whether linear layers and attention are good for many rows as well: with AVX-512."""
    return instructions() == "AVX-512" and kernel_available()


def instructions() -> str | None:
    """Which of the files is for this CPU, "AVX-512" or "AVX2"; None if neither is."""
    best = devices.vector_instructions()
    return "AVX2" if best is not None and ASKED == "avx2" else best


def beats_pytorch_in_bfloat16() -> bool:
    """Whether `linear_bf16` is faster than PyTorch for many rows as well: without tiles, PyTorch has nothing better."""
    return devices.has_bfloat16_vectors_only()


def cache_folder() -> Path:
    """Where compiled libraries lie: beside those of PyTorch's own extensions."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else home / "torch_extensions") / "paligemma"


def missing_for_kernel() -> str | None:
    """What keeps this machine from having the compiled layers, None if nothing does."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "they are written for Linux on x86-64"
    if instructions() is None:
        return "this CPU has neither AVX-512 with 8-bit dot products (VNNI) nor AVX2"
    if compiler() is None:
        return "there is no C++ compiler (g++, or what CXX names)"
    return None


def compiler() -> str | None:
    """The C++ compiler: CXX, or the usual names."""
    return next((path for name in (os.environ.get("CXX"), "g++", "c++") if name and (path := shutil.which(name))), None)


@cache
def _library(kind: str | None) -> ctypes.CDLL | None:
    missing = missing_for_kernel()
    if missing is None and kind is not None:
        try:
            return _load(compile_kernel(SOURCES[kind]))
        except subprocess.CalledProcessError as error:
            missing = f"{error.cmd[0]} failed: {(error.stderr.strip() or 'no message').splitlines()[0]}"
        except (OSError, subprocess.SubprocessError) as error:
            missing = str(error)
    print(f"note: linear layers run in plain PyTorch, not in compiled kernels: {missing}", file=sys.stderr)
    return None


def compile_kernel(source: Path) -> Path:
    """The compiled library, from the cache where it is there. Raises CalledProcessError or OSError.

    Named after the source, the flags and the CPU: a home folder may be shared by machines of several kinds.
    """
    sources = b"".join(file.read_bytes() for file in (*HEADERS, source))
    conditions = " ".join([*FLAGS, compiler() or "", *devices.cpu_flags()])
    key = hashlib.sha256(sources + conditions.encode()).hexdigest()[:16]
    path = cache_folder() / f"{source.stem}-{key}.so"
    if not path.exists():
        print("note: compiling the kernels for this CPU, once (some seconds)", file=sys.stderr)
        with written_whole(path) as beside:
            command = [str(compiler()), *FLAGS, "-c", str(source), "-o", f"{beside}.o"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
                # Linked without -fopenmp: the threads are then PyTorch's own. Two pools would wait for each other.
                link = [str(compiler()), "-shared", f"{beside}.o", "-o", str(beside)]
                subprocess.run(link, check=True, capture_output=True, text=True, timeout=300)
            finally:
                Path(f"{beside}.o").unlink(missing_ok=True)
    return path


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    types = {"p": ctypes.c_void_p, "f": ctypes.c_float, "i": ctypes.c_int}
    for name, given in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = [types[letter] for letter in given.replace(" ", "")]
        function.restype = None
    return library


# ------------------------------------------------------------------------------------------------ calling


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, all in bfloat16: x [..., K], weight [N, K], bias [N] -> [..., N]. Float32 sums."""
    _expect(x.dtype == torch.bfloat16 and weight.ndim == 2 and _fits(weight, None, None, *weight.shape), x, weight)
    return _call("linear_bf16", x, [weight], bias, weight.shape[0], weight.shape[1])


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], bfloat16 or float32, rounded to 8 bits a row; int8 weight [N, K], float32 scale [N] -> [..., N].

    K is at most MOST_INPUTS.
    """
    _expect(weight.ndim == 2 and _fits(weight, None, scale, *weight.shape), x, weight)
    N, K = weight.shape
    return _call("linear_int8", x, [weight, scale], bias, N, K)


def linear_int4(x: Tensor, weight: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for two weights a byte: uint8 weight [N, K / 2], int8 steps [N, K / 64], float32 scale [N].

    A weight is (n - 8) * step * scale, steps being -15 to 15; K is a multiple of 128, at most MOST_INPUTS.
    """
    _expect(weight.ndim == 2, x, weight)
    N, K = weight.shape[0], weight.shape[1] * 2
    _expect(_fits(weight, steps, scale, N, K), x, weight)
    return _call("linear_int4", x, [weight, steps, scale], bias, N, K)


def gelu_bf16(x: Tensor, times: Tensor | None = None) -> Tensor:
    """`F.gelu(x, approximate="tanh") * times`, or without `times`; bfloat16 [..., K], equal to the bit."""
    _expect(x.dtype == torch.bfloat16, x, x if times is None else times)
    if times is not None:
        _expect(times.dtype == x.dtype and times.shape == x.shape, x, times)
        times = times.contiguous()
    x = x.contiguous()
    y = torch.empty_like(x)
    _run("look_up_bf16", [_gelu_table(), x, times, y], *_rows_of(x))
    return y


@cache
def _gelu_table() -> Tensor:
    """GELU of every bfloat16 there is, in the order of their bits, and one number more: 128 KB."""
    with torch.inference_mode():
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
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
    _expect(x.dtype == cos.dtype == sin.dtype == torch.bfloat16, x, cos)
    _expect(cos.shape == sin.shape == (B, 1, S, E // 2) and E % 2 == 0, x, cos)
    x, cos, sin = x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    y = x.new_empty(B, H, S, E)
    if y.numel():
        _run("rotary_bf16", [x, cos, sin, y, (ctypes.c_int64 * 3)(*x.stride()[:3])], B, H, S, E)
    return y


def attention_bf16(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None = None
) -> Tensor:
    """softmax(scale * q k') v, each query head with the key head of its group; bfloat16, float32 inside.

    q [B, H, S, E], k and v [B, K, T, E], mask bool [B, 1, S, T] or None for all. cap: scores become
    cap * tanh(score / cap) first. Returns [B, H, S, E], lying in memory as [B, S, H, E]. A query that may look at
    nothing gets zeros.
    """
    (B, H, S, E), (K, T) = q.shape, k.shape[1:3]
    _expect(q.dtype == k.dtype == v.dtype == torch.bfloat16, q, k)
    _expect(k.shape == v.shape == (B, K, T, E) and T > 0 and E % 2 == 0 and H % K == 0, q, k)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    places = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 0, 0]
    if mask is not None:
        _expect(mask.dtype == torch.bool and mask.shape == (B, 1, S, T), q, mask)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        places[-2:] = mask.stride(0), mask.stride(2)
    y = q.new_empty(B, S, H, E)
    if y.numel():
        numbers = (ctypes.c_int64 * len(places))(*places)
        _run("attention_bf16", [q, k, v, mask, y, numbers], scale, cap or 0, B, H, K, S, T, E)
    return y.transpose(1, 2)


Weights = tuple[Tensor, Tensor | None, Tensor | None]  # of a linear layer: weight, steps, scale


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

    linears: q, k, v, o, gate, up and down, no biases; each bfloat16 [N, K] alone, or with steps and scale what
    `linear_int8` and `linear_int4` take. norms: [D] bfloat16, before attention, behind it (None in Gemma 1), before the
    MLP, behind it. cos, sin: [B, 1, S, E / 2]. keys, values: the cache, bfloat16 [B, KV, columns, E]; used: its columns
    in use, T, of which the last S are written here. mask: bool [B, 1, S, T].
    """
    (B, S, D), (KV, columns, E), T = x.shape, keys.shape[1:], used
    N, wide = linears[0][0].shape[0], linears[4][0].shape[0]
    shapes = [(N, D), (KV * E, D), (KV * E, D), (D, N), (wide, D), (wide, D), (D, wide)]
    layer = _Layer()
    layer.linears = tuple(_linear(*weights, *shape) for weights, shape in zip(linears, shapes, strict=True))
    layer.norms = tuple(map(_address, norms))
    layer.eps, layer.scale, layer.cap = eps, scale, cap or 0
    layer.heads, layer.key_heads, layer.head_dim = N // E, KV, E
    _expect(x.dtype == cos.dtype == sin.dtype == torch.bfloat16 and x.numel() > 0, x, cos)
    _expect(cos.shape == sin.shape == (B, 1, S, E // 2) and E % 2 == 0 and N % (KV * E) == 0, x, cos)
    for norm in norms:
        if norm is not None:
            _expect(norm.dtype == torch.bfloat16 and norm.shape == (D,) and norm.is_contiguous(), x, norm)
    _expect(norms[0] is not None and norms[2] is not None, x, keys)
    _expect(keys.dtype == values.dtype == torch.bfloat16 and keys.shape == values.shape == (B, KV, columns, E), x, keys)
    _expect(keys.stride(-1) == values.stride(-1) == 1 and S <= T <= columns, x, keys)
    _expect(mask.dtype == torch.bool and mask.shape == (B, 1, S, T), x, mask)
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    places = (0, 0, 0, *keys.stride()[:3], *values.stride()[:3], mask.stride(0), mask.stride(2))
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    given = [_gelu_table(), x, cos, sin, mask, keys, values, y, (ctypes.c_int64 * 11)(*places)]
    _run("decoder_layer", [ctypes.byref(layer), *given], B, S, T)
    return y


def _linear(weight: Tensor, steps: Tensor | None, scale: Tensor | None, N: int, K: int) -> _Linear:
    """Where a linear layer with N outputs and K inputs lies."""
    _expect(_fits(weight, steps, scale, N, K), weight, weight)
    return _Linear(_address(weight), _address(steps), _address(scale), N, K)


def _fits(weight: Tensor, steps: Tensor | None, scale: Tensor | None, N: int, K: int) -> bool:
    """Whether these are the weights of N outputs and K inputs: in bfloat16, or with what 8 and 4 bits come with."""
    parts = [part for part in (weight, steps, scale) if part is not None]
    if not all(part.is_contiguous() for part in parts):
        return False
    if scale is None:
        return steps is None and weight.dtype == torch.bfloat16 and weight.shape == (N, K)
    if scale.dtype != torch.float32 or scale.shape != (N,) or K > MOST_INPUTS:
        return False
    if steps is None:
        return weight.dtype == torch.int8 and weight.shape == (N, K)
    if weight.dtype != torch.uint8 or steps.dtype != torch.int8 or K % (2 * GROUP):
        return False
    return weight.shape == (N, K // 2) and steps.shape == (N, K // GROUP)


def _rows_of(x: Tensor) -> tuple[int, int]:
    return (x.numel() // x.shape[-1], x.shape[-1]) if x.numel() else (0, 0)


def _run(name: str, given: Sequence[Any], *numbers: float) -> None:
    """Calls a function of the library: pointers, numbers, and last the threads."""
    if (library := _library(instructions())) is None:
        raise RuntimeError(f"{name} is not available here: ask kernel_available() first")
    getattr(library, name)(*map(_address, given), *numbers, torch.get_num_threads())


def _address(x: Any) -> Any:
    """Of a tensor; what else a function of the library takes is passed on."""
    if not isinstance(x, Tensor):
        return x
    if not x.is_cpu:  # where it points to is not for the CPU to read
        raise ValueError(f"no kernel for a tensor {x.dtype} {list(x.shape)} on {x.device}: they are for the CPU")
    return x.data_ptr()


def _expect(fits: bool, x: Tensor, weight: Tensor) -> None:
    if not fits:
        raise ValueError(f"no kernel for x {x.dtype} {list(x.shape)} and a weight {weight.dtype} {list(weight.shape)}")


def _call(name: str, x: Tensor, weights: list[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
    _expect(x.shape[-1] == K and 0 < K < 2**31 and N < 2**31, x, weights[0])
    if name != "linear_bf16":
        _expect(x.dtype in (torch.bfloat16, torch.float32), x, weights[0])
        name += "_bf16" if x.dtype == torch.bfloat16 else "_f32"
    x = x.contiguous()
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        _expect(bias.shape == (N,), x, weights[0])
    y = x.new_empty(*x.shape[:-1], N)
    M = x.numel() // K
    if M and N:
        _run(name, [x, *weights, bias, y], M, N, K)
    return y
