"""PSG's pass over the weights, which goes piece by piece or is compiled, against the rule written down."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

from quant import PSGD, Grid, passes, psg_param_groups
from quant.grid import dims_with_scales
from quant.passes import scale_moves

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, g++")
SHAPES = [(40, 30), (5,), (), (24, 10, 3, 3), (8, 3, 3, 3), (1, 700), (3, 2, 501)]
CASES = {
    "a scale for each tensor": {"bits": 4},
    "a scale for each channel, eps": {"bits": 3, "per_channel": True, "psg_eps": 0.01},
    "a scale for each input": {"bits": 2, "scale_dims": (1,)},
    "zero": {"target": "zero"},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def group(request):
    return {"target": "grid", "per_channel": False, "psg_eps": 0.0} | request.param


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[0][3] = 0  # a channel without a range
    made[3] = made[3].to(memory_format=torch.channels_last)
    return made


def scaled(group, between=False, dtype=torch.float32, compiled=False):
    """What `scale_moves` makes of one set of moves."""
    weights, moves = ([tensor.to(dtype) for tensor in tensors(seed)] for seed in (0, 1))
    lambda_s = [torch.tensor(2.0 + index) for index in range(len(SHAPES))]
    scale_moves(moves, weights, group, lambda_s, between, compiled)
    assert equal(weights, [tensor.to(dtype) for tensor in tensors(0)])
    return moves


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def near(a, b):
    return len(a) == len(b) and all(map(torch.allclose, a, b))


@pytest.mark.parametrize("between", [False, True])
def test_the_rule(group, between):
    expected = []
    for index, (weight, move) in enumerate(zip(tensors(0), tensors(1))):
        apart = weight.abs()
        if group["target"] == "grid":
            own = dims_with_scales(weight, group["per_channel"], group.get("scale_dims"))
            dims = tuple(dim for dim in range(weight.dim()) if dim not in own)
            peak = weight.abs().amax(dims, keepdim=True)
            scale = torch.where(peak == 0, torch.tensor(1.0), peak / (2 ** (group["bits"] - 1) - 1))
            apart = (weight - torch.round(weight / scale) * scale).abs()
        factor, way = (2.0 + index) * apart + group["psg_eps"], move - weight if between else move
        expected.append(way * factor + (weight if between else 0))
    assert equal(scaled(group, between), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_pieces_of_any_size_give_the_same(group, piece, dtype, monkeypatch):
    monkeypatch.setattr(passes, "CPU_PIECE", 1 << 40)
    whole = [scaled(group, between, dtype) for between in (False, True)]
    monkeypatch.setattr(passes, "CPU_PIECE", piece)
    for between in (False, True):
        assert equal(scaled(group, between, dtype), whole[between])


@needs_compiler
def test_compiled_is_the_same(group, monkeypatch, no_compiled_code_of_before):
    monkeypatch.setattr(passes, "CPU_PIECE", 64)
    monkeypatch.setattr(passes, "WORTH_COMPILING", 1000)
    between = "psg_eps" in group and group["psg_eps"] > 0
    assert equal(scaled(group, between, compiled=True), scaled(group, between))


@pytest.mark.parametrize("acts_on", ["gradient", "update"])
def test_a_network_is_trained_alike_in_pieces(acts_on, monkeypatch):
    """The whole optimizer, lambda_s "auto" with it, and a copy of it from a pickle after the first step."""
    torch.manual_seed(0)
    start, ends = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3)), []
    for piece in (1 << 40, 100):
        monkeypatch.setattr(passes, "CPU_PIECE", piece)
        net = copy.deepcopy(start)
        groups = psg_param_groups(net, Grid(4, per_channel=True))
        base = (
            torch.optim.SGD(groups, lr=0.1) if acts_on == "gradient" else torch.optim.Adam(groups, betas=(0.0, 0.999))
        )
        optimizer = PSGD(base, "auto", acts_on=acts_on, steps=9)
        for step in range(4):
            for index, parameter in enumerate(net.parameters()):
                torch.manual_seed(10 * step + index)
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        ends.append(list(net.parameters()))
    # Of an update the mean square, which auto needs, is added up over the pieces.
    alike = equal if acts_on == "gradient" else near
    assert alike(*ends) and not near(ends[0], list(start.parameters()))


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 40])
def test_mean_squares_between(piece, monkeypatch):
    monkeypatch.setattr(passes, "CPU_PIECE", piece)
    starts, ends = tensors(0), tensors(1)
    expected = torch.stack([(end.double() - start.double()).square().mean() for start, end in zip(starts, ends)])
    torch.testing.assert_close(passes.mean_squares_between(starts, ends), expected.float())


@needs_compiler
def test_compiled_mean_squares_between(monkeypatch, no_compiled_code_of_before):
    monkeypatch.setattr(passes, "CPU_PIECE", 64)
    monkeypatch.setattr(passes, "WORTH_COMPILING", 1000)
    starts, ends = tensors(0), tensors(1)
    expected = passes.mean_squares_between(starts, ends)
    torch.testing.assert_close(passes.mean_squares_between(starts, ends, compiled=True), expected)


def test_compiled_stays_with_copies():
    optimizer = PSGD(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2, 2))], "bits": 4}], 0.1), compiled=True)
    assert copy.deepcopy(optimizer).compiled and pickle.loads(pickle.dumps(optimizer)).compiled
