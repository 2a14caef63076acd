"""Packed integers and the files of them: exact, small, and suspicious of what they read."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from models import ResNet32
from quant import Grid, load_packed, quantize_weights, read_facts
from quant.deploy import save_packed
from quant.deploy.packing import PIECE, pack_bits, unpack_bits
from tests.helpers import SmallNet


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000, PIECE, PIECE + 5])
def test_round_trip_at_the_true_width(bits, count):
    torch.manual_seed(0)
    limit = 2 ** (bits - 1)
    values = torch.randint(-limit, limit, (count,))
    packed = pack_bits(values, bits)
    assert packed.dtype == torch.uint8 and len(packed) == (count * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, count), values.to(torch.int8))
    # The same bits by numpy: two's complement, lowest bit first.
    ones = ((values.numpy()[:, None] >> np.arange(bits)) & 1).astype(np.uint8).ravel()
    assert np.array_equal(packed.numpy(), np.packbits(ones, bitorder="little"))


def test_two_4_bit_values_a_byte():
    assert pack_bits(torch.tensor([1, -1, 7]), 4).tolist() == [0xF1, 0x07]


def test_values_and_lengths_that_do_not_fit():
    with pytest.raises(ValueError, match="values from -9 to 0 do not fit 4 bits"):
        pack_bits(torch.tensor([0, -9]), 4)
    with pytest.raises(ValueError, match=r"3 values of 4 bits need uint8 \[2\], got torch.uint8 \[3\]"):
        unpack_bits(torch.zeros(3, dtype=torch.uint8), 4, 3)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_channel", [False, True])
def test_file_gives_the_quantized_network_bit_for_bit(tmp_path, net, bits, per_channel):
    path = tmp_path / "a.safetensors"
    save_packed(path, net, Grid(bits, per_channel=per_channel), {"arch": "SmallNet"})
    loaded = load_packed(path, SmallNet())
    expected = quantize_weights(net, Grid(bits, per_channel=per_channel)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert read_facts(path) == {"arch": "SmallNet"} and not loaded.training


class LargestFloat(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point() and not function.is_view:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_large_weight_is_packed_in_pieces(tmp_path, per_channel, memory_format):
    layer = nn.Conv2d(256, 512, 3).to(memory_format=memory_format)
    path, grid = tmp_path / "a.safetensors", Grid(4, per_channel=per_channel)
    with LargestFloat() as made:
        save_packed(path, layer, grid)
    assert made.numel < layer.weight.numel() / 2
    assert torch.equal(load_packed(path, nn.Conv2d(256, 512, 3)).weight, quantize_weights(layer, grid).weight)


def test_a_state_dict_with_other_names(tmp_path):
    """Activation checkpointing puts each layer into a wrapper, which the names of the state_dict do not show."""
    layers = [nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)]
    wrapped = nn.Sequential(layers[0], checkpoint_wrapper(layers[1]), layers[2])
    save_packed(tmp_path / "a.safetensors", wrapped, 4)
    loaded = load_packed(tmp_path / "a.safetensors", nn.Sequential(*map(copy.deepcopy, layers)))
    expected = quantize_weights(nn.Sequential(*layers), 4).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_a_state_dict_without_a_quantized_parameter(tmp_path, net):
    def forget(module, state, prefix, metadata):
        del state["conv2.weight"]

    net.register_state_dict_post_hook(forget)
    with pytest.raises(ValueError, match="conv2.weight is not in the state_dict as it is"):
        save_packed(tmp_path / "a.safetensors", net, 4)
    assert not [*tmp_path.iterdir()]


def test_size_of_resnet32_at_4_bits(tmp_path):
    path = tmp_path / "a.safetensors"
    save_packed(path, ResNet32(100), 4)
    # 470,192 weights and 100 biases at half a byte; batch norm, scales and the header take the rest.
    assert 235_146 < path.stat().st_size < 300_000


@pytest.fixture
def packed(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save_packed(path, net, 4, {"arch": "SmallNet"})
    return path


def rewrite(path, change):
    """Writes the file again after `change` has edited its tensors and its metadata."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    metadata["tensors"] = json.loads(metadata["tensors"])
    change(tensors, metadata)
    if not isinstance(metadata.get("tensors"), str):
        metadata["tensors"] = json.dumps(metadata.get("tensors"))
    save_file(tensors, path, metadata)


CHANGES = {
    "a foreign format": (lambda t, m: m.update(format="x"), "its format is 'x' instead of"),
    "no format": (lambda t, m: m.pop("format"), "its format is None instead of"),
    "bad metadata": (lambda t, m: m.update(facts="{"), "is not a readable packed file"),
    "no mapping": (lambda t, m: m.update(facts="[]"), "its metadata are not mappings"),
    "unknown bits": (lambda t, m: m["tensors"]["fc.weight"].update(bits=9), "fc.weight has 9 bits"),
    "bits of another kind": (lambda t, m: m["tensors"].update({"fc.weight": 4}), "fc.weight has None bits"),
    "other bits": (lambda t, m: m["tensors"]["fc.weight"].update(bits=3), "40 values of 3 bits need uint8"),
    "a short tensor": (lambda t, m: t.update({"fc.weight.packed": t["fc.weight.packed"][:-1]}), "need uint8 [20]"),
    "a scale of zero": (lambda t, m: t["fc.weight.scale"].zero_(), "the scale of fc.weight is not a positive"),
    "a scale that is no number": (
        lambda t, m: t["fc.weight.scale"].fill_(float("nan")),
        "not a positive finite number",
    ),
    "scales of another shape": (lambda t, m: t.update({"fc.weight.scale": torch.ones(2)}), "the scale of fc.weight is"),
    "its values in another shape": (
        lambda t, m: m["tensors"]["fc.weight"].update(shape=m["tensors"]["fc.weight"]["shape"][::-1]),
        "fc.weight has the shape [8, 5] instead of [5, 8]",
    ),
    "a missing tensor": (lambda t, m: t.pop("fc.weight.packed"), "lacks fc.weight.packed"),
    "a missing buffer": (lambda t, m: t.pop("bn1.running_mean"), "lacks bn1.running_mean"),
    "a tensor too many": (lambda t, m: t.update(x=torch.ones(1)), "has x, which the network does not know"),
    "another shape": (lambda t, m: t.update({"bn1.weight": torch.ones(3)}), "bn1.weight is torch.float32 [3]"),
    "infinite values": (lambda t, m: t["bn1.weight"].fill_(float("inf")), "bn1.weight has values that are not finite"),
    "NaN in a buffer": (lambda t, m: t["bn1.running_mean"].fill_(float("nan")), "bn1.running_mean has NaN"),
    "metadata without end": (lambda t, m: m.update(facts="[" * 200_000), "is not a readable packed file"),
}


def test_only_what_can_be_loaded_is_saved(tmp_path, net):
    """Masks are infinite buffers. Parameters that are not finite and buffers with NaN fit no network."""
    path = tmp_path / "w4.safetensors"
    net.register_buffer("mask", torch.full((3, 3), -float("inf")).triu(1))
    net.register_buffer("eights", torch.ones(3).to(torch.float8_e4m3fn))
    save_packed(path, net, 4)
    other = SmallNet()
    other.register_buffer("mask", torch.zeros(3, 3))
    other.register_buffer("eights", torch.zeros(3).to(torch.float8_e4m3fn))
    assert torch.equal(load_packed(path, other).mask, net.mask) and torch.equal(other.eights.float(), torch.ones(3))
    for tensor, message in (
        (net.mask, "mask has NaN: no packed file"), (net.bn1.weight, "bn1.weight has values that are not finite: no"),
    ):  # fmt: skip
        tensor.data[0] = float("nan")
        with pytest.raises(ValueError, match=message):
            save_packed(path, net, 4)
        tensor.data[0] = 0


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_altered_files(packed, change, message):
    rewrite(packed, change)
    net = SmallNet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_packed(packed, net)
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(packed) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"x" * 100, (10**15).to_bytes(8, "little") + b"{}", None])
def test_truncated_and_foreign_files(packed, content):
    packed.write_bytes(packed.read_bytes()[:-10] if content is None else content)
    with pytest.raises(ValueError, match="is not a readable packed file"):
        load_packed(packed, SmallNet())


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is not a readable packed file"):
        read_facts(tmp_path / "no.safetensors")


class Tied(nn.Module):
    """An embedding and three linear layers that share one weight, of which one has a name before the first linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.a.weight = self.b.weight = self.c.weight = self.embed.weight

    def forward(self, x):
        return self.c(self.b(self.a(self.embed(x))))


def test_shared_weights_are_stored_once(tmp_path):
    torch.manual_seed(0)
    net, words = Tied().eval(), torch.arange(6)
    save_packed(tmp_path / "a.safetensors", net, 4)
    again = load_packed(tmp_path / "a.safetensors", Tied())
    assert again.a.weight is again.embed.weight
    assert torch.equal(again(words), quantize_weights(net, 4)(words)) and not torch.equal(again(words), net(words))


def test_half_precision_is_refused(tmp_path, net):
    with pytest.raises(ValueError, match="conv1.weight is torch.float16: packed files hold float32 networks"):
        save_packed(tmp_path / "a.safetensors", net.half(), 4)
    assert not list(tmp_path.iterdir())


def test_a_network_on_the_meta_device_is_filled(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.norm(self.second(self.first(x)))

    torch.manual_seed(0)
    net, images = Tied().eval(), torch.randn(3, 4)
    net.second.bias.requires_grad_(False)
    save_packed(tmp_path / "a.safetensors", net, 4)
    with torch.device("meta"):
        empty = Tied()
    empty.second.bias.requires_grad_(False)
    loaded = load_packed(tmp_path / "a.safetensors", empty)
    assert torch.equal(loaded(images), quantize_weights(net, 4)(images))
    assert loaded.first.weight is loaded.second.weight and loaded.first.weight.requires_grad
    assert not loaded.second.bias.requires_grad

    with torch.device("meta"):
        unsaved = Tied()
        unsaved.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match="table is on the meta device, and no file has its values"):
        load_packed(tmp_path / "a.safetensors", unsaved)
    assert unsaved.first.weight.is_meta


def test_state_that_a_file_cannot_hold(tmp_path):
    class WithExtraState(SmallNet):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    net = SmallNet()
    with pytest.raises(ValueError, match="_extra_state of the state_dict is a dict: a packed file holds tensors only"):
        save_packed(tmp_path / "a.safetensors", WithExtraState(), 4)
    save_packed(tmp_path / "b.safetensors", net, 4)
    with pytest.raises(ValueError, match="_extra_state of the state_dict is a dict"):
        load_packed(tmp_path / "b.safetensors", WithExtraState())
    memory = torch.zeros(6)
    net.register_buffer("left", memory[:4])
    net.register_buffer("right", memory[2:])
    with pytest.raises(ValueError, match="a packed file cannot hold tensors that overlap in memory"):
        save_packed(tmp_path / "c.safetensors", net, 4)
    net = SmallNet()
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(
        ValueError, match="sparse is of layout torch.sparse_coo: a packed file holds plain dense tensors"
    ):
        save_packed(tmp_path / "d.safetensors", net, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
