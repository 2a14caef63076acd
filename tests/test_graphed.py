"""The CUDA-graph training loop: on a CPU its buffers and counters, on a GPU the graph, against the plain loop."""

import copy
import shutil

import pytest
import torch

from quant import PSGD, psg_param_groups
from tests.helpers import SmallNet, small_training
from utils.cli import UserError
from utils.data.load import load_dataset
from utils.device import set_deterministic
from utils.training.graph import GraphedTraining
from utils.training.loop import NonFiniteError, train_epoch

STAGES = [
    (torch.optim.SGD, {}),
    (torch.optim.Adam, {}),
    (torch.optim.SGD, {"lambda_s": "auto", "steps": 9}),
    (torch.optim.Adam, {"lambda_s": "auto", "steps": 9, "acts_on": "update"}),
]


def pair(device, base, batch_size=60, lr=0.05, **stage):
    """The same network and optimizer twice, and 150 digits in batches of which the last is short."""
    torch.manual_seed(0)
    digits = load_dataset("digits", "", device)
    batches = digits.train.part(slice(150)).shuffled(batch_size, seed=3)
    first = SmallNet(10).to(device, memory_format=torch.channels_last)
    models = [first, copy.deepcopy(first)]
    options = {"lr": lr, "fused": True}
    options |= {"capturable": device.type == "cuda"} if base is torch.optim.Adam else {"momentum": 0.9}
    return models, [PSGD(base(psg_param_groups(model, 4), **options), **stage) for model in models], batches


def assert_equal_runs(device, base, stage, epochs, batch_size):
    lr = 1e-3 if base is torch.optim.Adam else 0.05
    models, optimizers, batches = pair(device, base, batch_size, lr, **stage)
    training = GraphedTraining(models[1], optimizers[1], batches, "fp32")
    for epoch in range(1, epochs + 1):
        plain = train_epoch(models[0], optimizers[0], batches.epoch(epoch), "fp32")
        assert training.epoch(epoch) == plain
        for optimizer in optimizers:  # as a scheduler does: the graph must not keep the old numbers
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert not training.failure and (device.type == "cpu" or training._replay)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        assert torch.equal(a, b), name
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][key]) for key, value in state.items()), number


@pytest.mark.parametrize(("base", "stage"), STAGES)
def test_equals_the_plain_loop(base, stage):
    assert_equal_runs(torch.device("cpu"), base, stage, epochs=2, batch_size=60)


@pytest.mark.cuda
@pytest.mark.parametrize(("base", "stage"), STAGES)
def test_graph_equals_the_plain_loop(base, stage):
    set_deterministic()
    try:
        # Three full steps an epoch: those of the first are eager, then come captures and replays.
        assert_equal_runs(torch.device("cuda"), base, stage, epochs=3, batch_size=40)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_set_smaller_than_a_batch():
    models, optimizers, batches = pair(torch.device("cpu"), torch.optim.SGD, batch_size=5000)
    plain = train_epoch(models[0], optimizers[0], batches.epoch(1), "fp32")
    assert GraphedTraining(models[1], optimizers[1], batches, "fp32").epoch(1) == plain


def test_loss_that_is_not_finite():
    models, optimizers, batches = pair(torch.device("cpu"), torch.optim.SGD)
    with torch.no_grad():
        models[1].fc.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss became nan at step 1"):
        GraphedTraining(models[1], optimizers[1], batches, "fp32").epoch(1)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_compiled_training_agrees_with_the_plain_one(name, no_compiled_code_of_before):
    """Weights after three steps, before they drift apart, as rounding makes them; the loss still after six."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler, g++")
    plain, compiled = (small_training(torch.device(name), compiled) for compiled in (False, True))
    before = plain.model.conv1.weight.detach().clone()
    assert compiled.epoch(1, "").loss == pytest.approx(plain.epoch(1, "").loss, rel=1e-4)
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(value, compiled.model.state_dict()[name], rtol=1e-3, atol=1e-5), name
    assert not torch.equal(plain.model.conv1.weight, before)
    assert compiled.epoch(2, "").loss == pytest.approx(plain.epoch(2, "").loss, rel=1e-4)


def test_compiling_without_a_compiler_is_one_line(monkeypatch, tmp_path, no_compiled_code_of_before):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "none")))
    with pytest.raises(UserError, match="^--compile 1 does not work here .*none.*: leave it out$"):
        small_training(torch.device("cpu"), compiled=True, classes=11).epoch(1, "")
