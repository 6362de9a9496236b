"""Smaller weights: what is rounded and by how much, the compiled kernels against plain arithmetic, whole models, files.

What the kernels promise: sums of 8-bit products are exact, so where nothing is clipped a float32 result is equal to the
bit; bfloat16 results are float32 sums in some order, and stay within the bound of such.
"""

import copy
import ctypes
import json
import math
import mmap
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
from avx512 import can_emulate, emulate
from reference import make_inputs, randomize, tiny_config
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import paligemma
from paligemma import devices
from paligemma.cli.main import app
from paligemma.fast import decoder_layers, fast_layers, library, products, rounded_layers, swap
from paligemma.fast import kernels as linear_kernels
from paligemma.fast.fast_layers import FastGemmaMLP, FastLinear, FastRMSNorm
from paligemma.fast.rounded_layers import Int4Linear, Int8Linear
from paligemma.fast.rounding import GROUP, round_activations, round_groups, round_rows, unpack
from paligemma.fast.swap import quantize
from paligemma.kv_cache import KVCache
from paligemma.modeling_gemma import PaliGemmaForConditionalGeneration, apply_rotary, rotary_tables
from paligemma.tiny.renderer import render
from paligemma.utils import load_hf_model
from paligemma.weights.converting import convert
from paligemma.weights.expected import empty_model
from paligemma.weights.finding import TINY
from paligemma.weights.opening import open_checkpoint
from paligemma.weights.quantized import load_quantizing, open_quantized, quantize_checkpoint, stored_mode
from paligemma.weights.saving import save_pretrained

KERNEL = library.missing_for_kernel() is None  # whether this machine can have one; nothing is compiled yet
needs_kernel = pytest.mark.skipif(not KERNEL, reason="no compiler, or neither AVX-512 with VNNI nor AVX2")
AVX512 = KERNEL and library.instructions() == "AVX-512"
needs_avx512 = pytest.mark.skipif(not AVX512, reason="no compiler, or no AVX-512 with VNNI")
either_way = pytest.mark.skipif(not AVX512 and not can_emulate(), reason="neither AVX-512 nor SIMDe to emulate it")
BOTH = [pytest.param("AVX-512", marks=either_way), pytest.param("AVX2", marks=needs_kernel)]


def use(kernels: str, set_attribute=setattr) -> None:
    """The kernels of one of the two files, "AVX-512" (emulated where the CPU is another) or "AVX2", or "plain"."""
    set_attribute(library, "REQUESTED", {"AVX2": "avx2", "plain": "0"}.get(kernels, "1"))
    if kernels == "AVX-512" and not AVX512:
        emulate(set_attribute)


@pytest.fixture(params=BOTH)
def kernels(request, monkeypatch):
    """The kernels of either file. A CPU with AVX-512 has AVX2 as well."""
    use(request.param, monkeypatch.setattr)
    return request.param


@pytest.fixture(params=[*BOTH, "plain"])
def way(request, monkeypatch):
    """All ways to compute the same."""
    use(request.param, monkeypatch.setattr)
    return request.param


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def relative(error: torch.Tensor, of: torch.Tensor) -> float:
    return float(error.double().norm() / of.double().norm())


# ---------------------------------------------------------------------------------------------- rounding


def test_8_bits_are_off_by_half_a_step_at_most():
    weight = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    rounded, scale = round_rows(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().amax(-1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    torch.testing.assert_close(scale, weight.abs().amax(-1) / 127)


def dense(layer: Int4Linear) -> torch.Tensor:
    """The weight that a layer stands for, float64 [N, K]."""
    return unpack(layer.weight, layer.steps).double() * layer.scale.double()[:, None]


def test_4_bits_come_back_in_the_order_of_the_inputs():
    """Weights that can be expressed are not changed, whichever half of which byte they go to."""
    n = torch.randint(-8, 8, (5, 256), dtype=torch.int8)
    n[:, ::GROUP] = -8  # the full range is used in every group
    steps, scale = torch.tensor([15, -7, 3, -15], dtype=torch.int8).expand(5, 4), torch.logspace(-2, 2, 5)
    weight = (n.unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(1) * scale[:, None]
    packed, found_steps, found_scale = round_groups(weight)
    assert packed.shape == (5, 128) and packed.dtype == torch.uint8
    assert torch.equal(found_steps, steps)
    torch.testing.assert_close(found_scale, scale)
    assert torch.equal(unpack(packed, torch.ones_like(steps)), n)
    assert torch.equal(unpack(packed, steps), (n.unflatten(-1, (-1, GROUP)) * steps[..., None]).flatten(1))


def test_4_bits_are_off_by_half_a_step_at_most():
    """But for the ends: 8 has no number of its own, and -8 may fall short by what its step was rounded."""
    weight = torch.randn(32, 512)
    weight[4, :GROUP] = 0
    weight[5, GROUP:] *= 1e-4
    weight[6] = 0
    layer = Int4Linear(*round_groups(weight))
    assert layer.steps.abs().max() == 15 and layer.steps.abs().min() == 1
    step = (layer.steps.double() * layer.scale.double()[:, None]).abs()[..., None]
    error = (dense(layer) - weight).unflatten(-1, (-1, GROUP)).abs()
    n = unpack(layer.weight, torch.ones_like(layer.steps)).unflatten(-1, (-1, GROUP))
    assert (error <= 0.5001 * step)[(n > -8) & (n < 7)].all()
    assert (error <= step * 1.5)[n == 7].all()
    assert (dense(layer)[4, :GROUP] == 0).all() and (dense(layer)[6] == 0).all()
    groups = weight.unflatten(-1, (-1, GROUP))
    symmetric = groups.abs().amax(-1, keepdim=True) / 7  # with 15 numbers instead of 16, and steps of any size
    plain = ((groups / symmetric.clamp(min=1e-9)).round() * symmetric).flatten(1)
    assert relative(dense(layer) - weight, weight) < 0.95 * relative(plain - weight, weight)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(mode, bad):
    model = make_model()
    model.language_model.model.layers[1].mlp.up_proj.weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has numbers that are not finite"):
        quantize(model, mode)


def test_activations_are_rounded_per_token():
    x = torch.randn(4, 100) * torch.tensor([1e-3, 1, 1e3, 0])[:, None]
    rounded, scale, clipped = round_activations(x)
    assert clipped is None and rounded.abs().amax(-1).tolist() == [127, 127, 127, 0]
    assert ((rounded * scale - x).abs() <= 0.5001 * scale).all()


def test_outliers_are_carried_apart():
    x = torch.randn(3, 512)
    x[1, [7, 300]] = torch.tensor([150.0, -90.0])
    rounded, scale, clipped = round_activations(x)
    assert clipped.nonzero().tolist() == [[1, 7], [1, 300]]
    whole = rounded * scale + clipped
    assert ((whole - x).abs() <= 0.5001 * scale).all()
    assert scale.max() < 5 / 127  # that of the ordinary numbers
    torch.testing.assert_close(whole[1, [7, 300]], x[1, [7, 300]])  # and not rounded at all


# ---------------------------------------------------------------------------------------------- the kernels


def shapes():
    """Tiles of the kernels are 6 x 4 with vectors of 32, 64 and 128 inputs: whole ones, and every kind of edge."""
    return [(1, 8, 128), (2, 5, 256), (3, 1, 128), (4, 33, 384), (5, 3, 640), (6, 4, 128), (7, 18, 256)]


def panels():
    """Many rows: panels of 64 outputs, 1024 or 2048 inputs deep. Whole ones, parts of one, one more than one."""
    return [(49, 31, 128), (50, 64, 2048), (51, 65, 2176), (52, 1, 4224), (53, 130, 256), (30, 66, 384)]


def odd():
    """Inputs that fill no vector, or no piece of four bytes."""
    return [(1, 2, 1), (3, 9, 17), (8, 6, 63), (13, 7, 269), (49, 3, 1), (51, 70, 1029), (56, 67, 2051), (54, 66, 4303)]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), [*shapes(), *panels(), *odd()])
def test_8_bit_kernel_is_exact_to_the_bit(M, N, K, bias):
    """Against whole numbers in float64, where these sums are exact."""
    x = torch.rand(M, K) * 2 - 1  # nothing to clip
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    weight[0] = -128  # never written by `round_rows`, but a file may hold it
    scale, offset = torch.rand(N) + 0.5, torch.randn(N) if bias else None
    rounded, token_scale, clipped = round_activations(x)
    assert clipped is None
    sums = rounded.double() @ weight.double().T
    expected = sums.float() * scale * token_scale + (offset if bias else 0)
    assert torch.equal(linear_kernels.linear_int8(x, weight, scale, offset), expected)
    half = linear_kernels.linear_int8(x.bfloat16(), weight, scale, offset)
    rounded, token_scale, _ = round_activations(x.bfloat16())
    offset = offset.bfloat16() if bias else 0
    expected = (rounded.double() @ weight.double().T).float() * scale * token_scale + offset
    assert torch.equal(half, expected.bfloat16())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("K", [36864, linear_kernels.MOST_INPUTS])
@pytest.mark.parametrize("M", [1, 60])
def test_sums_do_not_overflow(M, K):
    """The longest row of any published model, and the longest there may be: weights and activations at their largest.

    In 4 bits sums of n, which is at most 15, may overflow on the way; those of n - 8 don't.
    """
    x, weight = torch.ones(M, K), torch.full((4, K), -127, dtype=torch.int8)
    assert linear_kernels.linear_int8(x, weight, torch.ones(4)).tolist() == [[-127.0 * K] * 4] * M
    for n in (0, 15):
        weight, steps = torch.full((4, K // 2), 17 * n, dtype=torch.uint8), torch.full((4, K // 64), 15).char()
        y = linear_kernels.linear_int4(x, weight, steps, torch.ones(4))
        assert y.tolist() == [[(n - 8) * 15.0 * K] * 4] * M
    with pytest.raises(ValueError, match="no kernel for x"):
        linear_kernels.linear_int8(torch.ones(1, 2**17 + 1), torch.ones(4, 2**17 + 1).char(), torch.ones(4))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("M", "N", "K"), [*shapes(), *panels()])
def test_4_bit_kernel_is_exact_to_the_bit(M, N, K):
    """Few rows and many take different ways through it."""
    x, bias, scale = torch.rand(M, K) * 2 - 1, torch.randn(N), torch.rand(N) + 0.5
    weight = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    steps = torch.randint(-15, 16, (N, K // GROUP), dtype=torch.int8)
    rounded, token_scale, clipped = round_activations(x)
    assert clipped is None
    sums = rounded.double() @ unpack(weight, steps).double().T
    expected = sums.float() * scale * token_scale + bias
    assert torch.equal(linear_kernels.linear_int4(x, weight, steps, scale, bias), expected)
    rounded, token_scale, _ = round_activations(x.bfloat16())
    expected = (rounded.double() @ unpack(weight, steps).double().T).float() * scale * token_scale + bias.bfloat16()
    assert torch.equal(linear_kernels.linear_int4(x.bfloat16(), weight, steps, scale, bias), expected.bfloat16())


@pytest.mark.usefixtures("kernels")
def test_steps_that_no_file_should_hold_read_no_memory_that_is_not_theirs():
    weight, steps = torch.full((4, 64), 0x0F, dtype=torch.uint8), torch.tensor([[-128, 127]] * 4, dtype=torch.int8)
    y = linear_kernels.linear_int4(torch.ones(1, 128), weight, steps, torch.ones(4))
    assert y.isfinite().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("M", "N", "K"), [*shapes(), *panels(), *odd()])
def test_bfloat16_kernel_within_the_bound_of_float32_sums(M, N, K):
    """|y - exact| <= half a unit in the last place of bfloat16, at most 2^-8 of y, and K float32 roundings."""
    x, weight, bias = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    exact = x.double() @ weight.double().T + bias.double()
    sums = (x.double().abs() @ weight.double().abs().T + bias.double().abs()) * (K + 2) * 2.0**-24
    y = linear_kernels.linear_bf16(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + sums * 1.01).all()
    # and without a bias
    exact -= bias.double()
    y = linear_kernels.linear_bf16(x, weight)
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + sums * 1.01).all()


@pytest.mark.usefixtures("kernels")
def test_results_between_two_bfloat16_numbers_go_to_the_even_one():
    weight = torch.tensor([[256.0, 1.0], [256.0, 3.0], [-256.0, -1.0]]).bfloat16()
    for M in (1, 60):
        assert linear_kernels.linear_bf16(torch.ones(M, 2).bfloat16(), weight).tolist() == [[256, 260, -256]] * M


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("M", [3, 60])
def test_what_is_no_number_stays_in_its_row(M):
    x, weight = torch.ones(M, 33).bfloat16(), torch.ones(70, 33).bfloat16()
    x[1, 32], weight[69, 0] = math.nan, math.inf
    y = linear_kernels.linear_bf16(x, weight)
    assert y[1].isnan().all() and y[[0, 2], 69].isinf().all() and (y[[0, 2], :69] == 33).all()


@pytest.mark.usefixtures("kernels")
def test_kernels_refuse_what_they_would_misread():
    x, weight, scale = torch.randn(2, 128), torch.zeros(4, 128, dtype=torch.int8), torch.ones(4)
    packed, steps = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.int8)
    for wrong in (
        lambda: linear_kernels.linear_int8(x[:, :64], weight, scale),
        lambda: linear_kernels.linear_int8(x.half(), weight, scale),
        lambda: linear_kernels.linear_int8(x, weight, scale[:3]),
        lambda: linear_kernels.linear_int8(x, weight, scale.double()),
        lambda: linear_kernels.linear_int8(x, weight.T.contiguous().T, scale),
        lambda: linear_kernels.linear_int8(x, weight, scale, torch.ones(5)),
        lambda: linear_kernels.linear_bf16(x, weight.bfloat16()),
        lambda: linear_kernels.linear_int4(x, packed, steps[:, :1], scale),
        lambda: linear_kernels.linear_int4(x, packed, steps.short(), scale),
        lambda: linear_kernels.linear_int4(x, packed, steps, scale.bfloat16()),
        lambda: linear_kernels.linear_int4(x[:, :64], packed[:, :32].contiguous(), steps[:, :1].contiguous(), scale),
        lambda: linear_kernels.linear_int8(x, weight[None], scale),
        lambda: linear_kernels.linear_bf16(x.bfloat16(), weight[None].bfloat16()),
        lambda: linear_kernels.linear_int8(x[:, :0], weight[:, :0], scale),
        lambda: linear_kernels.linear_bf16(x[:, :0].bfloat16(), weight[:, :0].bfloat16()),
    ):
        with pytest.raises(ValueError, match="no kernel for x"):
            wrong()
    assert linear_kernels.linear_int8(x[:0], weight, scale).shape == (0, 4)
    columns = torch.randn(128, 2).T  # not contiguous: copied
    assert torch.equal(
        linear_kernels.linear_int8(columns, weight, scale), linear_kernels.linear_int8(columns.clone(), weight, scale)
    )


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """The same shape on a device whose memory the CPU cannot read."""
    return torch.empty_like(x, device="meta")


@pytest.mark.usefixtures("kernels")
def test_kernels_refuse_what_lies_on_another_device():
    x, weight, scale = torch.randn(2, 128), torch.zeros(4, 128, dtype=torch.int8), torch.ones(4)
    q, of_norm, seen = torch.randn(1, 2, 3, 128).bfloat16(), torch.ones(128).bfloat16(), torch.ones(1, 1, 3, 3).bool()
    for wrong in (
        lambda: linear_kernels.linear_int8(elsewhere(x), weight, scale),
        lambda: linear_kernels.linear_int8(x, elsewhere(weight), scale),
        lambda: linear_kernels.linear_int8(x, weight, elsewhere(scale)),
        lambda: linear_kernels.linear_int8(x, weight, scale, elsewhere(scale)),
        lambda: linear_kernels.attention_bf16(elsewhere(q), q, q, seen, 1.0),
        lambda: linear_kernels.attention_bf16(q, q, elsewhere(q), seen, 1.0),
        lambda: linear_kernels.attention_bf16(q, q, q, elsewhere(seen), 1.0),
        lambda: linear_kernels.gelu_bf16(q, elsewhere(q)),
        lambda: linear_kernels.rms_norm_bf16(q, elsewhere(of_norm), 1e-6),
    ):
        with pytest.raises(ValueError, match="on meta: they are for the CPU"):
            wrong()
    with torch.device("meta"):  # where new tensors are wanted is not where results belong
        assert linear_kernels.linear_int8(x, weight, scale).is_cpu
        assert linear_kernels.attention_bf16(q, q, q, None, 1.0).is_cpu


@pytest.mark.skipif(sys.platform != "linux", reason="calls mprotect")
def test_kernels_read_nothing_behind_the_end_of_a_tensor(kernels):
    """What they read ends where memory does: a step further, and the process would be ended by a signal."""
    process = multiprocessing.get_context("spawn").Process(target=use_what_ends_with_its_page, args=(kernels,))
    process.start()
    process.join()
    assert process.exitcode == 0


def use_what_ends_with_its_page(kernels: str) -> None:
    use(kernels)
    kept = []  # the pages: a tensor does not hold them

    def at_the_end(x: torch.Tensor) -> torch.Tensor:
        whole = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
        kept.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), mmap.PAGESIZE, 0) == 0
        moved = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - x.nbytes)
        return moved.view(x.shape).copy_(x)

    for M, K in ((1, 1), (2, 17), (3, 63), (1, 269), (5, 300)):
        x, weight = torch.randn(M, K), torch.randn(70, K)
        linear_kernels.linear_bf16(at_the_end(x.bfloat16()), at_the_end(weight.bfloat16()))
        in_8_bits = [at_the_end(part) for part in round_rows(weight)]
        for dtype in (torch.bfloat16, torch.float32):
            linear_kernels.linear_int8(at_the_end(x.to(dtype)), *in_8_bits)
        linear_kernels.rms_norm_bf16(at_the_end(x.bfloat16()), at_the_end(weight[0].bfloat16()), 1e-6)
        linear_kernels.gelu_bf16(at_the_end(x.bfloat16()), at_the_end(x.bfloat16()))
        in_4_bits = [at_the_end(part) for part in round_groups(torch.randn(70, 384))]
        linear_kernels.linear_int4(at_the_end(torch.randn(M, 384)), *in_4_bits)
        q, k = torch.randn(1, 2, M, 18).bfloat16(), torch.randn(1, 1, K, 18).bfloat16()
        angles = torch.randn(1, 1, M, 9).bfloat16()
        linear_kernels.rotary_bf16(at_the_end(q), at_the_end(angles), at_the_end(angles))
        seen = at_the_end(torch.rand(1, 1, M, K) < 0.7)
        linear_kernels.attention_bf16(at_the_end(q), at_the_end(k), at_the_end(k), seen, 1.0)
        linears = [(at_the_end(torch.randn(18, 18).bfloat16()), None, None) for _ in range(7)]
        norms, x, angles = [at_the_end(torch.ones(18).bfloat16()) for _ in range(4)], q[:, 0], angles[:, :, :M]
        given = [at_the_end(part) for part in (angles, angles, seen, k, k.clone())]
        if M <= K:
            linear_kernels.decoder_layer(at_the_end(x), linears, norms, *given, K, 1e-6, 1.0, 5.0)


# ---------------------------------------------------------------------------------------------- between the products


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(65536,), (1024, 64), (2, 32, 1024), (13, 50), (0, 8)])
def test_gelu_of_every_bfloat16_there_is(shape):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[: math.prod(shape)].view(shape)
    times = torch.randn(shape).bfloat16()
    expected = torch.nn.functional.gelu(every, approximate="tanh")[: math.prod(shape)].view(shape)
    torch.testing.assert_close(linear_kernels.gelu_bf16(x), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(linear_kernels.gelu_bf16(x, times), expected * times, rtol=0, atol=0, equal_nan=True)
    if len(shape) > 1:  # what is not contiguous is copied
        assert torch.equal(linear_kernels.gelu_bf16(times.mT, times.mT), linear_kernels.gelu_bf16(times, times).mT)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("M", "K"), [(1, 2048), (9, 2048), (3, 1), (12, 37), (0, 16)])
def test_the_norm_within_the_bound_of_float32(M, K):
    """Half a unit in the last place of bfloat16, and the roundings of K squares summed and four products."""
    x, weight = (torch.randn(M, K) * torch.logspace(-3, 4, max(M, 1))[:M, None]).bfloat16(), torch.randn(K).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight.double())
    y = linear_kernels.rms_norm_bf16(x, weight, 1e-6)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    assert ((y.double() - exact).abs() <= exact.abs() * (2.0**-8 + (K / 16 + 10) * 2.0**-24)).all()


@pytest.mark.usefixtures("kernels")
def test_the_norm_of_zeros_and_of_what_is_no_number():
    x = torch.zeros(3, 40).bfloat16()
    x[1, 39] = math.nan
    y = linear_kernels.rms_norm_bf16(x, torch.ones(40).bfloat16(), 1e-6)
    assert (y[[0, 2]] == 0).all() and y[1].isnan().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("B", "H", "S", "E"), [(1, 8, 66, 256), (2, 1, 1, 32), (3, 2, 5, 6), (1, 2, 0, 8)])
def test_rotary_positions_are_equal_to_the_bit(B, H, S, E):
    """Of queries and keys as projections leave them, of all positions or the last of them."""
    x = (torch.randn(B, S + 2, H, E) * 3).bfloat16().transpose(1, 2)
    places = 7 * torch.arange(S + 2) + 100 * torch.arange(B)[:, None]
    cos, sin = rotary_tables(places, E, 1e4, torch.bfloat16)
    for last in (S + 2, S):
        given = x[:, :, S + 2 - last :], cos[:, :, S + 2 - last :], sin[:, :, S + 2 - last :]
        assert torch.equal(linear_kernels.rotary_bf16(*given), apply_rotary(*given))
    if S > 1:
        x[0, 0, 1, 2] = math.nan
        assert linear_kernels.rotary_bf16(x, cos, sin).isnan().sum() == 2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "K", "S", "T", "E"),
    [(1, 8, 1, 66, 66, 256), (1, 8, 1, 1, 130, 64), (2, 4, 4, 49, 64, 72), (2, 4, 2, 48, 127, 18), (3, 2, 1, 1, 1, 2)],
)
@pytest.mark.parametrize("cap", [None, 20.0])
def test_attention_within_the_bound_of_its_roundings(B, H, K, S, T, E, cap, hidden):
    """Half a unit of bfloat16 for each weight, up to 2^-8 of it, and for the result; float32 before and after.

    Queries, keys and values lie as the model leaves them: heads beside each other, or in a cache with room behind. The
    mask is a part of a larger one.
    """
    q = torch.randn(B, S, H, E).bfloat16().transpose(1, 2)
    k, v = torch.randn(B, K, T + 3, E).bfloat16()[:, :, :T], torch.randn(B, T, K, E).bfloat16().transpose(1, 2)
    mask = (torch.rand(B, 1, S + 2, T + 3) < 0.7)[:, :, -S:, 1 : T + 1]
    mask[..., 0] = True
    keys, values = (x.double().repeat_interleave(H // K, dim=1) for x in (k, v))
    scores = q.double() @ keys.mT * 0.3
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    weights = (scores.masked_fill(~mask, -math.inf) if hidden else scores).softmax(-1)
    exact = weights @ values
    # A score is off by the roundings of E products, a weight by a factor of e to that power, and its own.
    of_scores = float((q.double().abs() @ keys.mT.abs()).max()) * 0.3 * (E + 8) * 2.0**-24
    y = linear_kernels.attention_bf16(q, k, v, mask if hidden else None, 0.3, cap)
    assert y.shape == q.shape and y.dtype == q.dtype and y.transpose(1, 2).is_contiguous()
    bound = exact.abs() * 2.0**-8 + (weights @ values.abs()) * (2.0**-8 + 2 * of_scores + 2.0**-18)
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.usefixtures("kernels")
def test_attention_to_nothing_and_to_what_is_no_number():
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 1] = False  # sees nothing
    mask[0, 0, 2, 4] = False  # does not see what is no number
    k[:, :, 4] = math.nan
    y = linear_kernels.attention_bf16(q, k, v, mask, 1.0)
    assert (y[:, :, 1] == 0).all() and y[:, :, 2].isfinite().all() and y[:, :, [0, 3, 4]].isnan().all()
    far = linear_kernels.attention_bf16(q * 1000, q * 1000, v, None, 1.0)  # every weight but one is 0
    assert far.isfinite().all()


@pytest.mark.usefixtures("kernels")
def test_gelu_and_norm_refuse_what_they_would_misread():
    x, weight = torch.randn(2, 8).bfloat16(), torch.ones(8).bfloat16()
    for wrong in (
        lambda: linear_kernels.gelu_bf16(x.float()),
        lambda: linear_kernels.gelu_bf16(x, x[:1]),
        lambda: linear_kernels.gelu_bf16(x, x.float()),
        lambda: linear_kernels.rms_norm_bf16(x, weight.float(), 1e-6),
        lambda: linear_kernels.rms_norm_bf16(x, weight[:7], 1e-6),
    ):
        with pytest.raises(ValueError, match="no kernel for x"):
            wrong()


@pytest.mark.usefixtures("kernels")
def test_attention_refuses_what_it_would_misread():
    q, seen = torch.randn(1, 4, 3, 8).bfloat16(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for wrong in (
        lambda: linear_kernels.attention_bf16(q.float(), q.float(), q.float(), seen, 1.0),
        lambda: linear_kernels.attention_bf16(q, q, q[:, :, :2], seen, 1.0),
        lambda: linear_kernels.attention_bf16(q, q[:, :3], q[:, :3], seen, 1.0),
        lambda: linear_kernels.attention_bf16(q, q, q, seen.int(), 1.0),
        lambda: linear_kernels.attention_bf16(q, q, q, seen[..., :2], 1.0),
        lambda: linear_kernels.rotary_bf16(q, q[:, :1], q[:, :1]),
        lambda: linear_kernels.rotary_bf16(q, q[:, :1, :, :4].float(), q[:, :1, :, :4].float()),
        lambda: linear_kernels.rotary_bf16(q, q[:, :1, :2, :4], q[:, :1, :2, :4]),
    ):
        with pytest.raises(ValueError, match="no kernel for x"):
            wrong()


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_a_model_takes_them_and_answers_as_without(kernels, mode, monkeypatch):
    """Counted, and compared with the same model whose parts between the products are PyTorch's.

    Roundings differ, and may move an 8-bit number by a step; the distance to the model in float32 is the same.
    """
    called = []
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    for name in ("gelu_bf16", "rms_norm_bf16", "attention_bf16", "rotary_bf16"):
        real = getattr(linear_kernels, name)
        monkeypatch.setattr(
            linear_kernels, name, lambda *given, name=name, real=real: called.append(name) or real(*given)
        )
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[5, 3])
    exact = copy.deepcopy(model).float()(**inputs).logits
    fast = quantize(model, mode)(**inputs).logits
    text, vision = model.config.text_config, model.config.vision_config
    assert called.count("attention_bf16") == text.num_hidden_layers + vision.num_hidden_layers
    assert called.count("gelu_bf16") == text.num_hidden_layers + vision.num_hidden_layers
    assert called.count("rms_norm_bf16") == 2 * text.num_hidden_layers + 1
    assert called.count("rotary_bf16") == 2 * text.num_hidden_layers  # queries and keys
    called.clear()
    for module in model.modules():
        if type(module) in swap.FAST_CLASSES.values():
            module.__class__ = type(module).__mro__[1]
    plain = model(**inputs).logits
    assert called == []
    # A divergence goes with the square of an error.
    assert kl(fast, plain) < kl(plain, exact) and kl(fast, exact) < 1.25**2 * kl(plain, exact)


# ---------------------------------------------------------------------------------------------- a layer in one call


def cached_passes(model, rows=(20, 13)):
    """Logits of the prefix, of three tokens more, and of one more: two rows, one of them padded."""
    inputs = make_inputs(model.config, prefix=list(rows))
    cache = KVCache(model.config.text_config, len(rows), 40, model.dtype)
    logits = [model(**inputs, cache=cache).logits]
    for tokens in (torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11], [12]])):
        logits.append(model(tokens, cache=cache).logits)
    return logits, cache


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("beats", [True, False])
def test_next_tokens_in_one_call_of_a_layer_are_equal_to_the_bit(kernels, mode, kind, beats, monkeypatch):
    """Where a CPU with AVX-512 leaves attention to PyTorch, there is no such call."""
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: beats)
    called, real = [], linear_kernels.decoder_layer
    monkeypatch.setattr(linear_kernels, "decoder_layer", lambda x, *rest: called.append(x.shape[1]) or real(x, *rest))
    model = quantize(make_model(kind, torch.bfloat16), mode)
    logits, cache = cached_passes(model)
    expected_calls = [3] * len(cache.keys) + [1] * len(cache.keys)  # the prefix has too many rows for it
    assert called == (expected_calls if beats or kernels == "AVX2" else [])
    monkeypatch.setattr(decoder_layers, "in_one_call", lambda *_: None)
    expected, expected_cache = cached_passes(model)
    for y, step_by_step in zip(logits, expected):
        assert torch.equal(y, step_by_step)
    for kept, step_by_step in zip([*cache.keys, *cache.values], [*expected_cache.keys, *expected_cache.values]):
        assert torch.equal(kept, step_by_step)


class HalfNorm(FastRMSNorm):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.usefixtures("kernels")
def test_a_layer_in_one_call_takes_masks_as_they_lie_and_no_rows(monkeypatch):
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    layer, text = model.language_model.model.layers[0], model.config.text_config
    cos, sin = rotary_tables(torch.tensor([[3]]), text.head_dim, 1e4, torch.bfloat16)
    cache = KVCache(text, 1, 4, torch.bfloat16)
    cache.extend(torch.ones(1, 4, dtype=torch.bool))
    x = torch.randn(1, 1, 128).bfloat16()
    seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    expected = layer(x, seen, cos, sin, cache)
    for mask in (torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 1, 4), torch.ones(1, 1, 1, 8)[..., ::2] > 0):
        assert torch.equal(layer(x, mask, cos, sin, cache), expected)
    nobody = model(torch.zeros(0, 1, dtype=torch.long), cache=KVCache(text, 0, 4, torch.bfloat16))
    assert nobody.logits.shape == (0, 1, text.vocab_size)


@pytest.mark.usefixtures("kernels")
def test_what_watches_or_changes_a_part_of_a_layer_is_not_passed_by(monkeypatch):
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: True)
    monkeypatch.setattr(linear_kernels, "decoder_layer", lambda *_: pytest.fail("in one call"))
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    seen = []
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("o_proj"))
    cached_passes(model)
    assert len(seen) == 3 * len(model.language_model.model.layers)
    for change in (
        lambda layer: layer.mlp.register_forward_pre_hook(lambda *_: None),
        lambda layer: setattr(layer.input_layernorm, "forward", layer.input_layernorm.forward),
        lambda layer: setattr(layer.self_attn, "explicit", True),
        lambda layer: setattr(layer.input_layernorm, "__class__", HalfNorm),
        lambda layer: setattr(layer, "input_layernorm", torch.nn.Sequential(layer.input_layernorm)),
        lambda layer: layer.post_attention_layernorm.float(),
        lambda layer: setattr(layer.mlp, "up_proj", torch.nn.Sequential(layer.mlp.up_proj)),
        lambda layer: setattr(layer.self_attn.q_proj, "bias", torch.nn.Parameter(torch.ones(128).bfloat16())),
    ):
        model = quantize(make_model(dtype=torch.bfloat16), "bf16")
        for layer in model.language_model.model.layers:
            change(layer)
        cached_passes(model)
    model, seen = quantize(make_model(dtype=torch.bfloat16), "bf16"), []
    everywhere = torch.nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(type(part)))
    with everywhere:  # removed behind it
        cached_passes(model)
    assert seen.count(FastGemmaMLP) == 3 * len(model.language_model.model.layers)


@pytest.mark.usefixtures("kernels")
def test_a_layer_in_one_call_refuses_what_it_would_misread():
    D, E, wide, KV = 128, 32, 256, 2
    shapes = [(4 * E, D), (KV * E, D), (KV * E, D), (D, 4 * E), (wide, D), (wide, D), (D, wide)]
    norm, angles = torch.ones(D).bfloat16(), torch.ones(1, 1, 1, E // 2).bfloat16()
    right: dict[str, object] = {
        "x": torch.randn(1, 1, D).bfloat16(),
        "linears": [(torch.randn(shape).bfloat16(), None, None) for shape in shapes],
        "norms": [norm, None, norm, None],
        "cos": angles,
        "sin": angles,
        "mask": torch.ones(1, 1, 1, 5, dtype=torch.bool),
        "keys": torch.randn(1, KV, 6, E).bfloat16(),
        "values": torch.randn(1, KV, 6, E).bfloat16(),
        "used": 5,
        "eps": 1e-6,
        "scale": 1.0,
        "cap": None,
    }
    assert linear_kernels.decoder_layer(**right).isfinite().all()
    in_8_bits, in_4_bits = round_rows(torch.randn(wide, D)), round_groups(torch.randn(wide, D))

    def up(*weights: torch.Tensor | None) -> list[tuple[torch.Tensor | None, ...]]:
        return [*right["linears"][:5], weights, right["linears"][6]]

    for wrong in (
        {"x": right["x"].float()},
        {"x": right["x"][..., :64]},
        {"linears": up(right["linears"][5][0].float(), None, None)},
        {"linears": up(right["linears"][5][0][:255], None, None)},
        {"linears": up(right["linears"][6][0].T, None, None)},
        {"linears": up(in_8_bits[0], None, None)},
        {"linears": up(in_8_bits[0], None, in_8_bits[1].double())},
        {"linears": up(in_8_bits[0], None, in_8_bits[1][:9])},
        {"linears": up(in_4_bits[0], in_4_bits[1], None)},
        {"linears": up(in_4_bits[0], in_4_bits[1][:, :1], in_4_bits[2])},
        {"norms": [norm, None, norm[:64], None]},
        {"norms": [norm, norm.float(), norm, None]},
        {"norms": [None, None, norm, None]},
        {"cos": angles.float()},
        {"cos": angles[..., :8]},
        {"mask": right["mask"].int()},
        {"mask": right["mask"][..., :4]},
        {"keys": right["keys"].float()},
        {"values": right["values"][:, :1]},
        {"keys": right["keys"][..., ::2], "values": right["values"][..., ::2]},
        {"used": 7, "mask": torch.ones(1, 1, 1, 7, dtype=torch.bool)},
    ):
        with pytest.raises(ValueError, match="no kernel for x"):
            linear_kernels.decoder_layer(**{**right, **wrong})
    for name in ("x", "keys", "mask", "sin"):
        with pytest.raises(ValueError, match="on meta: they are for the CPU"):
            linear_kernels.decoder_layer(**{**right, name: elsewhere(right[name])})


@pytest.mark.parametrize("slow", [False, True])
def test_a_model_in_bfloat16_answers_nearly_the_same_on_a_cpu_without_its_products(way, slow, monkeypatch):
    """Everything that is float32 there: products of many rows, attention, patches. Compared with float32 throughout."""
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: not slow)
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[20, 13])  # more rows than few
    plain, exact = model(**inputs).logits, copy.deepcopy(model).float()(**inputs).logits
    fast = quantize(model, "bf16")(**inputs).logits
    assert fast.dtype == torch.bfloat16 and not (slow and torch.equal(fast, plain))
    assert relative(fast - exact, exact) < 1.25 * relative(plain - exact, exact)


# ---------------------------------------------------------------------------------------------- layers


def layers(dtype: torch.dtype = torch.float32, N: int = 48, K: int = 512):
    weight, bias = torch.randn(N, K), torch.randn(N).to(dtype)
    return weight, bias, Int8Linear(*round_rows(weight), bias), Int4Linear(*round_groups(weight), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 60])
def test_layers_compute_what_they_round(way, dtype, M):
    weight, bias, eight, four = layers(dtype)
    x = torch.randn(1, M, 512).to(dtype)
    exact = x.double() @ weight.double().T + bias.double()
    for layer, most in ((eight, 0.015), (four, 0.11)):
        y = layer(x)
        assert y.dtype == dtype and y.shape == (1, M, 48)
        assert most / 10 < relative(y - exact, exact) < most
    in_four_bits = x.double() @ dense(four).T + bias.double()
    assert relative(four(x) - in_four_bits, in_four_bits) < 0.01  # beside the weights next to nothing is rounded


@pytest.mark.skipif(not devices.has_dot_products(), reason="another plain path")
def test_both_ways_are_equal_to_the_bit_where_nothing_is_clipped(kernels, monkeypatch):
    _, _, eight, _ = layers()
    x = torch.rand(60 if kernels == "AVX-512" else 16, 512) - 0.5
    compiled = eight(x)
    monkeypatch.setattr(library, "REQUESTED", "0")
    assert torch.equal(eight(x), compiled)


@pytest.mark.parametrize("M", [1, 7, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_outliers_do_no_harm(way, M, dtype):
    """Six channels a hundred times larger than the rest, as in real checkpoints, and a token with one of its own."""
    weight, bias, eight, four = layers(dtype)
    x = torch.randn(M, 512)
    x[:, [3, 99, 100, 255, 256, 511]] = 100 * torch.tensor([1, -1.2, 0.8, 1.5, -0.7, -1]) + torch.randn(M, 6)
    x[-1, 40] = -300
    x = x.to(dtype)
    # What they multiply is as good as it can be: the outliers reach the output, so it is compared without them, too.
    ordinary = x.clone()
    ordinary[:, [3, 40, 99, 100, 255, 256, 511]] = 0
    exact = x.double() @ weight.double().T + bias.double()
    for layer, most in ((eight, 0.015), (four, 0.12)):
        assert relative(layer(x) - exact, exact) < most
    if dtype == torch.float32 and (way != "plain" or devices.has_dot_products()):
        # The ordinary channels alone: with one scale for all, as without the clipping, four fifths of them would be 0.
        whole = eight.weight.double() * eight.scale.double()[:, None]
        of_outliers, expected = (x - ordinary).double() @ whole.T + bias.double(), ordinary.double() @ whole.T
        assert relative(eight(x) - of_outliers - expected, expected) < 0.02
        naive = (x / (x.abs().amax(-1, keepdim=True) / 127)).round() * (x.abs().amax(-1, keepdim=True) / 127)
        assert relative((naive - x).double() @ whole.T, expected) > 0.2


def test_a_token_does_not_depend_on_its_neighbours(way):
    _, _, eight, four = layers()
    x = torch.randn(60, 512)
    x[::3, 17] *= 200
    for layer, same in ((eight, 1e-5), (four, 0.01 if way == "plain" else 1e-5)):
        alone = torch.cat([layer(row[None]) for row in x])
        assert relative(layer(x) - alone, alone) < same  # the plain 4-bit product rounds few rows to bfloat16


@pytest.mark.parametrize("vnni", [False, True])
def test_rows_may_be_a_part_of_others(way, vnni, monkeypatch):
    """As the last position of a batch is: neither contiguous nor a column."""
    if not vnni:
        monkeypatch.setattr(devices, "has_dot_products", lambda: False)
    _, _, eight, four = layers()
    x = torch.randn(3, 7, 512)
    for layer in (eight, four):
        assert torch.equal(layer(x[:, -1:]), layer(x[:, -1:].contiguous()))


def test_no_number_comes_out_where_none_went_in(way):
    _, _, eight, four = layers()
    for layer in (eight, four):
        for bad in (math.nan, math.inf):
            x = torch.randn(2, 512)
            x[1, 5] = bad
            y = layer(x)
            assert y[0].isfinite().all() and not y[1].isfinite().any()
        assert layer(torch.zeros(1, 512))[0].tolist() == layer.bias.tolist()


def test_a_cpu_without_8_bit_products(monkeypatch):
    """Weights stay small there, activations stay as they are."""
    monkeypatch.setattr(library, "REQUESTED", "0")
    monkeypatch.setattr(devices, "has_dot_products", lambda: False)
    weight, bias, eight, _ = layers()
    for M in (1, 40):
        x = torch.randn(M, 512)
        exact = x.double() @ weight.double().T + bias.double()
        assert relative(eight(x) - exact, exact) < 0.01


# ---------------------------------------------------------------------------------------------- without a kernel


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet: no library is loaded, and none lies in the cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(library, "REQUESTED", "1")
    cached = library._library, devices.vector_instructions
    for function in cached:
        function.cache_clear()
    yield tmp_path / "extensions"
    for function in cached:
        function.cache_clear()


def answers_still(capfd, reason: str):
    weight, bias, eight, _ = layers()
    x = torch.randn(2, 512)
    exact = x.double() @ weight.double().T + bias.double()
    assert relative(eight(x) - exact, exact) < 0.02
    eight(x)
    noted = capfd.readouterr()
    assert noted.out == "" and noted.err.count("plain PyTorch") == 1 and reason in noted.err


@needs_kernel
def test_a_compiler_that_fails_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "false")
    answers_still(capfd, "false failed")
    assert list(fresh.rglob("*.so")) == []


@needs_kernel
def test_a_source_that_does_not_compile_is_noted_once_and_done_without(fresh, monkeypatch, capfd, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(library, "SOURCES", {"AVX-512": broken, "AVX2": broken})
    answers_still(capfd, "error")


@needs_kernel
def test_a_library_that_does_not_load_is_noted_once_and_done_without(fresh, monkeypatch, capfd):
    monkeypatch.setattr(library, "compiled", lambda source: os.open(source, os.O_RDONLY))
    answers_still(capfd, ".cpp")


def test_no_compiler_at_all(fresh, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    answers_still(capfd, "compiler" if KERNEL else "")


def test_another_cpu(fresh, monkeypatch, capfd):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    answers_still(capfd, "AVX2" if KERNEL else "")


def test_nothing_is_compiled_for_the_model_that_ships_unless_asked(monkeypatch):
    def must_not(kind):
        raise AssertionError("asked for the compiled library")

    monkeypatch.setattr(library, "_library", must_not)
    pg = paligemma.load("tiny", device="cpu")
    assert pg.caption(render(1, "test", 128).image).text
    assert not any(isinstance(module, FastLinear) for module in pg.model.modules())


# ---------------------------------------------------------------------------------------------- models


def make_model(kind: str = "gemma", dtype: torch.dtype = torch.float32, **sizes) -> PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **sizes}
    model = PaliGemmaForConditionalGeneration(tiny_config(kind, **sizes)).eval()
    randomize(model)
    return model.to(dtype)


def kl(logits: torch.Tensor, reference: torch.Tensor) -> float:
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize(("mode", "most"), [("int8", 0.01), ("int4", 0.3)])
def test_a_rounded_model_predicts_nearly_the_same(way, kind, mode, most):
    """Random weights: nothing in them is as robust as in a trained model."""
    model = make_model(kind)
    inputs = make_inputs(model.config, prefix=[6, 9], suffix=[8, 3])
    before = model(**inputs).logits
    assert quantize(model, mode) is model
    after = model(**inputs).logits
    assert after.dtype == before.dtype and after.shape == before.shape
    assert 0 < kl(after, before) < most
    if mode == "int8":
        assert (after.argmax(-1) == before.argmax(-1)).float().mean() > 0.9


def test_what_is_rounded_and_what_is_not():
    model = quantize(make_model(dtype=torch.bfloat16), "int4")
    of = {name: type(module) for name, module in model.named_modules()}
    assert of["language_model.model.layers.0.self_attn.q_proj"] is Int4Linear
    assert of["language_model.model.layers.1.mlp.down_proj"] is Int4Linear
    assert of["vision_tower.vision_model.encoder.layers.0.mlp.fc1"] is Int8Linear
    assert of["multi_modal_projector.linear"] is Int8Linear
    assert not any(
        isinstance(module, torch.nn.Linear | torch.nn.Embedding) for module in model.language_model.modules()
    )
    kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert "language_model.model.norm.weight" in kept
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in kept
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_whose_inputs_do_not_divide_by_128_keeps_8_bits():
    model = quantize(make_model(intermediate_size=192), "int4")
    assert isinstance(model.language_model.model.layers[0].mlp.down_proj, Int8Linear)
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj, Int4Linear)


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_the_head_of_some_rows_only(way, mode):
    model = quantize(make_model(dtype=torch.bfloat16), mode)
    hidden, ids = torch.randn(1, 1, 128).bfloat16(), torch.tensor([0, 5, 7, 300])
    head = model.language_model.model.embed_tokens
    torch.testing.assert_close(head.logits(hidden, ids), head.logits(hidden)[..., ids])


def test_the_fast_rows_of_bfloat16_are_the_same_arithmetic(way):
    model = make_model(dtype=torch.bfloat16)
    inputs = make_inputs(model.config, prefix=[6])
    plain = [answer.token_ids for answer in paligemma.generate(model, inputs, max_new_tokens=12)]
    logits = model(**inputs).logits
    names = set(model.state_dict())
    quantize(model, "bf16")
    assert set(model.state_dict()) == names
    assert isinstance(model.language_model.model.layers[0].mlp.up_proj, FastLinear)
    fast = model(**inputs).logits
    assert kl(fast, logits) < 1e-3
    assert [answer.token_ids for answer in paligemma.generate(model, inputs, max_new_tokens=12)] == plain


def test_a_model_with_fast_rows_can_be_trained_and_saved(tmp_path):
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    inputs = make_inputs(model.config, prefix=[3], suffix=[2], labels=True)
    with torch.enable_grad():
        model(**inputs).loss.backward()
    assert model.language_model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.language_model.model.embed_tokens.weight.grad.abs().sum() > 0
    save_pretrained(model, tmp_path / "saved")
    assert open_checkpoint(tmp_path / "saved").dtype == torch.bfloat16


@needs_avx512
@pytest.mark.parametrize("best_for_many", [False, True])
def test_which_products_go_through_the_kernel(best_for_many, monkeypatch):
    called = []
    real = linear_kernels.linear_bf16
    monkeypatch.setattr(linear_kernels, "linear_bf16", lambda x, *rest: called.append(x.shape) or real(x, *rest))
    monkeypatch.setattr(linear_kernels, "beats_pytorch_in_bfloat16", lambda: best_for_many)
    model = quantize(make_model(dtype=torch.bfloat16), "bf16")
    layer = model.language_model.model.layers[0].mlp.up_proj
    layer(torch.randn(1, 1, 128).bfloat16()), layer(torch.randn(1, 200, 128).bfloat16())
    assert called == ([(1, 1, 128), (1, 200, 128)] if best_for_many else [(1, 1, 128)])
    called.clear()
    with torch.enable_grad():
        layer(torch.randn(1, 1, 128).bfloat16())
    assert called == []  # the kernel knows no gradients


@needs_kernel
def test_avx2_takes_few_rows_and_leaves_many_to_float32(monkeypatch):
    """As many as it takes, in each of the three layers, and none of those that are more."""
    monkeypatch.setattr(library, "REQUESTED", "avx2")
    monkeypatch.setattr("paligemma.devices.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(devices, "has_dot_products", lambda: False)
    called, in_float32 = [], products.multiply_in_float32
    for name in ("linear_bf16", "linear_int8", "linear_int4"):
        real = getattr(linear_kernels, name)
        monkeypatch.setattr(linear_kernels, name, lambda x, *rest, real=real: called.append("kernel") or real(x, *rest))
    for user in (fast_layers, rounded_layers):
        noted = lambda *given: called.append("float32") or in_float32(*given)  # noqa: E731
        monkeypatch.setattr(user, "multiply_in_float32", noted)
    for mode in ("bf16", "int8", "int4"):
        layer = quantize(make_model(dtype=torch.bfloat16), mode).language_model.model.layers[0].mlp.up_proj
        for rows in (1, 16, 17):
            layer(torch.randn(1, rows, 128).bfloat16())
    assert called == ["kernel", "kernel", "float32"] * 3

    attention = quantize(make_model(dtype=torch.bfloat16), "bf16").language_model.model.layers[0].self_attn
    called.clear()
    real = linear_kernels.attention_bf16
    monkeypatch.setattr(linear_kernels, "attention_bf16", lambda q, *rest: called.append(q.shape[2]) or real(q, *rest))
    for queries in (1, 16, 17):
        q, k = torch.randn(1, 4, queries, 32).bfloat16(), torch.randn(1, 1, 40, 32).bfloat16()
        attention.attend(q, k, k, torch.ones(1, 1, queries, 40, dtype=torch.bool))
    assert called == [1, 16]


@pytest.mark.parametrize("rows", [1, 20])
def test_gradients_for_pictures_pass_through_rounded_weights(way, rows):
    """Weights are fixed, what they multiply is not. Activations in 8 bits would have no gradient, or next to none."""
    _, _, eight, four = layers()
    for layer, weight in ((eight, eight.weight * eight.scale[:, None]), (four, dense(four))):
        x = torch.randn(2, rows, 512, requires_grad=True)
        with torch.enable_grad():
            layer(x).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).float().expand(2, rows, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_model_that_ships_answers_mostly_the_same(way, mode):
    whole, small = (paligemma.load("tiny", device="cpu", quantize=q) for q in (None, mode))
    images = [render(seed, "test", 256).image for seed in range(40, 46)]
    prompts = ["caption en", "answer en what color is the background ?", "detect car"]
    same = total = 0
    for prompt in prompts:
        for a, b in zip(whole.generate(images, prompt, 40), small.generate(images, prompt, 40)):
            total += 1
            same += a.text.partition("<loc")[0] == b.text.partition("<loc")[0]
    assert total == 18 and same >= (17 if mode == "int8" else 14)


# ---------------------------------------------------------------------------------------------- on disk


@pytest.fixture(params=["int8", "int4"])
def mode(request):
    return request.param


@pytest.fixture
def source(tmp_path):
    """A checkpoint in bfloat16, in several files."""
    save_pretrained(make_model("gemma2", torch.bfloat16), tmp_path / "source", max_shard_size=200_000)
    assert len(list((tmp_path / "source").glob("model-*.safetensors"))) > 2
    return tmp_path / "source"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_at_load_and_in_place_are_the_same_model(source, mode, tmp_path):
    quantize_checkpoint(source, tmp_path / "small", mode, max_shard_size=150_000)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert stored_mode(tmp_path / "small") == mode and stored_mode(source) is None
    saved = open_quantized(tmp_path / "small").load()
    at_load = load_quantizing(open_checkpoint(source), mode)
    in_place = quantize(paligemma.weights.loading.load_model(source), mode)
    states = [model.state_dict() for model in (saved, at_load, in_place)]
    assert len({tuple(state) for state in map(sorted, states)}) == 1
    for name, tensor in states[0].items():
        assert all(torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype for state in states), name
    inputs = make_inputs(saved.config, prefix=[4, 6])
    logits = [model(**inputs).logits for model in (saved, at_load, in_place)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert not saved.training and saved.config == at_load.config


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_is_rounded_at_load_holds_one_file_open(source, mode):
    """And not one for each tensor that stays as it is. (A file in several parts is open several times.)"""
    files, before = len(list(source.glob("model-*.safetensors"))), set(os.listdir("/proc/self/fd"))
    model = load_quantizing(open_checkpoint(source), mode)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= files + 1, model.dtype


def test_it_is_as_small_as_it_says(tmp_path):
    size = {"whole": TINY}
    for mode in ("int8", "int4"):
        size[mode] = tmp_path / mode
        quantize_checkpoint(TINY, size[mode], mode)
    bytes_of = {name: (folder / "model.safetensors").stat().st_size for name, folder in size.items()}
    assert bytes_of["int8"] < 0.53 * bytes_of["whole"] and bytes_of["int4"] < 0.41 * bytes_of["whole"]
    assert (tmp_path / "int8" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def test_a_saved_one_is_loaded_by_its_path_and_stays_in_the_file(tmp_path, mode):
    quantize_checkpoint(TINY, tmp_path, mode)
    pg = paligemma.load(tmp_path, device="cpu")
    image = render(3, "test", 256).image
    assert pg.caption(image).text == paligemma.load("tiny", device="cpu", quantize=mode).caption(image).text
    weight = pg.model.language_model.model.layers[0].mlp.up_proj.weight
    if sys.platform == "linux":
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        places = [[int(end, 16) for end in line[0].split("-")] for line in maps if line[-1].startswith(str(tmp_path))]
        assert any(start <= weight.data_ptr() < end for start, end in places)


def test_other_sizes_and_dtypes_of_a_saved_one(tmp_path):
    quantize_checkpoint(TINY, tmp_path, "int8")
    model, _ = load_hf_model(tmp_path, "cpu", dtype="float32", image_size=160)
    assert model.dtype == torch.float32 and model.config.vision_config.num_patches == 100
    reference, _ = load_hf_model("tiny", "cpu", dtype="float32", quantize="int8", image_size=160)
    inputs = make_inputs(model.config, prefix=[3])
    assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    for wrong, message in {0: "image_size is 0, expected a positive whole", 16_000_000: "choose a smaller one"}.items():
        with pytest.raises(ValueError, match=message):
            load_hf_model(tmp_path, "cpu", image_size=wrong)


def test_from_big_visions_file(source, tmp_path):
    convert(source, tmp_path / "big" / "model.npz")
    quantize_checkpoint(tmp_path / "big" / "model.npz", tmp_path / "from_npz", "int8")
    quantize_checkpoint(source, tmp_path / "direct", "int8")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("from_npz", "direct"))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_failure_leaves_everything_as_it_was(source, tmp_path, monkeypatch):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int8")
    before = files(target)
    calls = []

    def fails_later(weight):
        calls.append(weight.shape)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return round_rows(weight)

    monkeypatch.setattr(swap, "round_rows", fails_later)
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, target, "int8")
    assert files(target) == before
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "new", "int8")
    assert not (tmp_path / "new").exists()


def test_another_checkpoint_is_not_replaced(source, tmp_path):
    convert(source, tmp_path / "there")
    before = files(tmp_path / "there")
    with pytest.raises(ValueError, match=r"there holds config.json of other content, which would be lost"):
        quantize_checkpoint(source, tmp_path / "there", "int8")
    assert files(tmp_path / "there") == before
    for _ in range(2):  # its own work may be done again
        written = quantize_checkpoint(source, tmp_path / "small", "int8")
        assert [path.name for path in written] == sorted(files(tmp_path / "small"))


def test_one_matrix_at_a_time(source, tmp_path, monkeypatch):
    """Each is read once, and none is kept when the next is read. What is rounded is in no map that stays."""
    checkpoint = open_checkpoint(source)
    rounded = {f"{name}.weight" for name in swap.rounded_kinds(empty_model(checkpoint.config), "int4")}
    real, alive, read = checkpoint.read, [], []

    def watched(name, mapped=False):
        import weakref

        assert sum(reference() is not None for reference in alive) <= 1
        assert not (mapped and name in rounded)
        tensor = real(name, mapped).clone()
        alive.append(weakref.ref(tensor))
        read.append(name)
        return tensor

    checkpoint.read = watched
    quantize_checkpoint(checkpoint, tmp_path / "small", "int4")
    assert sorted(read) == sorted(checkpoint.tensors)


# ---------------------------------------------------------------------------------------------- what is refused


def test_unknown_modes(source, tmp_path):
    for call in (lambda: quantize(make_model(), "int3"), lambda: load_hf_model("tiny", "cpu", quantize="int3")):
        with pytest.raises(ValueError, match="quantize is 'int3', expected one of bf16, int8, int4, bnb-int8, nf4"):
            call()
    for mode in ("bf16", "nf4", "int3"):
        with pytest.raises(ValueError, match=f"mode is '{mode}', expected int8 or int4"):
            quantize_checkpoint(source, tmp_path / "small", mode)
    assert not (tmp_path / "small").exists()


def test_another_device():
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(tiny_config("gemma"))
    with pytest.raises(ValueError, match="quantize='int8' is for the CPU, not for meta: use bnb-int8 or nf4 there"):
        quantize(model, "int8")


def test_twice(source, tmp_path, mode):
    model = quantize(make_model(), mode)
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int8")
    quantize_checkpoint(source, tmp_path / "small", mode)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_checkpoint(open_quantized(tmp_path / "small"), tmp_path / "smaller", "int4")
    with pytest.raises(ValueError, match="quantised"):
        quantize_checkpoint(tmp_path / "small", tmp_path / "smaller", "int4")
    with pytest.raises(ValueError, match="choose another folder"):
        quantize_checkpoint(source, source, mode)


def test_a_rounded_model_is_neither_saved_nor_converted(source, tmp_path, mode):
    with pytest.raises(ValueError, match="the model is quantised and is not saved"):
        save_pretrained(quantize(make_model(), mode), tmp_path / "saved")
    quantize_checkpoint(source, tmp_path / "small", mode)
    with pytest.raises(ValueError, match="holds quantised weights, which can be run but not changed"):
        convert(tmp_path / "small", tmp_path / "converted")
    assert not (tmp_path / "saved").exists() and not (tmp_path / "converted").exists()


def test_files_that_do_not_fit(source, tmp_path):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int8")
    layer = "language_model.model.layers.0.mlp.up_proj"
    tensors = load_file(target / "model.safetensors")

    def refused(match, **changes):
        changed = {**tensors, **{name.replace("/", "."): value for name, value in changes.items()}}
        save_file({n: t for n, t in changed.items() if t is not None}, target / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            open_quantized(target)

    refused(r"1 missing: .*up_proj\.scale", **{f"{layer}.scale": None})
    refused(r"1 unexpected: strange", strange=torch.zeros(1))
    refused(
        r"1 of another shape: .*up_proj\.weight is \[1, 128\]", **{f"{layer}.weight": tensors[f"{layer}.weight"][:1]}
    )
    refused(
        r"up_proj\.weight is torch\.uint8, expected torch\.int8",
        **{f"{layer}.weight": tensors[f"{layer}.weight"].byte()},
    )
    refused(r"up_proj\.scale is torch\.float64, expected", **{f"{layer}.scale": tensors[f"{layer}.scale"].double()})
    refused(r"not floating point|I64", **{f"{layer}.scale": tensors[f"{layer}.scale"].long()})
    (target / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_quantized(target)
    (target / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_hf_model(target, "cpu")


def test_settings_that_do_not_fit(source, tmp_path):
    target = tmp_path / "small"
    quantize_checkpoint(source, target, "int4")
    settings = json.loads((target / "config.json").read_text())
    assert settings["quantization_config"] == {"quant_method": "paligemma", "mode": "int4", "group_size": GROUP}

    def refused(match, **changes):
        changed = {**settings, "quantization_config": {**settings["quantization_config"], **changes}}
        (target / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            load_hf_model(target, "cpu")

    refused("quantised by 'bitsandbytes', whose format is not read here", quant_method="bitsandbytes")
    refused("mode 'int2'", mode="int2")
    refused("group_size 32", group_size=32)
    refused("mode .'int4'.", mode=["int4"])
    refused("of another shape: language_model", mode="int8")  # the files hold 4 bits
    (target / "config.json").write_text(json.dumps({**settings, "quantization_config": "int8"}))
    with pytest.raises(ValueError, match="quantised by 'int8'"):
        load_hf_model(target, "cpu")
    (target / "config.json").write_text(json.dumps({**settings, "hidden_size_of_text": 3, "model_type": "llava"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'llava'"):
        load_hf_model(target, "cpu")


def test_another_mode_than_the_files_hold(tmp_path):
    quantize_checkpoint(TINY, tmp_path, "int8")
    assert load_hf_model(tmp_path, "cpu", quantize="int8")[0].dtype == torch.bfloat16
    for other in ("int4", "nf4", "bf16"):
        with pytest.raises(ValueError, match=f"holds int8 weights, not {other}: leave out `quantize`"):
            load_hf_model(tmp_path, "cpu", quantize=other)


def test_bitsandbytes_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for mode in ("bnb-int8", "nf4"):
        with pytest.raises(ImportError, match=f"quantize='{mode}' needs bitsandbytes: pip install"):
            quantize(make_model(), mode)


@pytest.mark.parametrize(("mode", "most"), [("bnb-int8", 0.02), ("nf4", 0.4)])
def test_bitsandbytes(mode, most):
    pytest.importorskip("bitsandbytes")
    model = make_model(dtype=torch.bfloat16, vision_hidden_size=64, vision_intermediate_size=128)
    inputs = make_inputs(model.config, prefix=[6, 9])
    before = model(**inputs).logits
    quantize(model, mode)
    assert 0 < kl(model(**inputs).logits, before) < most
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, "int8")


# ---------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path):
    runner = CliRunner()
    for options in ([], ["--int8", "--int4"]):
        result = runner.invoke(app, ["quantize", "tiny", str(tmp_path / "small"), *options])
        assert result.exit_code == 2 and "choose one of --int8 and --int4" in result.output
    result = runner.invoke(app, ["quantize", "tiny", str(tmp_path / "small"), "--int4"])
    assert result.exit_code == 0 and result.stdout == ""
    assert stored_mode(tmp_path / "small") == "int4"
    render_to = tmp_path / "scene.png"
    paligemma.load_image(render(5, "test", 256).image).save(render_to)
    result = runner.invoke(app, ["run", "caption en", str(render_to), "-m", str(tmp_path / "small")])
    assert result.exit_code == 0 and result.stdout.endswith("background\n")
