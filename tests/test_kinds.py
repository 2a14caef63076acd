"""Kinds of layers: their grids, the steps of PSGD on them and their packed files, against loops over their slices."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from quant import (
    PSGD,
    Grid,
    adaround,
    correct_bias,
    describe,
    export,
    layer_grids,
    layer_rows,
    load_packed,
    packed_bytes,
    psg_param_groups,
    quantize_weights,
)
from quant.deploy import integer_weights
from tests.helpers import fill_gradients

ALL, FIRST, SECOND, BOTH = (), (0,), (1,), (0, 1)  # dims whose every index has a scale


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv1d(4, 6, 3)
        self.up, self.groups = nn.ConvTranspose2d(6, 4, 2, 2), nn.ConvTranspose1d(6, 9, 3, groups=3)
        self.volume, self.head = nn.ConvTranspose3d(4, 2, 2), nn.Conv3d(2, 3, 1)


class Experts(nn.Module):
    """As in Mixtral, except for `turned` [experts, in, out]."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 4, turned
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))
        self.position = nn.Parameter(torch.randn(1, 5, 8))


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self, out: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(size, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def attention():
    return nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)])


def gpt2():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


# Of each network: its quantized parameters, with the dims of their scales per tensor and per channel.
KINDS = {
    "convolutions": (
        UNet,
        {f"{name}.weight": (ALL, FIRST) for name in ("down", "middle", "head")}
        | {f"{name}.weight": (ALL, SECOND) for name in ("up", "groups", "volume")},
    ),
    "attention": (
        attention,
        {f"{n}.out_proj.weight": (ALL, FIRST) for n in (0, 1)}
        | {f"1.{key}_proj_weight": (ALL, FIRST) for key in "qkv"}
        | {f"{n}.{key}": (ALL, ALL) for n in (0, 1) for key in ("in_proj_bias", "out_proj.bias")}
        | {"0.in_proj_weight": (ALL, FIRST)},
    ),
    "experts": (Experts, {"up": (FIRST, BOTH), "down": (FIRST, BOTH)}),
    "turned experts": (lambda: Experts(True), {"up": (FIRST, (0, 2)), "down": (FIRST, (0, 2))}),
    "Conv1D": (lambda: nn.Sequential(Conv1D(6, 4)), {"0.weight": (ALL, SECOND), "0.bias": (ALL, ALL)}),
    "GPT-2": (
        gpt2,
        {f"transformer.h.0.{name}.weight": (ALL, SECOND)
         for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        | {f"transformer.h.0.{name}.bias": (ALL, ALL)
           for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        | {"lm_head.weight": (ALL, FIRST)},
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    """A network, and the dims of the scales of its parameters."""
    torch.manual_seed(0)
    make, dims = request.param
    network = make()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network, dims


def by_hand(weight, bits, dims):
    """Q(w) and the number of scales, a slice at a time."""
    result, largest, count = torch.empty_like(weight), 2 ** (bits - 1) - 1, 0
    for indices in product(*(range(weight.shape[dim]) for dim in dims)):
        place = [slice(None)] * weight.dim()
        for dim, index in zip(dims, indices):
            place[dim] = index
        scale = weight[tuple(place)].abs().max() / largest
        result[tuple(place)] = torch.round(weight[tuple(place)] / scale) * scale
        count += 1
    return result, count


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_on_the_grid(kind, per_channel):
    network, dims = kind
    grid = Grid(4, per_channel=per_channel)
    quantized = quantize_weights(network, grid).state_dict()
    assert set(layer_grids(network, grid)) == set(dims)
    size, owners = 0, {}
    for name, value in network.state_dict().items():
        if name in dims:
            expected, scales = by_hand(value, 4, dims[name][per_channel])
            assert torch.equal(quantized[name], expected), name
            size += (value.numel() + 1) // 2 + 4 * scales
        elif name not in ("transformer.wte.weight",):  # which GPT-2's head shares
            assert torch.equal(quantized[name], value), name
            owners[name] = 4 * value.numel()
    of_layers = [name for name in owners if name.rpartition(".")[0] in {key.rpartition(".")[0] for key in dims}]
    assert packed_bytes(network, grid) == size + sum(owners[name] for name in of_layers)


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_a_step_is_scaled_by_the_distance_to_the_grid(kind, per_channel, acts_on):
    network, dims = kind
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters(remove_duplicate=False)}
    groups = psg_param_groups(network, Grid(4, per_channel=per_channel))
    optimizer = PSGD(torch.optim.SGD(groups, lr=0.1), lambda_s=3.0, acts_on=acts_on)
    fill_gradients(network, 0)
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters(remove_duplicate=False)}
    optimizer.step()
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name == "transformer.wte.weight":
            continue
        change = gradients[name]
        if name in dims:
            change = change * 3 * (before[name] - by_hand(before[name], 4, dims[name][per_channel])[0]).abs()
        assert torch.allclose(parameter, before[name] - 0.1 * change, rtol=1e-5, atol=1e-6), name


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
@pytest.mark.parametrize("bits, per_channel", [(3, True), (4, False)])
def test_a_packed_file_holds_them_bit_for_bit(kind, tmp_path, bits, per_channel):
    network, dims = kind
    grid = Grid(bits, per_channel=per_channel)
    export(network, tmp_path / "a.safetensors", grid)
    empty = copy.deepcopy(network)
    for parameter in empty.parameters():
        nn.init.zeros_(parameter)
    loaded = load_packed(tmp_path / "a.safetensors", empty).state_dict()
    for name, value in quantize_weights(network, grid).state_dict().items():
        assert torch.equal(loaded[name], value), name
    for name, (values, scale, _) in integer_weights(network, grid).items():
        own = dims[name][per_channel]
        sizes = [size if dim in own else 1 for dim, size in enumerate(values.shape)] if own else []
        assert list(scale.shape) == sizes, name


def test_outputs_of_a_conv1d_and_a_transposed_convolution_are_corrected():
    """Their output channels are the last dim and dim 1."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(6, 4), nn.ReLU(), nn.Linear(6, 6), nn.ConvTranspose1d(5, 3, 3)).eval()
    images, grid = torch.randn(32, 5, 4), Grid(4, per_channel=True)
    assert [row["layer"] for row, _ in layer_rows(net, [images], grid)] == ["0", "2", "3"]
    with torch.no_grad():
        for parts, dims in ((1, (0, 1)), (4, (0, 2))):
            corrected = correct_bias(quantize_weights(net, grid), net, [images])
            means = [network[:parts](images).mean(dims) for network in (net, corrected)]
            torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)
    learned = adaround(quantize_weights(net, grid), net, [images], grid, iterations=5)
    for name, others in (("0.weight", 0), ("3.weight", (0, 2))):
        integers = learned.get_parameter(name) / (net.get_parameter(name).abs().amax(others, keepdim=True) / 7)
        assert torch.allclose(integers, integers.round(), atol=1e-5), name


def test_the_first_layer_may_be_an_attention():
    torch.manual_seed(0)
    bits = {row.name: row.bits for row in describe(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), 3).rows}
    assert bits["encoder.layers.0.self_attn.in_proj_weight"] == 8 and bits["decoder.layers.0.linear2.weight"] == 8
    assert (
        bits["encoder.layers.0.self_attn.out_proj.weight"] == bits["decoder.layers.0.multihead_attn.in_proj_bias"] == 3
    )


def test_other_tensors_of_three_dims_stay_in_float():
    """Tokens and positions, and what is no stack of as many matrices as the module says."""
    net = nn.ModuleList([Experts(), nn.Linear(4, 4)])
    net[0].num_experts = 3
    assert list(layer_grids(net, 4)) == ["1.weight", "1.bias"]
    del net[0].num_experts
    assert list(layer_grids(net, 4)) == ["1.weight", "1.bias"]
    stacked = layer_grids(net, Grid(4, include=("0.up", "0.down")))
    assert [stacked[name].scale_dims for name in ("0.up", "0.down")] == [(0,), (0,)]


@pytest.mark.filterwarnings("ignore:matrices that stay in float")
def test_experts_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4, "vocab_size": 20}  # fmt: skip
    network = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    grids = layer_grids(network, Grid(4, per_channel=True))
    stacks = [name for name, own in grids.items() if own.scale_dims == (0, 1)]
    if not stacks:
        pytest.skip(f"the experts of transformers {transformers.__version__} are not stacked")
    assert [name.rpartition(".")[2] for name in stacks] == ["gate_up_proj", "down_proj"]
    words = torch.arange(10)[None]
    with torch.no_grad():
        outputs = [net(words).logits for net in (network, quantize_weights(network, Grid(8, exclude="*embed*")))]
    assert 0 < (outputs[0] - outputs[1]).abs().max() < 0.1 * outputs[0].abs().max()
