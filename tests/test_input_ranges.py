"""Which inputs are quantized, their ranges, and the noise of the layers."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from quant import Grid, calibrate, layer_sqnr, quantize_activations, quantize_weights
from quant.inputs import InputRange, input_layers
from quant.quantizers import InputQuantizer


def quantizers(net):
    return [name for name, module in net.named_modules() if isinstance(module, InputQuantizer)]


def test_attention_has_a_quantizer_for_its_inputs_and_one_for_its_projection():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    net = nn.ModuleDict({"attention": attention})
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    ranges = {"attention": InputRange(-3.0, 3.0), "attention.out_proj": InputRange(-0.5, 0.5, is_called=False)}
    quantized = quantize_activations(net, 4, ranges)["attention"]
    inner = quantized.input_quantizer
    for query, key in ((x, x), (x, memory)):
        with torch.no_grad():
            output, shares = quantized(query, key, value=key)
            # The twin: attention whose projection is an identity, then the projection of the quantized result.
            plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
            plain.load_state_dict(attention.state_dict())
            plain.out_proj.weight.copy_(torch.eye(8))
            plain.out_proj.bias.zero_()
            mixed, expected_shares = plain(inner(query), inner(key), inner(key))
            expected = attention.out_proj(quantized.out_proj.input_quantizer(mixed))
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(shares, expected_shares)
        assert (output - attention(query, key, key)[0]).abs().max() > 0.01


def test_transformer_layers_leave_their_fast_path():
    """In eval mode without gradients torch runs these layers in one kernel, which would skip the quantizers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, images = nn.TransformerEncoder(layer, 2).eval(), torch.randn(4, 5, 16)
    quantized = quantize_activations(net, 3, calibrate(net, [images], 3, at="inputs"))
    assert len(quantizers(quantized)) == len(input_layers(net, 8)) >= 6
    by_modules = quantized(images)  # with gradients, module by module
    padding = torch.tensor([[False] * 5] * 3 + [[False] * 3 + [True] * 2])
    with torch.no_grad():
        torch.testing.assert_close(quantized(images), by_modules)
        torch.testing.assert_close(quantized(images, src_key_padding_mask=padding)[:3], by_modules[:3])
        assert (by_modules - net(images)).abs().max() > 0.05


class Language(nn.Module):
    """Token ids, an embedding whose weight the last layer shares, and two names for one weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.again = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight, self.again.weight = self.embedding.weight, self.hidden.weight

    def forward(self, ids):
        return {"logits": self.head(self.again(functional.gelu(self.hidden(self.embedding(ids)))))}


def test_token_ids_and_shared_weights():
    torch.manual_seed(0)
    net, ids = Language().eval(), torch.randint(0, 11, (4, 7))
    assert ids.dtype == torch.int64
    quantized = quantize_activations(net, 8, calibrate(net, [ids], 8, at="inputs"))
    assert quantizers(quantized) == [f"{name}.input_quantizer" for name in ("hidden", "again", "head")]
    noise = layer_sqnr(net, quantized, [ids])
    assert list(noise) == ["hidden", "again", "head", ""] and min(noise.values()) > 30


def test_a_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    net, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 50, (4, 16))
    quantized = quantize_activations(net, 8, calibrate(net, [ids], 8, at="inputs"))
    assert quantizers(quantized) == [f"{name}.input_quantizer" for name in input_layers(net, 8)]
    noise = layer_sqnr(net, quantized, [ids])
    assert set(noise) == {*input_layers(net, 8), ""} and min(noise.values()) > 20


class Functions(nn.Module):
    """Weights that go to functions: F.linear, with the layer's bias, without it or with another, and a product."""

    def __init__(self):
        super().__init__()
        self.plain, self.without, self.other, self.hidden = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = functional.linear(x, self.plain.weight, self.plain.bias).relu()
        x = functional.linear(input=x, weight=self.without.weight).relu()
        x = functional.linear(x, self.other.weight, bias=self.other.bias + 1)
        return x @ self.hidden.weight.t()


def test_weights_that_are_given_to_functions():
    torch.manual_seed(0)
    net, x = Functions().eval(), torch.randn(64, 4)
    with pytest.warns(UserWarning, match="the inputs of without, hidden stay float: no hook reaches them"):
        ranges = calibrate(net, [x], 8, "minmax", at="inputs")
    assert list(ranges) == ["plain", "other"]
    quantized = quantize_activations(net, 8, ranges)
    first, second = (quantized.get_submodule(name).input_quantizer for name in ranges)
    with torch.no_grad():
        y = functional.linear(net.plain(first(x)).relu(), net.without.weight).relu()
        expected = (net.other(second(y)) + 1) @ net.hidden.weight.t()
        torch.testing.assert_close(quantized(x), expected)
    assert "forward" not in vars(net)


class Pooling(nn.Module):
    """Attention whose last projection has another number of outputs, as the one that pools CLIP's features."""

    def __init__(self, outputs):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.project = nn.Linear(8, outputs)

    def forward(self, x):  # [places, images, 8]
        biases = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        return functional.multi_head_attention_forward(
            x[:1], x, x, 8, 2, None, biases, None, None, False, 0.0, self.project.weight, self.project.bias,
            use_separate_proj_weight=True, training=self.training, need_weights=False,
            q_proj_weight=self.query.weight, k_proj_weight=self.key.weight, v_proj_weight=self.value.weight,
        )[0]  # fmt: skip


@pytest.mark.parametrize("outputs", [4, 8, 16])
def test_a_projection_need_not_be_square(outputs):
    torch.manual_seed(0)
    net, x = Pooling(outputs).eval(), torch.randn(5, 3, 8)
    with pytest.warns(UserWarning, match="the inputs of query, key, value stay float"):
        ranges = calibrate(net, [x], 8, "minmax", at="inputs")
    assert list(ranges) == ["project"]
    difference = quantize_activations(net, 8, ranges)(x) - net(x)
    assert 0 < difference.abs().max() < 0.02 * net(x).abs().max()


def test_a_layer_that_is_never_called_is_named(net):
    net.auxiliary = nn.Linear(8, 3)
    with pytest.warns(UserWarning, match="the inputs of auxiliary stay float"):
        ranges = calibrate(net, [torch.randn(2, 3, 8, 8)], 8, at="inputs")
    assert list(ranges) == ["conv1", "conv2", "fc"]


@pytest.fixture
def values():
    """Inputs as after GELU: a small negative side, and one outlier."""
    torch.manual_seed(0)
    x = functional.gelu(torch.randn(100, 1000))
    x[3, 7] = 12
    return x


def last_range(values, bits, rule, percentile=99.99):
    """Of the middle one of three layers, which hand their input on."""
    net = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(3)))
    for layer in net:
        nn.init.eye_(layer.weight)
    return calibrate(net, values.split(30), bits, rule, percentile, at="inputs")["1"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_range_is_the_best_on_the_values_themselves(values, bits):
    low, high, *_ = last_range(values, bits, "mse")

    def error(part):
        quantizer = InputQuantizer(bits, values.min().item() * part, values.max().item() * part)
        return (quantizer(values) - values).square().mean().item()

    part = high / values.max().item()
    assert low / values.min().item() == pytest.approx(part)
    best = min(error(part / 100) for part in range(1, 101))
    assert error(part) == pytest.approx(best, rel=0.05) and error(part) < error(1.0)


@pytest.mark.parametrize("percentile", [90, 99.9, 100])
def test_percentile_cuts_both_sides(values, percentile):
    low, high, is_end, is_called = last_range(values, 4, "percentile", percentile)
    step = (12 - values.min().item()) / 2048
    sides = torch.tensor([100 - percentile, percentile], dtype=torch.float64) / 100
    expected = torch.quantile(values.flatten().double(), sides).tolist()
    assert [low, high] == pytest.approx(expected, abs=1.01 * step) and not is_end and is_called
    assert last_range(values.relu(), 4, "percentile", percentile)[0] == 0.0


def test_minmax_is_the_range(values):
    assert last_range(values, 4, "minmax") == pytest.approx((values.min().item(), 12.0, False, True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(net, value):
    images = torch.randn(2, 3, 8, 8)
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="the input of conv1 reaches .*: its range cannot be calibrated"):
        calibrate(net, [images], 8, at="inputs")


def test_wrong_calls(net):
    images = torch.randn(2, 3, 8, 8)
    ranges = calibrate(net, [images], 8, at="inputs")
    with pytest.raises(ValueError, match="at must be one of relu, inputs, got 'input'"):
        calibrate(net, [images], 8, at="input")
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(net, [], 8, at="inputs")
    with pytest.raises(ValueError, match="ReLUs or those of inputs, got both"):
        quantize_activations(net, 8, ranges | {"relu1": 1.0})
    with pytest.raises(ValueError, match="SmallNet has no layer conv9"):
        quantize_activations(net, 8, {"conv9": ranges["conv1"]}, inplace=True)
    ends = {name: own for name, own in ranges.items() if own.is_end}  # whose bits do not depend on those asked for
    for given in (ranges, ends):
        with pytest.raises(ValueError, match="bits must be a whole number"):
            quantize_activations(net, 9, given, inplace=True)
    with pytest.raises(ValueError, match="SmallNet has no ReLU conv1, for which a range is given"):
        quantize_activations(net, 8, {"relu1": 1.0, "conv1": 1.0})
    for percentile in (0.9999, 50, 150, math.nan):
        with pytest.raises(ValueError, match="percentile must be above 50 and at most 100 .percent, not a fraction"):
            calibrate(net, [images], 8, "percentile", percentile)
    assert not quantizers(net)
    quantized = quantize_activations(net, 8, ranges)
    for again in (ranges, {"relu1": 1.0}):
        with pytest.raises(ValueError, match="activation quantizers already, such as conv1.input_quantizer"):
            quantize_activations(quantized, 8, again)
    with pytest.raises(ValueError, match="activation quantizers already, such as conv1.input_quantizer"):
        calibrate(quantized, [images], 8, at="inputs")


def test_calibration_leaves_the_network_as_it_was(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    calibrate(net, [(torch.randn(4, 3, 8, 8), torch.zeros(4))], 8, at="inputs")
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_noise_by_hand():
    """Outputs of 3 and 4 become 3.5 and 4: the signal is 25, the noise 0.25."""
    net, other = (nn.Sequential(nn.Linear(1, 2), nn.Identity()) for _ in range(2))
    with torch.no_grad():
        for layer, last in ((net[0], 3.0), (other[0], 3.5)):
            layer.weight.copy_(torch.tensor([[last], [4.0]]))
            layer.bias.zero_()
    batches = [torch.ones(1, 1), (torch.full((2, 1), 2.0), "labels")]
    assert layer_sqnr(net, other, batches) == pytest.approx({"0": 20.0, "": 20.0})
    assert layer_sqnr(net, net, batches) == {"0": math.inf, "": math.inf}
    with pytest.raises(ValueError, match="at least one batch"):
        layer_sqnr(net, other, [])
    other.forward = lambda x: x
    with pytest.raises(ValueError, match="the layers that run in the quantized network"):
        layer_sqnr(net, other, batches)


def test_noise_grows_with_fewer_bits(net):
    images = torch.randn(8, 3, 8, 8)
    ranges = calibrate(net, [images], 8, at="inputs")
    noise = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bits in (8, 4):
            noise[bits] = layer_sqnr(net, quantize_activations(quantize_weights(net, bits), bits, ranges), [images])
    assert list(noise[8]) == ["conv1", "conv2", "fc", ""]
    assert all(noise[8][name] > noise[4][name] + 10 for name in noise[8])


class Recurrent(nn.Module):
    def __init__(self, with_output):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 4)
        self.out = nn.Linear(4, 3) if with_output else nn.Identity()

    def forward(self, x):
        return self.out(self.lstm(self.embed(x))[0])


def test_inputs_of_what_include_adds_stay_float():
    grid = Grid(4, include=[nn.LSTM, nn.Embedding])
    tokens = torch.randint(9, (5, 2))
    with pytest.warns(UserWarning, match=r"the inputs of lstm\.weight_ih_l0, lstm\.weight_hh_l0 stay float: no hook"):
        assert list(calibrate(Recurrent(True), [tokens], 8, at="inputs", grid=grid)) == ["out"]
    with (
        pytest.warns(UserWarning, match="stay float"),
        pytest.raises(ValueError, match="no hook reaches the inputs of"),
    ):
        calibrate(Recurrent(False), [tokens], 8, at="inputs", grid=grid)
