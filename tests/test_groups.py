"""`psg_param_groups` of existing groups: they are split, and keep what they say."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from quant import PSGD, Grid, layer_grids, psg_param_groups
from tests.helpers import SmallNet, fill_gradients, same, scale_by_hand, weights


def names_in(groups, net):
    """The names of the parameters of each group, beside its settings."""
    name_of = {id(parameter): name for name, parameter in net.named_parameters()}
    return [
        ([name_of[id(parameter)] for parameter in group["params"]],
         {key: value for key, value in group.items() if key != "params"})
        for group in groups
    ]  # fmt: skip


def nanogpt(net):
    """As nanoGPT's configure_optimizers."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": 0.1},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def test_groups_are_split_in_order_and_keep_their_settings(net):
    given = [
        {"params": net.conv1.parameters(), "lr": 0.01, "weight_decay": 0.1},
        {"params": [*net.fc.parameters(), *net.bn1.parameters(), net.conv2.bias, net.conv2.weight], "lr_scale": 0.5},
        {"params": net.bn2.weight},
    ]
    assert names_in(psg_param_groups(given, Grid(3, per_channel=True), model=net), net) == [
        (["conv1.weight"], {"lr": 0.01, "weight_decay": 0.1, "bits": 8, "per_channel": True}),
        (["conv2.weight"], {"lr_scale": 0.5, "bits": 3, "per_channel": True}),
        (["fc.weight", "fc.bias"], {"lr_scale": 0.5, "bits": 8, "per_channel": True}),
        (["bn1.weight", "bn1.bias", "conv2.bias"], {"lr_scale": 0.5}),
        (["bn2.weight"], {}),
    ]
    assert "bits" not in given[0]


def test_settings_of_psg_go_with_the_scaled_part(net):
    given = [{"params": [*net.parameters()], "lambda_s": 7.0, "psg_eps": 0.1, "acts_on": "update"}]
    scaled, plain = psg_param_groups(given, 4, model=net)
    assert scaled["lambda_s"] == 7 and scaled["acts_on"] == "update" and set(plain) == {"params"}
    optimizer = PSGD(torch.optim.SGD([scaled, plain], lr=0.1))
    assert optimizer.param_groups[0]["psg_eps"] == 0.1


def test_no_decay_puts_norms_and_biases_aside(net):
    sides = names_in(psg_param_groups(net, 4, no_decay=True), net)
    assert sides == [
        (["conv1.weight", "conv2.weight", "fc.weight"], {"bits": 4, "per_channel": False}),
        (["fc.bias"], {"bits": 4, "per_channel": False, "weight_decay": 0.0}),
        (["bn1.weight", "bn1.bias", "conv2.bias", "bn2.weight", "bn2.bias"], {"weight_decay": 0.0}),
    ]
    one = [{"params": net.parameters(), "weight_decay": 0.1, "lr": 0.2}]
    again = psg_param_groups(one, 4, model=net, no_decay=True)
    assert [group["weight_decay"] for group in again] == [0.1, 0.0, 0.0] and {group["lr"] for group in again} == {0.2}
    assert [names for names, _ in names_in(again, net)] == [names for names, _ in sides]


@pytest.mark.parametrize("form", [lambda net: net.parameters(), lambda net: list(net.parameters()),
                                  lambda net: [{"params": net.parameters()}]])  # fmt: skip
def test_all_parameters_give_the_groups_of_the_network(net, form):
    assert names_in(psg_param_groups(form(net), 3, model=net), net) == names_in(psg_param_groups(net, 3), net)


def test_names_stay_with_their_parameters(net):
    """In pairs, as torch's optimizers take them, and beside the parameters, as optimizers keep them."""
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    for given in (net.named_parameters(), [{"params": net.named_parameters()}], optimizer.param_groups):
        groups = torch.optim.SGD(psg_param_groups(given, 3, model=net), lr=0.1).param_groups
        assert len(groups) == 3
        for group in groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                assert net.get_parameter(name) is parameter


@pytest.mark.parametrize("no_decay", [False, True])
def test_training_with_groups_equals_a_plain_loop(net, no_decay):
    """Steps of PSGD on split groups = scale by hand, then the base optimizer on the groups as they were."""
    reference = copy.deepcopy(net)
    make = {"lr": 0.01, "betas": (0.9, 0.99)}
    plain = torch.optim.AdamW(nanogpt(reference), **make)
    given = nanogpt(net) if not no_decay else [{"params": net.parameters(), "weight_decay": 0.1}]
    optimizer = PSGD(torch.optim.AdamW(psg_param_groups(given, 4, model=net, no_decay=no_decay), **make), lambda_s=20)
    for step in range(4):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        scale_by_hand(reference, 4, 20)
        plain.step()
    assert same(weights(net), weights(reference))


def test_frozen_parameters_of_groups_are_scaled_once_they_are_trained(net):
    """Groups that list a frozen parameter keep it; a network's own groups leave it out, to be added later."""
    reference = copy.deepcopy(net)
    net.conv2.requires_grad_(False)
    listed = PSGD(torch.optim.SGD(psg_param_groups(net.parameters(), 4, model=net), lr=0.1), lambda_s=20)
    before = net.conv2.weight.detach().clone()
    fill_gradients(net, 0)
    net.conv2.weight.grad = net.conv2.bias.grad = None
    listed.step()
    assert torch.equal(net.conv2.weight, before)
    net.conv2.requires_grad_(True)
    net.load_state_dict(reference.state_dict())
    left_out = copy.deepcopy(net)
    left_out.conv2.requires_grad_(False)
    later = PSGD(torch.optim.SGD(psg_param_groups(left_out, 4), lr=0.1), lambda_s=20)
    left_out.conv2.requires_grad_(True)
    for group in psg_param_groups(left_out.conv2.parameters(), 4, model=left_out):
        later.add_param_group(group)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for network, optimizer in ((net, listed), (left_out, later)):
        fill_gradients(network, 1)
        optimizer.step()
    fill_gradients(reference, 1)
    scale_by_hand(reference, 4, 20)
    plain.step()
    assert same(weights(net), weights(reference)) and same(weights(left_out), weights(reference))


def test_shared_parameters_are_scaled_once():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    net[2].weight = net[0].weight
    listed = [parameter for layer in net for parameter in layer.parameters()]
    groups = psg_param_groups(listed, 4, model=net)
    found = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert set(found.values()) == {1} and len(found) == 4 and groups[0]["params"][0] is net[0].weight
    optimizer = torch.optim.SGD(psg_param_groups([{"params": listed, "param_names": list("abcde")}], 4, model=net))
    assert optimizer.param_groups[0]["param_names"] == ["a", "b", "c", "e"]


def test_parameters_of_something_else_stay_unscaled(net):
    """Such as those of a loss: they are in the groups, and not in the network."""
    weight = nn.Parameter(torch.ones(3, 3))
    groups = psg_param_groups([*net.parameters(), weight], 4, model=net)
    assert groups[-1]["params"][-1] is weight and "bits" not in groups[-1]


def test_layers_with_other_channels_have_groups_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 3, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    for per_channel, dims in ((True, [None, (1,), None, None]), (False, [None, None, None])):
        groups = psg_param_groups(net, Grid(3, per_channel=per_channel))
        assert [group.get("scale_dims") for group in groups] == dims
    optimizers = [PSGD(torch.optim.SGD(psg_param_groups(net, Grid(3, per_channel=True)), lr=0.1)) for _ in range(2)]
    saved = optimizers[0].state_dict()
    optimizers[1].load_state_dict(saved)
    assert optimizers[1].param_groups[1]["scale_dims"] == (1,)
    for group in saved["param_groups"]:  # as those of before are
        group.pop("scale_dims", None)
    optimizers[1].load_state_dict(saved)
    assert [group.get("scale_dims") for group in optimizers[1].param_groups] == [None, (1,), None, None]
    with pytest.raises(ValueError, match="scale_dims must be whole numbers"):
        PSGD(torch.optim.SGD([{"params": net.parameters(), "bits": 4, "scale_dims": 1}], lr=0.1))
    with pytest.raises(ValueError, match=r"scale_dims=\(1,\) needs"):
        group = {"params": net[0].parameters(), "scale_dims": (1,)}
        PSGD(torch.optim.SGD([group, {"params": net[1].parameters(), "bits": 4}], lr=0.1))


def test_groups_that_cannot_be_split(net):
    def refused(message, groups, error=ValueError, **options):
        with pytest.raises(error, match=message):
            psg_param_groups(groups, 4, **options)

    refused("existing groups need their network", net.parameters())
    refused("model goes with existing groups", net, model=net)
    refused("a group has bits=4, so it is scaled already", psg_param_groups(net, 4), model=net)
    refused('a group has target="zero", so it is', [{"params": net.parameters(), "target": "zero"}], model=net)
    refused("a set of parameters has no order", set(net.parameters()), TypeError, model=net)
    refused("a set of parameters has no order", [{"params": set(net.parameters())}], TypeError, model=net)
    for groups in ([], SmallNet().parameters(), net.bn1.parameters()):
        refused("SmallNet has no weights to scale", groups, model=net)


def test_groups_of_timm(net):
    """Its groups by weight decay and by the depth of a layer."""
    optim = pytest.importorskip("timm.optim", reason="needs timm")
    models = pytest.importorskip("timm.models", reason="needs timm")
    vit = models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    for parameter in vit.parameters():
        nn.init.normal_(parameter)
    makers = optim.param_groups_weight_decay, optim.param_groups_layer_decay
    for network, make in ((net, makers[0]), (vit, makers[0]), (vit, makers[1])):
        given = make(network, weight_decay=0.05)
        grids = layer_grids(network, 3)
        before = {name: settings for names, settings in names_in(given, network) for name in names}
        after = names_in(psg_param_groups(given, 3, model=network), network)
        found = {name: dict(settings) for names, settings in after for name in names}
        assert found.keys() == before.keys()
        for name, settings in found.items():
            bits = settings.pop("bits", None)
            assert settings.pop("per_channel", None) == (None if bits is None else False), name
            assert settings == before[name] and bits == (grids[name].bits if name in grids else None), name
