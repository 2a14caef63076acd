"""tools.benchmark_peers as a user runs it, on a network that is small enough for a test."""

import importlib.util
import json
import sys

import pytest
import torch

import tools.benchmark
from quant import PSGD, quantize_weights
from tests.helpers import ROOT, SmallNet, read_csv
from tools import benchmark_peers
from tools.benchmark_peers import BASE, GRID, training_step, with_method
from tools.peers import METHODS, OF_TORCHAO

CPU = torch.device("cpu")
HERE = [method for method in METHODS if method not in OF_TORCHAO or importlib.util.find_spec("torchao")]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(tools.benchmark, "WARM_UP", 0)
    monkeypatch.setattr(benchmark_peers, "NETWORKS", {"small": lambda: (SmallNet(100), torch.randn(8, 3, 8, 8))})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_for_each_method(cli, tmp_path):
    outcome = cli("tools.benchmark_peers", "--networks", "small", "--rounds", "1", "--device", "cpu", "--csv", "p.csv")
    assert outcome.code == 0, outcome.err
    rows = read_csv(tmp_path / "p.csv")
    assert [row["method"] for row in rows] == [BASE, *HERE] and all(float(row["milliseconds"]) > 0 for row in rows)
    assert (rows[0]["ratio"], rows[0]["extra_bytes"]) == ("1.0", "0")
    assert ("torchao" in outcome.out) == (list(METHODS) != HERE)
    assert "| PSGD | the optimizer is wrapped |" in outcome.out
    assert json.loads((tmp_path / "p.json").read_text())["rounds"] == 1


@pytest.mark.parametrize("method", HERE)
def test_the_network_computes_as_its_method_says(method):
    """In training by its own weights, or by weights on a grid; and a step moves the float weights."""
    torch.manual_seed(0)
    model, images = SmallNet(100), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        own, rounded = model.train()(images), quantize_weights(model, GRID).train()(images)
        optimizer = with_method(method, model)
        found = model(images)
    assert torch.equal(found, own) == (method in ("psgd", "msqe", *OF_TORCHAO))  # relaxed from the first step on
    assert torch.equal(found, rounded) == (method == "ste")
    before = model.conv2.weight.detach().clone()
    model(images).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.conv2.weight, before) and isinstance(optimizer, PSGD) == (method == "psgd")


def test_every_method_starts_from_the_same_weights(monkeypatch):
    found = []
    monkeypatch.setattr(benchmark_peers, "with_method", lambda method, model: found.append(model.fc.weight))
    for method in (BASE, *HERE):
        training_step("small", method, CPU)
    assert all(torch.equal(weight, found[0]) for weight in found) and len(found) == 1 + len(HERE)


def test_the_table_of_methods():
    """docs/performance.md has the table that tools.benchmark_peers makes of its file."""
    rows = read_csv(ROOT / "results/benchmarks/peers.csv")
    assert {row["method"] for row in rows} == {BASE, *METHODS}
    assert benchmark_peers.markdown(rows) in (ROOT / "docs/performance.md").read_text()
