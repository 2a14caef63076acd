"""What a loop shows while it runs, on a terminal and elsewhere."""

import io

import pytest
import torch

from tests.helpers import small_training
from utils import progress
from utils.data.in_memory import InMemorySplit
from utils.data.specs import DATASETS
from utils.progress import duration, shown
from utils.training.evaluation import evaluate
from utils.training.graph import GraphedTraining


@pytest.fixture
def at_every_step(monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)


def test_lines_where_there_is_no_terminal(capsys, at_every_step):
    assert list(shown("abc", "epoch 1/9", 3)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == "" and err == "epoch 1/9: step 1 of 3, 0 s left\nepoch 1/9: step 2 of 3, 0 s left\n"
    assert list(shown("abc", "epoch 1/9", 3, silent=True)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_short_loop_writes_nothing(capsys):
    assert list(shown("abc", "epoch 1/9", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_the_time_left(capsys, monkeypatch):
    """A step takes 20 s, so a line comes after every second one."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert len(list(shown(range(8), "a", 8))) == 8
    lines = capsys.readouterr().err.splitlines()
    left = ["1 of 8, 4 min 40 s", "3 of 8, 2 min 13 s", "5 of 8, 1 min 12 s", "7 of 8, 23 s"]
    assert lines == [f"a: step {words} left" for words in left]


def test_durations():
    assert [duration(s) for s in (0.2, 59.4, 59.6, 3599, 3600, 7625)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 07 min",
    ]  # fmt: skip


def test_a_bar_on_a_terminal(monkeypatch, at_every_step):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(shown("abc", "epoch 1/9", 3)) == ["a", "b", "c"]
    assert "step" not in terminal.getvalue()


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_training_shows_its_steps_by_either_loop(capsys, at_every_step, name):
    """60 digits are two steps of 25 and one of 10, which the graph's loop takes by itself."""
    training = small_training(torch.device(name), compiled=False)
    training.epoch(1, "epoch 1/2")
    graphed = GraphedTraining(training.model, training.optimizer, training.batches, "fp32")
    graphed.epoch(2, "epoch 2/2")
    lines = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    plain = ["epoch 1/2: step 1 of 3", "epoch 1/2: step 2 of 3"] if name == "cpu" else ["epoch 1/2: step 1 of 2"]
    assert lines == [*plain, "epoch 2/2: step 1 of 2"]


def test_an_evaluation_shows_its_steps(capsys, at_every_step):
    pixels = torch.zeros(250, 32, 32, 3, dtype=torch.uint8)
    split = InMemorySplit(pixels, torch.zeros(250, dtype=torch.int64), DATASETS["digits"])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    evaluate(model, split)
    lines = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["evaluation: step 1 of 3", "evaluation: step 2 of 3"]  # of 100 images each
