"""The PSG rule against a readable twin and against the theory, and the optimizer wrapper's contract point by point."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from quant import PSGD, fake_quantize_weight, layer_bits, psg_param_groups
from tests.conftest import needs_cuda


def twin_multiplier(weight, bits, lambda_s, eps=0.0):
    """The rule as one writes it down, a tensor at a time."""
    scale = weight.abs().max() / (2 ** (bits - 1) - 1)
    return lambda_s * (weight - torch.round(weight / scale) * scale).abs() + eps


def backward(net, seed=0):
    net.zero_grad()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    net(images).square().sum().backward()


def fill_gradients(net, seed):
    """Equal gradients for equal seeds, bit for bit, which two backward passes do not promise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def sgd(net, bits=4, lr=0.01, **settings):
    return torch.optim.SGD(psg_param_groups(net, bits), lr=lr, momentum=0.9, weight_decay=1e-4, **settings)


def weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def run(net, optimizer, steps=3, first=0):
    for step in range(first, first + steps):
        fill_gradients(net, step)
        optimizer.step()


# --- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_equals_the_twin(net, bits, eps):
    optimizer = PSGD(sgd(net, bits), lambda_s=37.0, eps=eps)
    widths = layer_bits(net, bits)
    backward(net)
    expected = {}
    for name, parameter in net.named_parameters():
        gradient = parameter.grad.clone()
        if name in widths:
            gradient *= twin_multiplier(parameter.detach(), widths[name], 37.0, eps)
        expected[name] = gradient
    optimizer.scale_gradients()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_whole_training_equals_a_plain_loop(net):
    """Steps of PSGD(SGD) = scale by hand, then SGD: momentum and weight decay see the scaled gradient."""
    reference = copy.deepcopy(net)
    plain = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    widths = layer_bits(net, 4)
    optimizer = PSGD(sgd(net), lambda_s=150)
    for step in range(5):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        for name, parameter in reference.named_parameters():
            if name in widths:
                parameter.grad *= twin_multiplier(parameter.detach(), widths[name], 150)
        plain.step()
    assert same(weights(net), weights(reference))


def test_per_channel_grid(net):
    base = torch.optim.SGD(psg_param_groups(net, 4, per_channel=True), lr=0.1)
    backward(net)
    gradient, bias_gradient = net.conv2.weight.grad.clone(), net.fc.bias.grad.clone()
    PSGD(base, lambda_s=2.0).scale_gradients()
    expected = torch.stack([g * twin_multiplier(w, 4, 2.0) for g, w in zip(gradient, net.conv2.weight.detach())])
    assert torch.equal(net.conv2.weight.grad, expected)
    # A bias has one grid for all of it: with a grid an element it would never move.
    assert torch.equal(net.fc.bias.grad, bias_gradient * twin_multiplier(net.fc.bias.detach(), 4, 2.0))


def test_target_zero(net):
    base = torch.optim.SGD([{"params": [net.conv1.weight], "target": "zero"}, {"params": [net.fc.weight]}], lr=0.1)
    backward(net)
    scaled, untouched = net.conv1.weight.grad.clone(), net.fc.weight.grad.clone()
    PSGD(base, lambda_s=3.0).scale_gradients()
    assert torch.equal(net.conv1.weight.grad, scaled * (net.conv1.weight.detach().abs() * 3.0))
    assert torch.equal(net.fc.weight.grad, untouched)


def test_weights_on_the_grid_do_not_move(net):
    with torch.no_grad():
        net.conv2.weight.copy_(fake_quantize_weight(net.conv2.weight, 4))
        # Another off-grid weight keeps the layer alive.
        net.conv2.weight[0, 0, 0, 0] *= 0.9
    before = net.conv2.weight.detach().clone()
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(net, 4), lr=0.1), lambda_s=150)
    backward(net)
    optimizer.step()
    step = before.abs().max() / 7
    on_grid = (before - fake_quantize_weight(before, 4)).abs() < 1e-6 * step
    moved = (net.conv2.weight.detach() - before).abs()
    assert on_grid.sum() >= before.numel() - 1
    assert moved[on_grid].max() < 1e-6 and moved[~on_grid].min() > 1e-6


def test_all_zero_tensor_stays_finite():
    weight = nn.Parameter(torch.zeros(3, 3))
    weight.grad = torch.ones(3, 3)
    PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)).step()
    assert torch.equal(weight.detach(), torch.zeros(3, 3))


def test_empty_tensor_is_no_error():
    weight = nn.Parameter(torch.zeros(0, 3))
    weight.grad = torch.ones(0, 3)
    PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)).step()


# --- parameter groups ---------------------------------------------------------------------------------------------


def test_param_groups_cover_every_parameter_once(net):
    for bits, first_last in ((4, True), (3, True), (3, False)):
        groups = psg_param_groups(net, bits, first_last)
        ids = [id(p) for group in groups for p in group["params"]]
        assert sorted(ids) == sorted(map(id, net.parameters()))
    scaled = {group.get("bits"): {id(p) for p in group["params"]} for group in psg_param_groups(net, 3)}
    assert scaled[8] == {id(net.conv1.weight), id(net.fc.weight), id(net.fc.bias)}
    assert scaled[3] == {id(net.conv2.weight)}
    assert id(net.bn1.weight) in scaled[None] and id(net.conv2.bias) in scaled[None]


def test_parameter_shared_with_an_embedding_is_scaled():
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 6)})
    model["head"].weight = model["embedding"].weight
    scaled = [id(p) for group in psg_param_groups(model, 4) if "bits" in group for p in group["params"]]
    assert id(model["embedding"].weight) in scaled and len(scaled) == 4


def test_frozen_parameters_are_left_out(net):
    net.conv2.weight.requires_grad_(False)
    assert not any(p is net.conv2.weight for group in psg_param_groups(net, 4) for p in group["params"])
    with pytest.raises(ValueError, match="SmallNet has no weights to scale"):
        psg_param_groups(net.requires_grad_(False), 4)


def test_one_element_of_a_grid_of_its_own_still_learns():
    """It is the largest of its grid, so that PSG would freeze it."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    assert [len(group["params"]) for group in psg_param_groups(model, 4)] == [3, 1]
    assert psg_param_groups(model, 4)[-1]["params"] == [model[1].bias]
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3, bias=False), nn.Linear(6, 4))
    assert psg_param_groups(depthwise, 4, per_channel=True)[-1]["params"] == [depthwise[0].weight]
    assert len(psg_param_groups(depthwise, 4)) == 1


def test_groups_without_bits_pass_through(net):
    reference = copy.deepcopy(net)
    base = torch.optim.SGD([{"params": [net.conv1.weight], "bits": 4}, {"params": [net.fc.weight]}], lr=0.1)
    optimizer = PSGD(base)
    plain = torch.optim.SGD([reference.fc.weight], lr=0.1)
    fill_gradients(net, 0)
    fill_gradients(reference, 0)
    optimizer.step()
    plain.step()
    assert torch.equal(net.fc.weight, reference.fc.weight)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), "150"])
def test_bad_lambda_s(net, bad):
    with pytest.raises(ValueError, match="lambda_s must be a finite number > 0"):
        PSGD(sgd(net), lambda_s=bad)


def test_bad_settings(net):
    with pytest.raises(ValueError, match="eps"):
        PSGD(sgd(net), eps=-0.1)
    with pytest.raises(ValueError, match="bits must be"):
        PSGD(torch.optim.SGD([{"params": net.parameters(), "bits": 1}], lr=0.1))
    with pytest.raises(ValueError, match="target"):
        PSGD(torch.optim.SGD([{"params": net.parameters(), "bits": 4, "target": "one"}], lr=0.1))
    with pytest.raises(ValueError, match="psg_param_groups"):
        PSGD(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="lambda_s=5 needs"):
        PSGD(torch.optim.SGD([{"params": [net.fc.weight], "lambda_s": 5}, {"params": [net.conv1.weight], "bits": 4}]))
    base = sgd(net)
    with pytest.raises(ValueError, match="lambda_s"):
        PSGD(base, lambda_s=0)
    assert PSGD(base, lambda_s=7).param_groups[0]["lambda_s"] == 7  # the failed one left nothing behind
    for wrong in (torch.optim.SGD, PSGD(base)):
        with pytest.raises(TypeError, match="instance of another torch optimizer"):
            PSGD(wrong)


# --- the wrapper's contract ---------------------------------------------------------------------------------------


def test_shares_groups_and_state_with_the_base(net):
    base = sgd(net)
    optimizer = PSGD(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    run(net, optimizer)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    for loading in (optimizer, base, copy.deepcopy(optimizer).base):
        loading.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    twin = copy.deepcopy(optimizer)
    twin.base.load_state_dict(optimizer.state_dict())
    assert twin.param_groups is twin.base.param_groups


def test_base_state_is_untouched_before_the_first_step(net):
    base = torch.optim.AdamW(psg_param_groups(net, 4))
    PSGD(base)
    assert len(base.state) == 0


def test_state_dict_is_the_bases_and_loads_without_pickle(net):
    optimizer = PSGD(sgd(net), lambda_s=77)
    run(net, optimizer)
    state = optimizer.state_dict()
    assert state.keys() == optimizer.base.state_dict().keys()
    assert {group.get("bits") for group in state["param_groups"]} == {4, None}
    assert state["param_groups"][0]["lambda_s"] == 77
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"] == state["param_groups"]


def test_resume_from_state_dict_is_exact(net):
    optimizer = PSGD(sgd(net), lambda_s=77)
    run(net, optimizer, 3)
    twin = copy.deepcopy(net)
    resumed = PSGD(sgd(twin), lambda_s=5)  # the saved lambda_s wins
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lambda_s"] == 77
    run(net, optimizer, 3, first=3)
    run(twin, resumed, 3, first=3)
    assert same(weights(net), weights(twin))


def test_loading_a_bare_optimizers_state_keeps_psg(net):
    plain_net = copy.deepcopy(net)
    names = {id(p): name for name, p in net.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in psg_param_groups(net, 4)]
    plain = torch.optim.SGD([{"params": [plain_net.get_parameter(n) for n in group]} for group in order], lr=0.3)
    optimizer = PSGD(sgd(net), lambda_s=9)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["bits"] == 4 and optimizer.param_groups[0]["lambda_s"] == 9


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(net, clone):
    optimizer = PSGD(sgd(net))
    run(net, optimizer)
    other_net, other = clone((net, optimizer))
    assert other.param_groups is other.base.param_groups and other.state is other.base.state
    assert other.param_groups[0]["params"][0] is not net.conv1.weight
    run(net, optimizer, first=3)
    run(other_net, other, first=3)
    assert same(weights(net), weights(other_net))


def test_closure_is_evaluated_first_and_its_loss_returned(net):
    reference = copy.deepcopy(net)
    optimizer, other = PSGD(sgd(net)), PSGD(sgd(reference))
    seen = weights(net)

    def closure():
        assert torch.is_grad_enabled() and same(weights(net), seen)
        fill_gradients(net, 0)
        return torch.tensor(3.25)

    assert optimizer.step(closure) == 3.25
    fill_gradients(reference, 0)
    assert other.step() is None
    assert same(weights(net), weights(reference))


def test_parameters_without_gradient_are_skipped(net):
    optimizer = PSGD(sgd(net))
    before = net.conv2.weight.detach().clone()
    backward(net)
    net.conv2.weight.grad = None
    optimizer.step()
    assert torch.equal(net.conv2.weight, before)


def test_step_hooks(net):
    calls = []
    optimizer = PSGD(sgd(net))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base.register_step_pre_hook(lambda *_: calls.append("base"))
    run(net, optimizer, 1)
    assert calls == ["pre", "base", "post"]


def test_add_param_group(net):
    optimizer = PSGD(torch.optim.SGD([{"params": [net.conv1.weight], "bits": 4}], lr=0.1), lambda_s=8)
    optimizer.add_param_group({"params": [net.fc.weight], "bits": 3})
    optimizer.add_param_group({"params": [net.fc.bias]})
    assert optimizer.base.param_groups[1]["lambda_s"] == 8 and optimizer.base.param_groups[1]["lr"] == 0.1
    assert "lambda_s" not in optimizer.param_groups[2]
    with pytest.raises(ValueError, match="bits"):
        optimizer.add_param_group({"params": [net.conv2.weight], "bits": 1})
    assert len(optimizer.param_groups) == 3


def test_zero_grad(net):
    optimizer = PSGD(sgd(net))
    backward(net)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_no_host_synchronisation():
    """Tensors on the meta device have no values: anything that read one back would raise."""
    weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    weight.grad = torch.empty(8, 8, device="meta")
    PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1, momentum=0.9)).step()


@needs_cuda
def test_cuda_graph(net):
    net.cuda()
    reference = copy.deepcopy(net)
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(net, 4), lr=0.01, fused=True))
    images = torch.randn(4, 3, 8, 8, device="cuda")

    def step(model, chosen):
        chosen.zero_grad(set_to_none=False)
        model(images).square().sum().backward()
        chosen.step()

    start = copy.deepcopy(net.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(net, optimizer)
    net.load_state_dict(start)
    graph.replay()
    step(reference, PSGD(torch.optim.SGD(psg_param_groups(reference, 4), lr=0.01, fused=True)))
    for a, b in zip(net.parameters(), reference.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
