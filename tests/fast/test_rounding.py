"""Rounding weights and activations: which numbers come out, and by how much they are off."""

import pytest
import torch
from ways import dense, relative

from paligemma.fast.rounded_layers import Int4Linear
from paligemma.fast.rounding import GROUP, round_activations, round_groups, round_rows, unpack

pytestmark = pytest.mark.usefixtures("without_gradients")


def test_8_bits_are_off_by_half_a_step_at_most():
    weight = torch.randn(7, 50) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    rounded, scale = round_rows(weight)
    assert rounded.dtype == torch.int8 and rounded.abs().amax(-1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((rounded * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()
    torch.testing.assert_close(scale, weight.abs().amax(-1) / 127)


def test_rounded_weights_lie_where_the_weight_does():
    """Wherever new tensors are wanted meanwhile."""
    weight = torch.randn(5, 256)
    for rounding in (round_rows, round_groups):
        expected = rounding(weight)
        with torch.device("meta"):
            found = rounding(weight)
        assert all(torch.equal(*pair) for pair in zip(found, expected))


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_holds_no_number_gets_no_scale_and_harms_no_other(value):
    x = torch.randn(2, 64)
    x[1, 5] = value
    _, scale, _ = round_activations(x)
    assert scale[0].isfinite() and scale[1].isnan()
