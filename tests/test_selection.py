"""`Grid(include=..., exclude=...)`, and what a user is told about parameters that stay in float."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from models import ResNet32, vgg16_bn
from quant import (
    Grid,
    correct_bias,
    describe,
    export,
    fake_quantize_weight,
    grid_share,
    layer_grids,
    layer_rows,
    load_packed,
    packed_bytes,
    psg_param_groups,
    quantize_weights,
    weight_mse,
    weight_scale,
)
from quant.deploy import integer_weights
from tests.helpers import SmallNet

LEFT = {"conv1.weight", "fc.weight", "fc.bias"}


class Words(nn.Module):
    """Embeddings larger than 1 % of the parameters, of which one may be tied to the head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.norm, self.body, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 20)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.body(self.norm(self.words(x) + self.places)))


@pytest.mark.parametrize(
    "exclude",
    ["conv2", "conv2.weight", "*2.w*", ("conv2", "bn*"), [nn.BatchNorm2d, "conv2"]],
)
def test_what_is_excluded_stays_in_float_everywhere(tmp_path, net, exclude):
    grid, images = Grid(4, exclude=exclude), torch.randn(8, 3, 8, 8)
    before, without = copy.deepcopy(net.state_dict()), copy.deepcopy(net)
    without.conv2 = nn.Identity()  # which leaves the same layers
    assert set(layer_grids(net, grid)) == LEFT
    quantized = quantize_weights(net, grid)
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, fake_quantize_weight(before[name], 4) if name in LEFT else before[name]), name
    scaled = {id(p) for group in psg_param_groups(net, grid) if "bits" in group for p in group["params"]}
    assert scaled == {id(net.get_parameter(name)) for name in LEFT}
    for figure in (grid_share, weight_mse):
        assert figure(net, grid) == figure(without, 4)
    assert packed_bytes(net, grid) == packed_bytes(without, 4) + 4 * (8 * 8 * 9 + 8)
    assert [row["layer"] for row, _ in layer_rows(net, [images], grid)] == ["conv1", "fc"]
    assert set(integer_weights(net, grid)) == LEFT
    export(net, tmp_path / "a.safetensors", grid)
    loaded = load_packed(tmp_path / "a.safetensors", SmallNet()).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in quantized.state_dict().items())
    rows = {row.name: (row.bits, row.reason) for row in describe(net, grid).rows}
    assert rows["conv2.weight"] == (32, "excluded")


def test_a_class_or_a_module_stands_for_all_that_is_in_it():
    net = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4))
    ends = ["0.weight", "0.bias", "2.weight", "2.bias"]
    for exclude in ("1", nn.TransformerEncoderLayer, "1.*"):
        assert list(layer_grids(net, Grid(4, exclude=exclude))) == ends
    attention = set(layer_grids(net, 4)) - set(layer_grids(net, Grid(4, exclude=nn.MultiheadAttention)))
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    assert attention == {f"1.self_attn.{name}" for name in names}


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
@pytest.mark.parametrize("include", ["words", "words.weight", nn.Embedding, (nn.Embedding, "body")])
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_is_included_is_quantized_with_a_grid_of_the_bits_asked_for(include, per_channel):
    net = Words()
    grid = Grid(3, include=include, per_channel=per_channel)
    grids = layer_grids(net, grid)
    assert {name: own.bits for name, own in grids.items()} == {
        "words.weight": 3, "body.weight": 8, "body.bias": 8, "head.weight": 8, "head.bias": 8,
    }  # fmt: skip
    expected = fake_quantize_weight(net.words.weight, Grid(3, per_channel=per_channel))
    assert torch.equal(quantize_weights(net, Grid(3, include=include, per_channel=per_channel)).words.weight, expected)
    assert [id(net.words.weight)] == [id(p) for group in psg_param_groups(net, grid) if group.get("bits") == 3
                                      for p in group["params"]]  # fmt: skip
    extra = packed_bytes(net, grid) - packed_bytes(net, Grid(3, per_channel=per_channel))
    assert extra == 20 * 8 * 3 // 8 + 4 * (20 if per_channel else 1)
    assert packed_bytes(net, Grid(32, include=include)) == packed_bytes(net, 32) + 4 * 20 * 8


def test_exclude_prevails_and_any_name_of_a_shared_parameter_counts():
    net = Words(tied=True)
    body = ["body.weight", "body.bias"]
    assert list(layer_grids(net, Grid(4, include=nn.Embedding, exclude="words"))) == [*body, "head.bias"]
    assert list(layer_grids(net, Grid(4, exclude="head"))) == body
    assert list(layer_grids(net, 4)) == [*body, "head.weight", "head.bias"]
    # The head is left out as the last layer; as an embedding it is included.
    assert list(layer_grids(net, Grid(4, first_last=False, include="words"))) == ["words.weight"]


def test_the_first_and_the_last_layer_stay_those_of_the_network(net):
    """Also where they are excluded: no other layer takes their 8 bits."""
    assert {own.bits for own in layer_grids(net, Grid(3, exclude=["conv1", "fc"])).values()} == {3}


@pytest.mark.parametrize("key, value, message", [
    ("exclude", "layer9*", "exclude='layer9*' matches no parameter of SmallNet"),
    ("exclude", ["conv1", nn.LSTM], "exclude=LSTM matches no parameter of SmallNet"),
    ("include", "bn1", "include='bn1' matches no parameter with 2 dims or more of SmallNet"),
    ("include", ("conv1", "conv?.scale"), "include='conv?.scale' matches no parameter with 2 dims or more"),
])  # fmt: skip
def test_a_selector_that_matches_nothing_is_named(net, key, value, message):
    grid = Grid(4, **{key: value})
    for function in (psg_param_groups, quantize_weights, grid_share, weight_mse, packed_bytes, layer_grids, describe,
                     integer_weights):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            function(net, grid)


@pytest.mark.parametrize("bad", [4, "", None, nn.Linear(2, 2), ["conv1", 3], int, b"conv1", {"conv1"}])
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_what_is_no_selector_is_refused(key, bad):
    with pytest.raises(ValueError, match=f"{key} takes name patterns and classes of modules, got "):
        Grid(4, **{key: bad})


def test_grids_with_selectors_are_values():
    grid = Grid(3, include="words", exclude=["head", nn.LSTM])
    assert grid == Grid(3, include=["words"], exclude=("head", nn.LSTM)) and len({grid, Grid(3)}) == 2
    assert grid.of_ends.exclude == ("head", nn.LSTM)
    with pytest.raises(ValueError, match="a grid with the class LSTM cannot be written to a file: name its modules"):
        grid.facts()
    for named in (Grid(3, True, True, include="words", exclude=["head"]), Grid(4), Grid(2, scale_dims=[1])):
        assert Grid(**json.loads(json.dumps(named.facts()))) == named
    assert Grid(4).facts() == {"bits": 4, "first_last": True, "per_channel": False, "weight_range": "absmax"}


def test_dims_of_scales_are_of_a_single_weight(net):
    assert weight_scale(net.conv2.weight, Grid(4, scale_dims=[1])).shape == (1, 8, 1, 1)
    with pytest.raises(ValueError, match=r"scale_dims \(4,\) do not fit a weight of shape \[8, 8, 3, 3\]"):
        weight_scale(net.conv2.weight, Grid(4, scale_dims=(4,)))
    with pytest.raises(ValueError, match=r"scale_dims=\(1,\) are those of a single weight"):
        quantize_weights(net, Grid(4, scale_dims=(1,)))
    for bad in (1, (-1,), (1, 0), (0, 0), ("0",), (True,)):
        with pytest.raises(ValueError, match="scale_dims must"):
            Grid(4, scale_dims=bad)


# --- what stays in float without the user's word ---------------------------------------------------------------------

CALLS = {"groups": psg_param_groups, "quantized": quantize_weights, "integers": integer_weights}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_large_matrix_in_float_is_named_once(call):
    with pytest.warns(UserWarning, match="each above 1 % of the parameters: places, words") as seen:
        call(Words(), 4)
    assert len(seen) == 1 and seen[0].filename == __file__


QUIET = {
    "excluded": (Words, Grid(4, exclude=(nn.Embedding, "places"))),
    "included": (Words, Grid(4, include="words", exclude="places")),
    "tied": (lambda: Words(tied=True), Grid(4, exclude="places")),
    "the ends": (SmallNet, Grid(4, first_last=False)),
    "a tied head": (lambda: nn.Sequential(nn.Linear(8, 8), Words(tied=True)), Grid(4, False, exclude="1.places")),
    "small": (lambda: nn.ModuleList([nn.Embedding(2, 4), nn.Linear(50, 50)]), Grid(4)),
    "ResNet32": (ResNet32, Grid(2)),
    "vgg16_bn": (lambda: vgg16_bn(10), Grid(4)),
    "SmallNet": (SmallNet, Grid(4)),
}


@pytest.mark.filterwarnings("error", "ignore:all zeros")
@pytest.mark.parametrize("make, grid", QUIET.values(), ids=QUIET)
def test_no_word_where_none_is_due(make, grid):
    network = make()
    for call in CALLS.values():
        call(network, grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(net, dtype):
    """Their grid is computed in float32: small weights have scales that float16 cannot hold."""
    with torch.no_grad():
        net.conv2.weight.mul_(1e-4)
    half = copy.deepcopy(net).to(dtype)
    wide = quantize_weights(copy.deepcopy(half).float(), 8)
    for name, value in quantize_weights(half, 8).state_dict().items():
        assert torch.equal(value, wide.state_dict()[name].to(value.dtype)), name
    values, scale, _ = integer_weights(half, 8)["conv2.weight"]
    assert torch.equal((values * scale).to(dtype), quantize_weights(half, 8).conv2.weight)
    with pytest.warns(UserWarning, match="in 16 bits, which are too few for .* of PSG: conv1.weight, conv2.weight"):
        psg_param_groups(half, 4)


@pytest.mark.parametrize("call", [psg_param_groups, quantize_weights, grid_share, weight_mse, integer_weights])
def test_weights_without_values(net, call):
    with pytest.raises(ValueError, match="conv1.weight is on the meta device: it has no values"):
        call(net.to("meta"), 4)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="0.weight has no shape yet: run a batch through the network first"):
        call(lazy, 4)


def test_a_network_on_the_meta_device_is_described(net):
    expected = str(describe(net, 4)), packed_bytes(net, 4), layer_grids(net, 4)
    net.to("meta")
    assert (str(describe(net, 4)), packed_bytes(net, 4), layer_grids(net, 4)) == expected


# --- parametrizations ------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def forward(self, weight):
        return weight * (torch.arange(weight.numel()).view(weight.shape) % 2)


def test_the_base_of_a_parametrization_is_quantized_where_it_is_the_weight(net):
    """It is for spectral_norm, which divides it by a number."""
    images = torch.randn(8, 3, 8, 8)
    parametrizations.spectral_norm(net.conv2)
    base = "conv2.parametrizations.weight.original"
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized, groups = quantize_weights(net, Grid(4, per_channel=True)), psg_param_groups(net, 4)
    assert any(parameter is net.get_parameter(base) for parameter in groups[0]["params"])
    weight = quantized.conv2.weight.detach()
    integers = 7 * weight / weight.abs().amax((1, 2, 3), keepdim=True)
    assert torch.allclose(integers, integers.round(), atol=1e-4)
    corrected = correct_bias(quantized, net, [images])
    with torch.no_grad():
        features = [network.conv2(network.relu1(network.bn1(network.conv1(images)))) for network in (net, corrected)]
    torch.testing.assert_close(*[feature.mean((0, 2, 3)) for feature in features], rtol=1e-4, atol=1e-5)


def test_the_base_of_another_parametrization_only_where_it_is_included(net):
    parametrize.register_parametrization(net.conv2, "weight", Masked())
    base = "conv2.parametrizations.weight.original"
    with pytest.warns(UserWarning, match="the weights of conv2 are computed"):
        assert base not in layer_grids(net, 4) and quantize_weights(net, 4)
    assert layer_grids(net, Grid(3, include=base, per_channel=True))[base] == Grid(3, per_channel=True)
    parametrizations.weight_norm(net.fc)  # whose parts have no grid
    assert not [name for name in layer_grids(net, Grid(4, include=("conv2", "fc"))) if name.startswith("fc.par")]
    reasons = {row.name: row.reason for row in describe(net, 4).rows}
    assert reasons["fc.parametrizations.weight.original1"] == reasons[base] == "the weight is computed from it"
