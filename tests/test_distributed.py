"""Several processes of torchrun train the network that one process would, and share files, evaluation and failures."""

import copy
import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from quant import PSGD, psg_param_groups
from tests.helpers import ROOT
from utils.checkpoint import load_checkpoint
from utils.data.in_memory import InMemorySplit
from utils.data.specs import DATASETS
from utils.distributed import ALONE, World, join, leave, own_device
from utils.training.epochs import Training
from utils.training.evaluation import evaluate

SPEC = DATASETS["digits"]


def network():
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def images(count):
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return InMemorySplit(pixels, torch.randint(0, 10, (count,), generator=generator), SPEC)


def trained(world):
    """Two epochs of steps of 16, 16 and 11 images, which two processes cannot share equally; and their results."""
    model = network()
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.01, momentum=0.9), lambda_s=50)
    training = Training(model, optimizer, images(43).shuffled(16, 1, world), "fp32", world=world)
    results = [training.epoch(number, "") for number in (1, 2)]
    return model, [*results, evaluate(model, images(33), world=world)]


def normed(seed):
    """A batch norm that has seen images of its own."""
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)))
    return norm


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def process(rank, size, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world = join(torch.device("cpu"))
    assert world == World(rank, size)
    model, results = trained(world)
    norm = normed(rank)
    world.agree(norm)
    found = {"state": model.state_dict(), "results": [vars(r) for r in results], "mean": norm.running_mean}
    torch.save(found, f"{folder}/{rank}.pth")
    leave(world)


def test_processes_equal_one(tmp_path):
    size = 2
    torch.multiprocessing.spawn(process, (size, free_port(), tmp_path), nprocs=size)
    model, results = trained(ALONE)
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pth")
        assert torch.equal(found["mean"], normed(0).running_mean)  # every process has that of the first
        for name, value in model.state_dict().items():
            assert torch.allclose(found["state"][name], value, rtol=1e-4, atol=1e-6), name
        for ours, theirs in zip(results, found["results"], strict=True):
            assert theirs["top1"] == pytest.approx(ours.top1) and theirs["loss"] == pytest.approx(ours.loss, rel=1e-5)


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(torch.device("cpu")) is ALONE
    model = network()
    assert ALONE.wrap(model) is model
    before = copy.deepcopy(model.state_dict())
    ALONE.agree(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda:1", 0) == ("cuda:1", 0) and own_device(None, 2) == (None, 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda:1", 0) == own_device("cuda", 0) == ("cuda:3", 3)
    assert own_device(None, 0) == (None, 3) and own_device("cpu", 0)[0] == "cpu"


FLAGS = ["--dataset", "cifar10", "--arch", "squeezenet1_1", "--psg", "0", "--lr", "0.001", "--batch_size", "100"]
FLAGS += ["--device", "cpu", "--precision", "fp32", "--exp_name", "a"]


def torchrun(processes, folder, *flags, wait=True):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
               ROOT / "train.py", *map(str, flags)]  # fmt: skip
    started = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return started if not wait else (*started.communicate(timeout=300), started.returncode)


def test_a_wrong_flag_is_one_line_of_a_process(tmp_path):
    """Of the first, which the other one gives three seconds. On a busy machine the other may speak too, or alone."""
    _, err, code = torchrun(2, tmp_path, *FLAGS, "--decoupled_decay", 1)
    said = [line.partition("error: --decoupled_decay 1 needs --adam 1") for line in err.splitlines()]
    speakers = [speaker for speaker, message, _ in said if message]
    assert code != 0 and speakers and len(set(speakers)) == len(speakers) and not list(tmp_path.iterdir())
    assert set(speakers) <= {"", "process 1: "}


def test_a_signal_to_torchrun_is_one_line_of_one_process(tmp_path, few_digits):
    """torchrun itself writes what it does."""
    started = torchrun(2, tmp_path, *FLAGS, "--epoch", 500, wait=False)
    assert any(line.startswith("epoch   1 ") for line in started.stdout)
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=100)
    assert err.count("stopped by SIGTERM; python train.py --exp_name a --resume continues") == 1
    assert 'train.py", line' not in err and "error: " not in err and err.count("Traceback") <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_dies_ends_the_run_and_leaves_a_good_checkpoint(tmp_path, cli, few_digits):
    """One process writes, and another number of processes goes on."""
    started = torchrun(2, tmp_path, *FLAGS, "--epoch", 500, wait=False)
    last = tmp_path / "runs/a/last.pth"
    deadline = time.monotonic() + 200
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = started.communicate(timeout=100)
    assert started.returncode != 0
    assert "Signal 9 (SIGKILL)" in err
    assert "on 2 processes" in out and out.count("epoch   1 ") == 1
    done = load_checkpoint(last)["epoch"]
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", done + 1).code == 0
    assert load_checkpoint(last)["epoch"] == done + 1
    with open(tmp_path / "runs/a/metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(number) for number in range(1, done + 2)]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
    assert load_checkpoint(last)["state_dict"].keys() >= {"features.0.weight", "classifier.1.bias"}
