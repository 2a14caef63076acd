"""The optimizer wrapper's contract, point by point."""

import copy
import io
import pickle
import warnings

import numpy
import pytest
import torch
from torch import nn

from quant import PSGD, psg_param_groups
from tests.helpers import backward, fill_gradients, same, sgd, take_steps, weights


def test_shares_groups_and_state_with_the_base(net):
    base = sgd(net)
    optimizer = PSGD(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    take_steps(net, optimizer)
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    for loading in (optimizer, base):
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
    take_steps(net, optimizer)
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
    take_steps(net, optimizer, 3)
    twin = copy.deepcopy(net)
    resumed = PSGD(sgd(twin), lambda_s=5)  # the saved lambda_s wins
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lambda_s"] == 77
    take_steps(net, optimizer, 3, first=3)
    take_steps(twin, resumed, 3, first=3)
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
    take_steps(net, optimizer)
    other_net, other = clone((net, optimizer))
    assert other.param_groups is other.base.param_groups and other.state is other.base.state
    assert other.param_groups[0]["params"][0] is not net.conv1.weight
    take_steps(net, optimizer, first=3)
    take_steps(other_net, other, first=3)
    assert same(weights(net), weights(other_net))


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_closure_is_evaluated_first_and_its_loss_returned(net, acts_on):
    reference = copy.deepcopy(net)
    optimizer, other = PSGD(sgd(net), acts_on=acts_on), PSGD(sgd(reference), acts_on=acts_on)
    seen = weights(net)

    def closure():
        assert torch.is_grad_enabled() and same(weights(net), seen)
        fill_gradients(net, 0)
        return torch.tensor(3.25)

    assert optimizer.step(closure) == 3.25
    fill_gradients(reference, 0)
    assert other.step() is None
    assert same(weights(net), weights(reference))


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_parameters_without_gradient_are_skipped(net, acts_on):
    optimizer = PSGD(sgd(net), acts_on=acts_on)
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
    take_steps(net, optimizer, 1)
    assert calls == ["pre", "base", "post"]


def test_hooks_of_saving_and_loading(net):
    calls = []
    optimizer = copy.deepcopy(PSGD(sgd(net)))
    for name in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{name}_hook")(lambda *_, name=name: calls.append(name))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]


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


@pytest.mark.parametrize("lambda_s", [150, "auto"])
@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_no_host_synchronization(acts_on, lambda_s):
    """Tensors on the meta device have no values: anything that read one back would raise."""
    weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    base = torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1, momentum=0.9)
    optimizer = PSGD(base, lambda_s, acts_on=acts_on, steps=10)
    for _ in range(3):
        weight.grad = torch.empty(8, 8, device="meta")
        optimizer.step()


@pytest.mark.cuda
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


def test_settings_may_be_numbers_of_numpy(net):
    """A state_dict with them could not be read with weights_only=True."""
    groups = [{"params": net.conv2.weight, "bits": numpy.int64(4), "psg_eps": numpy.float64(0.5)}]
    optimizer = PSGD(torch.optim.SGD(groups, lr=0.1), numpy.float64(100), steps=numpy.int64(10))
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert [group[key] for key in ("bits", "psg_eps", "lambda_s", "steps")] == [4, 0.5, 100, 10]
    with pytest.raises(ValueError, match="complex weights"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(3, dtype=torch.complex64)), "bits": 4})


@pytest.mark.parametrize(
    ("base", "warns"),
    [
        (lambda groups: torch.optim.AdamW(groups, lr=1e-3), "AdamW with a momentum .beta1. of 0.9"),
        (lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.5), "SGD with a momentum .beta1. of 0.5"),
        (lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.0, 0.999)), None),
        (lambda groups: torch.optim.RMSprop(groups, lr=1e-3), None),
        (lambda groups: torch.optim.Adagrad(groups, lr=1e-3), None),
    ],
)
def test_momentum_of_scaled_steps_is_named(net, base, warns):
    groups = psg_param_groups(net, 4)
    if warns:
        with pytest.warns(UserWarning, match=warns):
            PSGD(base(groups), 50, acts_on="update")
        later = PSGD(base([{"params": net.bn1.weight}, *psg_param_groups(net.conv2, 4)]), 50)
        with pytest.warns(UserWarning, match=warns):
            later.add_param_group({"params": net.fc.weight, "bits": 4, "acts_on": "update"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if not warns:
            PSGD(base(psg_param_groups(net, 4)), 50, acts_on="update")
        PSGD(base(psg_param_groups(net, 4)), 50)


def test_a_constructor_that_fails_leaves_the_groups_as_they_were(net):
    groups = [{"params": [net.conv1.weight], "bits": 4}, {"params": [net.conv2.weight], "target": "zero"}]
    base = torch.optim.SGD(groups, lr=0.1)
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match='lambda_s "auto" needs a grid'):
        PSGD(base, "auto", steps=2000)
    assert base.param_groups == before
