"""tools.benchmark_optimizer as a user runs it, and its measure of memory against tensors of a known size."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import tools.benchmark
from tests.helpers import ROOT, read_csv
from tools import benchmark_optimizer
from tools.benchmark_optimizer import KINDS, Steps


def test_a_row_for_each_kind_of_step(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.benchmark, "WARM_UP", 0)
    monkeypatch.setitem(
        benchmark_optimizer.NETWORKS, "ResNet-50", lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    )
    flags = ["--rounds", "1", "--compiled", "0", "--device", "cpu", "--csv", "o.csv"]
    outcome = cli("tools.benchmark_optimizer", "--networks", "ResNet-32", "ResNet-50", *flags)
    assert outcome.code == 0, outcome.err
    rows = read_csv(tmp_path / "o.csv")
    for network, size in (("ResNet-32", 472_756), ("ResNet-50", 46)):
        own = [row for row in rows if row["network"] == network]
        assert [row["kind"] for row in own if row["optimizer"] == "SGD"] == ["", *KINDS]
        assert {int(row["parameters"]) for row in own} == {size} and all(float(row["milliseconds"]) > 0 for row in own)
    assert "| PSGD(AdamW) | a scale for each tensor |" in outcome.out
    assert json.loads((tmp_path / "o.json").read_text())["rounds"] == 1


def test_the_steps_are_those_of_their_kind():
    """A step of each kind from the same gradients: lambda_s and the scales are those that it names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30))
    steps = Steps("SGD", model, compiled=False)
    scaled = []
    for kind, piece in steps.pieces().items():
        steps.restore_gradients()
        piece()
        (group,) = [group for group in steps.optimizer.param_groups if "bits" in group]
        assert kind == "SGD" or {key: group[key] for key in KINDS[kind]} == KINDS[kind]
        scaled.append(model[0].weight.grad.clone())
    assert torch.equal(scaled[0], steps.gradients[0])
    assert not any(torch.equal(a, b) for a, b in pairwise(scaled))


PEAK = """
import torch
from tools.benchmark_optimizer import Memory
memory = Memory(torch.device("cpu"))
for megabytes in (1, 100, 200):
    memory.start()
    torch.ones(megabytes << 18).mul(2)  # two tensors
    print(memory.peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_call():
    """In a process of its own: what earlier tests allocated and freed would be used again, unseen. The first call loads
    code of torch, whose size is the machine's."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()[1:]] == pytest.approx([200 << 20, 400 << 20], rel=0.1)
