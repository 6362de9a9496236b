"""Linear layers in 8 and 4 bits, in every way to compute them."""

import itertools
import math

import pytest
import torch
from ways import dense, layers, relative

from paligemma import devices
from paligemma.fast import library

pytestmark = pytest.mark.usefixtures("without_gradients")


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


def test_results_lie_where_the_input_does(way):
    """Wherever new tensors are wanted meanwhile."""
    _, _, eight, four = layers()
    for layer, x in itertools.product((eight, four), (torch.randn(1, 512), torch.randn(60, 512))):
        expected = layer(x)
        with torch.device("meta"):
            assert torch.equal(layer(x), expected)


def test_other_weights_that_are_loaded_are_those_that_are_used(way):
    """Also where a copy of the weights in another order was kept."""
    *_, eight, four = layers()
    *_, other_eight, other_four = layers()
    x = torch.randn(3, 512)
    for layer, other in ((eight, other_eight), (four, other_four)):
        assert not torch.equal(layer(x), other(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))


@pytest.mark.skipif(not devices.has_dot_products(), reason="another plain path")
@pytest.mark.usefixtures("kernels")
def test_both_ways_are_equal_to_the_bit_where_nothing_is_clipped(monkeypatch):
    _, _, eight, _ = layers()
    x = torch.rand(60, 512) - 0.5
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


@pytest.mark.parametrize("rows", [1, 20])
def test_gradients_for_pictures_pass_through_rounded_weights(way, rows):
    """Weights are fixed, what they multiply is not. Activations in 8 bits would have no gradient, or next to none."""
    _, _, eight, four = layers()
    for layer, weight in ((eight, eight.weight * eight.scale[:, None]), (four, dense(four))):
        x = torch.randn(2, rows, 512, requires_grad=True)
        with torch.enable_grad():
            layer(x).sum().backward()
        torch.testing.assert_close(x.grad, weight.sum(0).float().expand(2, rows, -1), rtol=1e-4, atol=1e-3)
