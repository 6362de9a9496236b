"""The compiled kernels against plain arithmetic.

Sums of 8-bit products are exact: a float32 result is equal to the bit if nothing was clipped. A bfloat16 result is a
sum of float32 numbers in some order, and stays within the bound for such sums.
"""

import ctypes
import math
import mmap
import multiprocessing
import sys

import pytest
import torch
from ways import elsewhere, use

from paligemma.fast import kernels as linear_kernels
from paligemma.fast.rounding import GROUP, round_activations, round_groups, round_rows, unpack
from paligemma.modeling_gemma import apply_rotary, rotary_tables

pytestmark = pytest.mark.usefixtures("without_gradients")


def shapes():
    """Tiles of the kernels are 6 x 4 with vectors of 32, 64 and 128 inputs: whole ones, and every kind of edge."""
    return [(1, 8, 128), (2, 5, 256), (3, 1, 128), (4, 33, 384), (5, 3, 640), (6, 4, 128), (7, 18, 256)]


def panels():
    """Many rows: panels of 64 outputs, 256, 1024 or 2048 inputs deep. Whole ones, parts of one, one more than one."""
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
def test_few_rows_and_many_are_equal_to_the_bit_whatever_is_clipped():
    """Some columns a hundred times larger than the rest, one of them at either end, and numbers of single rows."""
    x = torch.randn(61, 640)
    x[:, [0, 7, 255, 256, 639]] *= 100
    x[torch.arange(61), torch.arange(61) * 10] = 200
    assert round_activations(x)[2] is not None
    in_8_bits, in_4_bits = round_rows(torch.randn(70, 640)), round_groups(torch.randn(70, 640))
    for linear, weight in ((linear_kernels.linear_int8, in_8_bits), (linear_kernels.linear_int4, in_4_bits)):
        assert torch.equal(linear(x, *weight), torch.cat([linear(row, *weight) for row in x.split(3)]))


@pytest.mark.usefixtures("kernels")
def test_two_threads_compute_what_one_does():
    """Panels, sums and scores belong to one thread each. All other tests run with one thread."""
    x, weight = torch.randn(61, 1024), torch.randn(640, 1024)
    x[torch.arange(61), torch.arange(61) * 10] = 200  # outliers
    in_8_bits, in_4_bits = round_rows(weight), round_groups(weight)
    q, k, v = (torch.randn(2, heads, 60, 32).bfloat16() for heads in (8, 2, 2))

    def results() -> list[torch.Tensor]:
        products = [linear_kernels.linear_bf16(rows.bfloat16(), weight.bfloat16()) for rows in (x, x[:3])]
        products += [linear_kernels.linear_int8(rows, *in_8_bits) for rows in (x, x[:3])]
        products += [linear_kernels.linear_int4(rows, *in_4_bits) for rows in (x, x[:3])]
        return [*products, linear_kernels.attention_bf16(q, k, v, None, 0.2, 20.0)]

    alone, threads = results(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = [results() for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for found in together:
        assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))


@pytest.mark.usefixtures("kernels")
def test_steps_that_no_file_should_hold_read_no_memory_that_is_not_theirs():
    weight, steps = torch.full((4, 64), 0x0F, dtype=torch.uint8), torch.tensor([[-128, 127]] * 4, dtype=torch.int8)
    for M in (1, 60):
        y = linear_kernels.linear_int4(torch.ones(M, 128), weight, steps, torch.ones(4))
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


@pytest.mark.usefixtures("kernels")
def test_a_refusal_names_what_does_not_fit():
    q, seen = torch.randn(1, 4, 3, 8).bfloat16(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    weight, scale = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    for wrong, said in (
        (lambda: linear_kernels.linear_int8(q, weight.float(), scale), r"and a weight torch.float32 \[4, 8\]"),
        (lambda: linear_kernels.linear_int8(q, weight, scale, torch.ones(5)), r"and a bias torch.bfloat16 \[5\]"),
        (
            lambda: linear_kernels.linear_int8(q, weight, scale.bfloat16()),
            "a scale torch.bfloat16, expected torch.float32",
        ),
        (lambda: linear_kernels.attention_bf16(q, q, q, seen.int(), 1.0), "and a mask torch.int32"),
        (lambda: linear_kernels.attention_bf16(q, q[:, :3], q, seen, 1.0), r"and keys torch.bfloat16 \[1, 3, 3, 8\]"),
        (lambda: linear_kernels.rotary_bf16(q, q[:, :1], q[:, :1]), "and cosines torch.bfloat16"),
        (lambda: linear_kernels.gelu_bf16(q, q.float()), "and a factor torch.float32"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


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
    linear_kernels._gelu_table.cache_clear()
    with torch.device("meta"):  # where new tensors are wanted is not where results belong
        assert linear_kernels.linear_int8(x, weight, scale).is_cpu
        assert linear_kernels.attention_bf16(q, q, q, None, 1.0).is_cpu
        assert torch.equal(linear_kernels.gelu_bf16(q), torch.nn.functional.gelu(q, approximate="tanh"))


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

    for M, K in ((1, 1), (2, 17), (3, 63), (1, 269), (5, 300), (50, 63)):
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
