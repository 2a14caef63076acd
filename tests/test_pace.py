"""The pace of real runs: what train.py plans, logs and says, and how a run is resumed."""

import csv
import json
import re
import shutil

import pytest
import torch
from torch import nn

from quant import PSGD, expected_share
from tests.helpers import read_csv
from utils.training.pace import PaceWatch

QUICK = ["--dataset", "cifar10", "--batch_size", "32", "--device", "cpu", "--arch", "squeezenet1_1"]  # 4 steps an epoch


def test_a_run_with_auto_is_resumed_as_it_was(cli, tmp_path, few_digits):
    flags = [*QUICK, "--lambda_s", "auto", "--deterministic", "--lr", "1e-4", "--decay_epoch", "3"]
    assert cli("train.py", *flags, "--epoch", 4, "--save_epochs", 2, "--exp_name", "whole").code == 0
    cut = shutil.copytree(tmp_path / "runs/whole", tmp_path / "runs/cut")
    (cut / "epoch_2.pth").replace(cut / "last.pth")
    assert cli("train.py", "--exp_name", "cut", "--resume").code == 0
    whole, again = (read_csv(tmp_path / f"runs/{name}/metrics.csv") for name in ("whole", "cut"))
    keys = ["train_loss", "grid_share", "tau", "expected_share", "lambda_s"]
    assert [[row[key] for key in keys] for row in whole] == [[row[key] for key in keys] for row in again]
    # 16 steps: the first 12 at the limit of 0.1, which a step never exceeds, the last 4 as fast at a tenth of the rate
    taus = [float(row["tau"]) for row in whole]
    assert 0.02 < taus[0] <= 0.0401 and taus[1] <= 0.0801 and taus[2] <= 0.1201 and taus[3] > taus[2]
    assert float(whole[0]["expected_share"]) == pytest.approx(expected_share(taus[0]), abs=0.001)


def test_the_middle_of_a_run_says_where_it_will_end(cli, few_digits):
    short = cli("train.py", *QUICK, "--lr", "1e-4", "--lambda_s", "auto", "--epoch", 3, "--exp_name", "a")
    told = [line for line in short.out.splitlines() if "will be near the grid" in line]
    # 1334 = 1000 / 0.75 steps, 4 an epoch, at the limit of 0.1, which steps with large gradients do not reach
    (line,) = told
    epochs = re.fullmatch(r"about 22 % .* near the grid at the end: train for (\d+) epochs or more", line)[1]
    assert 334 <= int(epochs) < 700
    assert short.out.index(told[0]) > short.out.index("epoch   2")
    weak = cli("train.py", *QUICK, "--lr", "1e-4", "--lambda_s", "1e-3", "--epoch", 2, "--exp_name", "b")
    assert "about 20 % of the weights will be near the grid at the end: use --lambda_s auto, a larger" in weak.out


def test_a_run_of_an_older_version_gets_the_new_columns(cli, tmp_path, few_digits):
    """Its optimizer kept no record of the pace, so there is none to show; --lambda_s and the log stay as they were."""
    assert cli("train.py", *QUICK, "--epoch", 1, "--exp_name", "old").code == 0
    path = tmp_path / "runs/old/last.pth"
    saved = torch.load(path, weights_only=True)
    for group in saved["optimizer"]["param_groups"]:
        group.pop("steps", None)
    saved["optimizer"]["state"] = {
        key: {k: v for k, v in own.items() if k != "psg_pace"} for key, own in saved["optimizer"]["state"].items()
    }
    torch.save(saved, path)
    outcome = cli("train.py", "--exp_name", "old", "--resume", "--epoch", 2)
    assert outcome.code == 0, outcome.err
    first, second = read_csv(tmp_path / "runs/old/metrics.csv")
    assert first["tau"] and second["tau"] == "" and second["grid_share"] and None not in second


def test_columns_that_came_later_are_added(cli, tmp_path, few_digits):
    assert cli("train.py", *QUICK, "--epoch", 1, "--exp_name", "old").code == 0
    path = tmp_path / "runs/old/metrics.csv"
    rows = read_csv(path)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "tau"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert cli("train.py", "--exp_name", "old", "--resume", "--epoch", 2).code == 0
    first, second = read_csv(path)
    assert first["tau"] == "" and float(second["tau"]) > 0 and None not in second
    assert first["train_loss"] == rows[0]["train_loss"] and first["epoch"] == "1" and second["epoch"] == "2"


def test_auto_needs_a_walk(rejected, few_digits):
    error = rejected("train.py", *QUICK, "--adam", 1, "--lambda_s", "auto")
    assert "--lambda_s auto with --adam 1 needs --psg_acts_on update" in error


def test_adam_on_updates_has_a_pace(cli, tmp_path, few_digits):
    flags = ["--adam", 1, "--psg_acts_on", "update", "--lambda_s", "auto", "--lr", "1e-4", "--epoch", 1]
    assert cli("train.py", *QUICK, *flags, "--exp_name", "a").code == 0
    assert float(read_csv(tmp_path / "runs/a/metrics.csv")[0]["tau"]) == pytest.approx(0.03, abs=0.011)
    assert cli("train.py", *QUICK, "--adam", 1, "--lr", "1e-4", "--epoch", 1, "--exp_name", "b").code == 0
    assert "tau" not in read_csv(tmp_path / "runs/b/metrics.csv")[0]  # Adam cancels lambda_s on gradients


def test_a_loss_that_rises_is_said_and_slows_auto():
    weight = nn.Parameter(torch.tensor([7.0, 0.3, 0.4]))
    optimizer = PSGD(torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1), "auto", steps=100)
    pace = PaceWatch(optimizer, 1, 10, [])
    said = []
    for epoch, loss in enumerate((1.0, 0.8, 1.05, 1.2, 1.2), 1):
        weight.grad = torch.tensor([0.0, 1.0, -1.0])
        optimizer.step()
        said.append(pace.after_epoch(epoch, loss)[1])
    assert said[:3] == [[], [], []] and said[3] == ["the loss rose to 1.2: lambda_s auto goes on at half the pace"]
    assert len(said[4]) == 1 and "of the weights will be near the grid at the end" in said[4][0]


@pytest.mark.parametrize(("decays", "silent"), [([], True), ([5], False)])
def test_a_decay_that_stops_the_walk_is_foreseen(decays, silent):
    """Each epoch adds 0.9 to tau at the first rate: 9 in ten epochs, or 4.5 where the rate falls for the last five."""
    weight = nn.Parameter(torch.tensor([7.0, 0.3, 0.4]))
    base = torch.optim.SGD([{"params": [weight], "bits": 4}], lr=0.1)
    pace = PaceWatch(PSGD(base, 1.0, steps=10), 0, 9, decays)
    for epoch in range(5):
        weight.grad = 9.5 * torch.tensor([0.0, 1.225, -1.225])  # mean square 90
        pace.optimizer.step()
        _, lines = pace.after_epoch(epoch, 1.0)
    assert bool(lines) != silent


def test_the_law_of_a_recorded_run(cli, rejected, tmp_path, few_digits):
    """Of a run that logged no tau, it is near the one that was logged; the weights of this run hardly move."""
    assert cli("train.py", *QUICK, "--psg", 0, "--epoch", 1, "--exp_name", "start").code == 0
    flags = ["--load_pretrained", "runs/start/last.pth", "--lr", "1e-5", "--lambda_s", "1000", "--epoch", 4]
    assert cli("train.py", *QUICK, *flags, "--decay_epoch", 4, "--exp_name", "new").code == 0
    shutil.copytree(tmp_path / "runs/new", tmp_path / "runs/old")
    logged = read_csv(tmp_path / "runs/new/metrics.csv")
    with open(tmp_path / "runs/old/metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in logged[0] if key != "tau"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(logged)
    assert cli("tools.pace", "--runs", "runs/new", "runs/old", "--labels", "a", "b", "--out", "p").code == 0
    rows = read_csv(tmp_path / "p/pace.csv")
    new, old = ([row for row in rows if row["run"] == label] for label in "ab")
    assert [row["tau"] for row in new] == [row["tau"] for row in logged] and new[0]["tau_from"] == "run"
    for ours, theirs in zip(old, new, strict=True):
        assert float(ours["tau"]) == pytest.approx(float(theirs["tau"]), rel=0.5)
        assert ours["grid_share"] == theirs["grid_share"] and ours["tau_from"] == "law"
    record = json.loads((tmp_path / "runs/old/args.json").read_text())
    for key, value, message in (
        ("load_pretrained", "", "runs/old began without a checkpoint"),
        ("lambda_s", "auto", "runs/old has lambda_s auto, and neither its tau nor lambda_s was logged"),
        ("first_last_quant", 0, "runs/old has --clip_weights 1 or --first_last_quant 0, which are not computed"),
    ):
        changed = record | {"args": record["args"] | {key: value}}
        (tmp_path / "runs/old/args.json").write_text(json.dumps(changed))
        assert message in rejected("tools.pace", "--runs", "runs/old", "--out", "q")
    for run, key in (("old", "batch_size"), ("new", "w_bit")):
        changed = record | {"args": {name: value for name, value in record["args"].items() if name != key}}
        (tmp_path / f"runs/{run}/args.json").write_text(json.dumps(changed))
        assert f"args.json has no {key}: it is not" in rejected("tools.pace", "--runs", f"runs/{run}", "--out", "q")
    first, _, last = (float(row["tau"]) for row in old)
    assert last - float(old[1]["tau"]) == pytest.approx(first / 100, rel=1e-3)  # the rate is a tenth
    assert cli("visualize.py", "--figure", "pace", "--results", "p/pace.csv", "--out", "f").code == 0
    assert (tmp_path / "f/pace.png").stat().st_size > 10_000


def test_runs_without_a_law(cli, rejected, tmp_path, few_digits):
    assert cli("train.py", *QUICK, "--psg", 0, "--epoch", 1, "--exp_name", "plain").code == 0
    assert cli("train.py", *QUICK, "--adam", 1, "--lr", "1e-4", "--epoch", 1, "--exp_name", "adam").code == 0
    assert "runs/plain is not a run of PSG for a grid" in rejected("tools.pace", "--runs", "runs/plain", "--out", "p")
    assert "the law is not for it" in rejected("tools.pace", "--runs", "runs/adam", "--out", "p")
    assert "two runs have the label a: give --labels that differ" in rejected("tools.pace", "--runs", "b/a", "c/a")
    assert "2 --labels for 1 --runs" in rejected("tools.pace", "--runs", "a", "--labels", "a", "b")
    assert "runs/none/args.json cannot be read" in rejected("tools.pace", "--runs", "runs/none", "--out", "p")
    (tmp_path / "runs/plain/args.json").write_text('{"args": {"psg": 1, "w_bit": 4}}')
    for columns in ("tau", "tau,expected_share"):
        (tmp_path / "runs/plain/metrics.csv").write_text(f"epoch,lr,grid_share,{columns}\n1,0.1,0.5,1,\n2,0.1,0.6,,\n")
        error = rejected("tools.pace", "--runs", "runs/plain", "--out", "p")
        assert "metrics.csv" in error and ("expected_share" in error or "tau is ''" in error)
    (tmp_path / "pace.csv").write_text("run,tau,grid_share\na,nan,0.5\n")
    error = rejected("visualize.py", "--figure", "pace", "--results", "pace.csv", "--out", "f")
    assert "tau is nan, which has no place in a figure" in error
