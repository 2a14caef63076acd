"""PSGD with what people use beside an optimizer: every optimizer and scheduler of torch, AMP, EMA, DDP, FSDP2."""

import copy
import inspect
import os
import pickle
from itertools import product

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from quant import PSGD, Grid, grid_share, layer_grids, psg_param_groups, weight_mse, weight_scale
from tests.helpers import backward, fill_gradients, same, scale_by_hand, sgd, take_steps, twin_multiplier, weights

BASES = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "SGD fused": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=True),
    "SGD foreach": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, foreach=True),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "Adam amsgrad": lambda groups: torch.optim.Adam(groups, lr=1e-3, amsgrad=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
    "AdamW tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-3), foreach=False),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-3),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1.0),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=1e-2),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=1e-3),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=1e-3),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=1e-3),
}
ELSEWHERE = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # the base class, sparse gradients alone, tests of their own


def test_no_optimizer_of_torch_is_forgotten():
    classes = {n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)}
    assert classes - ELSEWHERE == {name.split()[0] for name in BASES}


@pytest.mark.parametrize("name", BASES)
def test_any_base_steps_on_the_scaled_gradient(net, name):
    reference = copy.deepcopy(net)
    optimizer = PSGD(BASES[name](psg_param_groups(net, 4)), lambda_s=50)
    plain = BASES[name](psg_param_groups(reference, 4))
    for step in range(3):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        scale_by_hand(reference, 4, 50)
        plain.step()
    assert same(weights(net), weights(reference))


@pytest.mark.parametrize("name", BASES)
def test_the_step_of_any_base_is_scaled(net, name):
    """acts_on="update": all that the base does to a weight, on gradients that stay as they are."""
    reference = copy.deepcopy(net)
    optimizer = PSGD(BASES[name](psg_param_groups(net, 4)), lambda_s=50, acts_on="update")
    plain = BASES[name](psg_param_groups(reference, 4))
    for step in range(3):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        assert torch.equal(net.conv2.weight.grad, reference.conv2.weight.grad)
        before = weights(reference)
        plain.step()
        with torch.no_grad():
            for key, grid in layer_grids(reference, 4).items():
                parameter = reference.get_parameter(key)
                multiplier = twin_multiplier(before[key], grid.bits, 50)
                parameter.copy_((parameter - before[key]) * multiplier + before[key])
    assert same(weights(net), weights(reference))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon(net):
    """Muon takes matrices alone."""
    groups = [{"params": [net.fc.weight], "bits": 4}]
    twin = copy.deepcopy(net)
    optimizer = PSGD(torch.optim.Muon(groups, lr=0.01), lambda_s=50)
    plain = torch.optim.Muon([twin.fc.weight], lr=0.01)
    for model in (net, twin):
        fill_gradients(model, 0)
    twin.fc.weight.grad *= twin_multiplier(twin.fc.weight.detach(), 4, 50)
    optimizer.step()
    plain.step()
    assert torch.equal(net.fc.weight, twin.fc.weight)


def test_base_that_needs_a_closure():
    parameter = nn.Parameter(torch.tensor([1.0, 0.55, -0.31]))
    goal = torch.tensor([0.9, 0.7, -0.2])
    optimizer = PSGD(torch.optim.LBFGS([{"params": [parameter], "bits": 4}], lr=0.1), lambda_s=20)

    def closure():
        optimizer.zero_grad()
        loss = (parameter - goal).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first
    assert parameter[0] == 1.0  # the largest weight is a grid point


class Lookahead(torch.optim.Optimizer):
    """As such wrappers are written: without Optimizer.__init__, and so without its hooks of loading."""

    def __init__(self, inner, k=2):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.inner, self.k, self.count, self.slow = inner, k, 0, {}
        self.param_groups, self.defaults, self.state = inner.param_groups, inner.defaults, inner.state

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            self.sync_lookahead()
        return loss

    @torch.no_grad()
    def sync_lookahead(self):
        for group in self.param_groups:
            for fast in group["params"]:
                slow = self.slow.setdefault(fast, fast.clone())
                slow.lerp_(fast, 0.5)
                fast.copy_(slow)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def test_round_a_wrapper_without_hooks(net):
    reference = copy.deepcopy(net)
    optimizer = PSGD(Lookahead(sgd(net)), lambda_s=50)
    plain = Lookahead(sgd(reference))
    for step in range(4):
        fill_gradients(net, step)
        optimizer.step()
        fill_gradients(reference, step)
        scale_by_hand(reference, 4, 50)
        plain.step()
    assert same(weights(net), weights(reference))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is optimizer.base.inner.param_groups
    assert optimizer.param_groups[0]["lambda_s"] == 50
    with pytest.raises(
        AttributeError, match="sync_lookahead, which belongs to Lookahead: call optimizer.base.sync_look"
    ):
        optimizer.sync_lookahead()
    with pytest.raises(AttributeError, match="'PSGD' object has no attribute 'train'"):
        optimizer.train()


class TwoSets(torch.optim.SGD):
    """Keeps an average to evaluate with, as schedule_free's do."""

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_a_base_with_modes_lends_them(net):
    optimizer = PSGD(TwoSets(psg_param_groups(net, 4), lr=0.1))
    for used in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        used.eval()
        assert used.base.mode == "eval"
        used.train()
        assert used.base.mode == "train"
    with pytest.raises(ValueError, match='TwoSets keeps weights of its own, which acts_on="update" would not scale'):
        PSGD(TwoSets(psg_param_groups(net, 4), lr=0.1), acts_on="update")
    with pytest.raises(ValueError, match="TwoSets keeps weights of its own"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "bits": 4, "acts_on": "update"})


def test_complex_weights_are_refused():
    group = {"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))], "target": "zero"}
    with pytest.raises(ValueError, match="a scaled group has complex weights"):
        PSGD(torch.optim.SGD([group], lr=0.1))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_forgotten():
    assert set(lr_scheduler.__all__) - {"LRScheduler", "ReduceLROnPlateau"} == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(net, name, recwarn):
    other = copy.deepcopy(net)
    optimizer, plain = PSGD(sgd(net)), sgd(other)
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain)
    rates = []
    for step in range(4):
        take_steps(net, optimizer, 1, step)
        take_steps(other, plain, 1, step)
        ours.step()
        theirs.step()
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain.param_groups]
        assert [g["momentum"] for g in optimizer.param_groups] == [g["momentum"] for g in plain.param_groups]
        rates.append(optimizer.base.param_groups[0]["lr"])
    assert set(rates) != {0.01}
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]
    again = SCHEDULERS[name](PSGD(sgd(net)))
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert again.state_dict().keys() == ours.state_dict().keys()


def test_reduce_on_plateau(net):
    optimizer = PSGD(sgd(net))
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.base.param_groups[0]["lr"] < 0.01


@pytest.mark.parametrize("stage", [{}, {"lambda_s": "auto", "steps": 9}])
def test_grad_scaler(net, stage):
    reference = copy.deepcopy(net)
    optimizer, plain = PSGD(sgd(net), **stage), PSGD(sgd(reference), **stage)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    images = torch.randn(4, 3, 8, 8)
    scaler.scale(net(images).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    reference(images).square().sum().backward()
    plain.step()
    for a, b in zip(net.parameters(), reference.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    before = weights(net)
    scaler.scale(net(images).sum() * float("inf")).backward()
    scaler.step(optimizer)
    assert same(weights(net), before)  # an overflow skips the step


def test_gradient_accumulation(net):
    """Scaling happens once, in step, on the sum of the gradients of three backward passes."""
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(net, 4), lr=0.01), lambda_s=20)
    for seed in range(3):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        net(images).square().sum().backward()
    before, accumulated = weights(net), {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    for name, grid in layer_grids(net, 4).items():
        expected = before[name] - 0.01 * accumulated[name] * twin_multiplier(before[name], grid.bits, 20)
        assert torch.allclose(net.get_parameter(name), expected, rtol=1e-5, atol=1e-7), name


def test_clipping_comes_before_the_step(net):
    """clip_grad_norm_ sees the loss's own gradients; PSGD then scales the clipped ones."""
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(net, 4), lr=0.01), lambda_s=20)
    backward(net)
    before, raw = weights(net), {name: p.grad.clone() for name, p in net.named_parameters()}
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in raw.values()]).norm().item(), rel=1e-5)
    optimizer.step()
    for name, grid in layer_grids(net, 4).items():
        clipped = raw[name] * 0.5 / norm
        expected = before[name] - 0.01 * clipped * twin_multiplier(before[name], grid.bits, 20)
        assert torch.allclose(net.get_parameter(name), expected, rtol=1e-5, atol=1e-7), name


def test_moving_average_of_the_weights(net):
    """An EMA sees PSGD's weights after each step, as it does the bare optimizer's."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer, expected = PSGD(sgd(net)), None
    for step in range(3):
        take_steps(net, optimizer, 1, step)
        average.update_parameters(net)
        now = net.conv2.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    assert torch.allclose(average.module.conv2.weight, expected, atol=1e-7)


@pytest.mark.parametrize("stage", [{}, {"lambda_s": "auto", "steps": 9}])
def test_compiled_step(net, stage):
    reference = copy.deepcopy(net)
    optimizer, other = PSGD(sgd(net), **stage), PSGD(sgd(reference), **stage)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for step in range(2):
        fill_gradients(net, step)
        compiled()
        take_steps(reference, other, 1, step)
    for a, b in zip(net.parameters(), reference.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def distributed(rank, ranks, store, wraps):
    """`compare_with_one_process` in each of `ranks` processes, for all `wraps` and both kinds of grids."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for wrap, per_channel in product(wraps, (False, True)):
        compare_with_one_process(rank, ranks, wrap, per_channel)
    if sharded in wraps:
        compare_scales()
        compare_with_a_whole_weight()
        count_collectives()
    torch.distributed.barrier()  # a rank that leaves early may take the other down with it
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and one that wakes while Python shuts down aborts the process


def compare_with_one_process(rank, ranks, wrap, per_channel):
    """Steps of `wrap`ped training, every rank on its part of the batch, against the same in one process.

    On 3 ranks the last holds nothing of the second layer, if the weights are sharded.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    reference = copy.deepcopy(model)
    wrapped = wrap(model)
    for figure in (grid_share, weight_mse):
        assert figure(model, 4) == pytest.approx(figure(reference, 4)), figure
    stages = product((50, "auto"), ("gradient", "update"))
    for step in range(12):
        if step % 3 == 0:
            lambda_s, acts_on = next(stages)
            bases = [sgd(net, per_channel=per_channel) for net in (model, reference)]
            optimizer, other = (PSGD(base, lambda_s, acts_on=acts_on, steps=400, keep_range=True) for base in bases)
        images = torch.randn(4 * ranks, 6, generator=torch.Generator().manual_seed(step))
        for net, batch, chosen in ((wrapped, images[4 * rank : 4 * rank + 4], optimizer), (reference, images, other)):
            chosen.zero_grad()
            net(batch).square().mean().backward()
            chosen.step()
    for parameter, expected in zip(model.parameters(), reference.parameters()):
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        assert torch.allclose(whole, expected, rtol=1e-5, atol=1e-7)
    assert optimizer.pace().tau == pytest.approx(other.pace().tau, rel=1e-4) and other.pace().tau > 0


def compare_scales():
    """Scales over other dims than the sharded one, of which the last of 3 ranks holds nothing."""
    torch.manual_seed(0)
    weight = nn.ConvTranspose1d(2, 5, 3)
    part = sharded(copy.deepcopy(weight)).weight.detach()
    for dims in ((), (0,), (1,), (0, 1), (1, 2)):
        grid = Grid(4, scale_dims=dims)
        assert torch.equal(weight_scale(part, grid).full_tensor(), weight_scale(weight.weight.detach(), grid)), dims


def count_collectives():
    """Of a step on weights that are sharded by row: one for all ranges unless rows have their own, one for the pace."""
    from torch.distributed.tensor.debug import CommDebugMode

    for acts_on, per_channel, lambda_s in product(("gradient", "update"), (False, True), (50, "auto")):
        model = sharded(nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)))
        steps = 9 if lambda_s == "auto" else None
        optimizer = PSGD(sgd(model, per_channel=per_channel), lambda_s, acts_on=acts_on, steps=steps)
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        with CommDebugMode() as counted:
            optimizer.step()
        expected = (not per_channel) + (lambda_s == "auto")
        assert counted.get_total_counts() == expected, (acts_on, per_channel, lambda_s)


def compare_with_a_whole_weight():
    """A group of a sharded weight and one that every rank holds whole: as in one process, on the same images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False))
    reference = copy.deepcopy(model)
    sharded(model[0])
    for acts_on, net in product(("gradient", "update"), (model, reference)):
        optimizer = PSGD(sgd(net), "auto", acts_on=acts_on, steps=9)
        for step in range(2):
            optimizer.zero_grad()
            net(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    for parameter, expected in zip((model[0].weight.full_tensor(), model[1].weight), reference.parameters()):
        assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-7)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))


def test_three_processes_equal_one(tmp_path):
    """Also with the weights sharded: the grid, and every figure, is that of the whole weight."""
    wraps = [nn.parallel.DistributedDataParallel]
    if torch.__version__ >= "2.7":  # 2.6's FSDP2 needs a GPU
        wraps.append(sharded)
    torch.multiprocessing.spawn(distributed, (3, tmp_path / "store", wraps), nprocs=3)
