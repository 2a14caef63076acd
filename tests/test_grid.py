import re

import numpy as np
import pytest
import torch

from quant import Grid, fake_quantize_weight, weight_scale
from quant.grid import activation_quant_max, fake_quantize, quantize, snap, weight_scales

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_up_to_ties(bits):
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(bits))
    quant_max = Grid(bits).quant_max
    scale = weight_scale(weight, bits)
    ours = fake_quantize_weight(weight, bits)
    theirs = torch.fake_quantize_per_tensor_affine(weight, scale.item(), 0, -quant_max, quant_max)
    steps = weight / scale
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.allclose(ours[~near_tie], theirs[~near_tie], rtol=1e-6, atol=0)
    assert near_tie.float().mean() < 1e-3


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_of_several_weights_are_those_of_each(bits, per_channel):
    shapes = [(8, 3, 3, 3), (5, 8), (5,), (4, 4, 1, 1)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(bits)) for shape in shapes]
    weights[0][2] = 0
    weights[3].zero_()
    for weight, scale in zip(weights, weight_scales(weights, bits, per_channel), strict=True):
        assert torch.equal(weight / scale, weight / weight_scale(weight, Grid(bits, per_channel=per_channel)))


def test_a_scale_for_each_element():
    weight = torch.tensor([[1.0, -2.0, 0.0], [4.0, 0.5, -0.25]])
    expected = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.5, 0.25]]) / 3  # zero has scale 1
    assert torch.equal(weight_scale(weight, Grid(3, scale_dims=(0, 1))), expected)
    for scale in weight_scales([weight, weight], 3, scale_dims=(0, 1)):
        assert torch.equal(scale, expected)


@pytest.mark.parametrize("bits", BITS)
def test_per_channel_agrees_with_torch_up_to_ties(bits):
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(bits))
    quant_max = Grid(bits).quant_max
    scale = weight_scale(weight, Grid(bits, per_channel=True))
    assert scale.shape == (16, 1, 1, 1)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale.flatten(), torch.zeros(16), 0, -quant_max, quant_max)
    steps = weight / scale
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    ours = fake_quantize_weight(weight, Grid(bits, per_channel=True))
    assert torch.allclose(ours[~near_tie], theirs[~near_tie], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_points_error_and_idempotence(bits, dtype):
    weight = torch.randn(5000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(weight, bits)
    quantized = fake_quantize_weight(weight, bits)
    integers = quantize(weight, scale, -Grid(bits).quant_max, Grid(bits).quant_max)
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() == Grid(bits).quant_max
    assert torch.equal(quantized, integers * scale)
    assert (weight - quantized).abs().max() <= scale / 2 * (1 + 1e-6)
    assert torch.allclose(fake_quantize_weight(quantized, bits), quantized, rtol=1e-6, atol=0)


def test_two_bits_are_ternary():
    weight = torch.tensor([-1.0, -0.6, -0.4, 0.0, 0.49, 0.51, 0.9])
    assert fake_quantize_weight(weight, 2).tolist() == [-1, -1, 0, 0, 0, 1, 1]


def test_ties_are_decided_by_division_and_round_to_even():
    # 0.5 steps round to 0, 1.5 to 2; with scale 3 at 3 bits, max 9.
    assert fake_quantize_weight(torch.tensor([9.0, 1.5, 4.5]), 3).tolist() == [9.0, 0.0, 6.0]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 0)])
def test_odd_shapes(shape):
    assert fake_quantize_weight(torch.ones(shape), 4).shape == shape


def test_zeros_stay_zeros():
    assert torch.equal(fake_quantize_weight(torch.zeros(4, 3), 4), torch.zeros(4, 3))
    weight = torch.tensor([[0.0, 0.0], [0.3, -1.0]])
    per_channel = fake_quantize_weight(weight, Grid(4, per_channel=True))
    assert torch.equal(per_channel[0], weight[0]) and per_channel.isfinite().all()


def test_straight_through_gradient():
    weight = torch.randn(50, requires_grad=True)
    fake_quantize_weight(weight, 4).mul(torch.arange(50.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(50.0))


def test_gradient_stops_outside_the_range():
    x = torch.tensor([-1.0, -0.04, 0.5, 1.0, 1.04, 2.0], requires_grad=True)
    scale = torch.tensor(0.1)
    out = fake_quantize(x, scale, 0, 10)
    out.sum().backward()
    assert torch.allclose(out, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0]))
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_activation_levels():
    x = torch.linspace(0, 6, 10_000)
    quant_max = activation_quant_max(3)
    assert fake_quantize(x, torch.tensor(6 / quant_max), 0, quant_max).unique().numel() == 8


@pytest.mark.parametrize("bits", [0, 1, 9, 33, -4, 4.0, 4.5, 32.0, True, None, "4", torch.tensor(4)])
def test_bits_out_of_range(bits):
    for make in (Grid, lambda bits: fake_quantize_weight(torch.ones(3), bits)):
        with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 8, got {re.escape(repr(bits))}"):
            make(bits)


def test_full_precision_has_no_grid():
    assert Grid(32).is_float and not Grid(8).is_float
    for function in (weight_scale, fake_quantize_weight, snap):
        with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, got 32"):
            function(torch.ones(3), 32)


@pytest.mark.parametrize("setting", [{"first_last": 1}, {"per_channel": "channel"}, {"weight_range": "x"}])
def test_grid_is_checked_when_it_is_made(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        Grid(4, **setting)


def test_grid_is_frozen_and_takes_any_whole_number():
    grid = Grid(np.int64(4))
    assert grid == Grid(4) and type(grid.bits) is int and len({grid, Grid(4)}) == 1
    with pytest.raises(AttributeError):
        grid.bits = 3


def test_old_keywords_end():
    with pytest.raises(TypeError, match="unexpected keyword argument 'per_channel'"):
        fake_quantize_weight(torch.ones(3), 4, **{"per_channel": True})


@pytest.mark.parametrize("weight_range", ["absmax", "mse"])
def test_snap_gives_the_points_and_their_step(weight_range):
    weight, grid = torch.randn(6, 5), Grid(3, per_channel=True, weight_range=weight_range)
    nearest, scale = snap(weight, grid)
    assert torch.equal(scale, weight_scale(weight, grid)) and torch.equal(nearest, fake_quantize_weight(weight, grid))
    assert torch.equal(nearest, (nearest / scale).round() * scale)


@pytest.mark.parametrize("per_channel", [False, True])
def test_mse_range_is_the_best_of_its_candidates(per_channel):
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    weight[2, 3] = 40  # an outlier: its channel, or all, is better off without it
    quant_max = 7
    absmax, best = (
        weight_scale(weight, Grid(4, per_channel=per_channel, weight_range=kind)) for kind in ("absmax", "mse")
    )

    def errors(scale):
        error = (fake_quantize(weight, scale, -quant_max, quant_max) - weight).square()
        return error.sum(1, keepdim=True) if per_channel else error.sum()

    candidates = torch.stack([errors(absmax * part / 100) for part in range(1, 101)])
    assert torch.allclose(errors(best), candidates.min(0).values, rtol=1e-5)
    assert best.shape == absmax.shape and (best <= absmax).all() and (best < absmax).any()
    quantized = fake_quantize_weight(weight, Grid(4, per_channel=per_channel, weight_range="mse"))
    assert torch.equal(quantized, fake_quantize(weight, best, -quant_max, quant_max))


def test_unknown_weight_range():
    with pytest.raises(ValueError, match="weight_range must be one of absmax, mse, got 'max'"):
        weight_scale(torch.ones(3), Grid(4, weight_range="max"))


def test_a_scale_that_vanishes_in_float16_is_one():
    """Of a channel that is as good as zero, whether the weight is the only one of its group or not."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).half()
    weight[1] *= 1e-7
    for weights in ([weight], [weight, weight]):
        for scale in weight_scales(weights, 8, per_channel=True):
            assert scale.dtype == torch.float16 and scale[1] == 1 and (scale[0] < 0.1).all()
