import pytest
import torch

from quant import fake_quantize, fake_quantize_weight, quantize, weight_scale
from quant.grid import activation_quant_max, weight_quant_max, weight_scales

BITS = range(2, 9)


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_torch_up_to_ties(bits):
    weight = torch.randn(200_000, generator=torch.Generator().manual_seed(bits))
    quant_max = weight_quant_max(bits)
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
        assert torch.equal(weight / scale, weight / weight_scale(weight, bits, per_channel))


@pytest.mark.parametrize("bits", BITS)
def test_per_channel_agrees_with_torch_up_to_ties(bits):
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(bits))
    quant_max = weight_quant_max(bits)
    scale = weight_scale(weight, bits, per_channel=True)
    assert scale.shape == (16, 1, 1, 1)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale.flatten(), torch.zeros(16), 0, -quant_max, quant_max)
    steps = weight / scale
    near_tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    ours = fake_quantize_weight(weight, bits, per_channel=True)
    assert torch.allclose(ours[~near_tie], theirs[~near_tie], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grid_points_error_and_idempotence(bits, dtype):
    weight = torch.randn(5000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    scale = weight_scale(weight, bits)
    quantized = fake_quantize_weight(weight, bits)
    integers = quantize(weight, scale, -weight_quant_max(bits), weight_quant_max(bits))
    assert torch.equal(integers, integers.round())
    assert integers.abs().max() == weight_quant_max(bits)
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
    per_channel = fake_quantize_weight(weight, 4, per_channel=True)
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


@pytest.mark.parametrize("bits", [0, 1, 9, 32, -4, 4.5, True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8"):
        fake_quantize_weight(torch.ones(3), bits)


@pytest.mark.parametrize("per_channel", [False, True])
def test_mse_range_is_the_best_of_its_candidates(per_channel):
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    weight[2, 3] = 40  # an outlier: its channel, or all, is better off without it
    quant_max = 7
    absmax, best = (weight_scale(weight, 4, per_channel, kind) for kind in ("absmax", "mse"))

    def errors(scale):
        error = (fake_quantize(weight, scale, -quant_max, quant_max) - weight).square()
        return error.sum(1, keepdim=True) if per_channel else error.sum()

    candidates = torch.stack([errors(absmax * part / 100) for part in range(1, 101)])
    assert torch.allclose(errors(best), candidates.min(0).values, rtol=1e-5)
    assert best.shape == absmax.shape and (best <= absmax).all() and (best < absmax).any()
    quantized = fake_quantize_weight(weight, 4, per_channel, "mse")
    assert torch.equal(quantized, fake_quantize(weight, best, -quant_max, quant_max))


def test_unknown_weight_range():
    with pytest.raises(ValueError, match="weight_range must be one of absmax, mse, got 'max'"):
        weight_scale(torch.ones(3), 4, weight_range="max")
