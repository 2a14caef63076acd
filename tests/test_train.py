"""train.py as a user runs it: real short runs on a few digits, resume, and what is answered to bad input."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from quant import Grid, grid_share, quantize_weights
from tests.helpers import ORDER, WORDS, SmallNet, permuted
from utils.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint, training_facts
from utils.data.in_memory import InMemorySplit
from utils.data.load import load_dataset
from utils.runs import RunFolder
from utils.training import run as training_run
from utils.training.evaluation import evaluate
from utils.training.goals import GridGoal, SparseGoal
from utils.training.run import WORTH_RENEWING, closing_remarks

pytestmark = pytest.mark.usefixtures("few_digits")
QUICK = ["--dataset", "cifar10", "--batch_size", "100", "--lr", "0.05", "--deterministic", "--device", "cpu"]
SMALL = ["--arch", "squeezenet1_1"]  # a tenth of ResNet32's time


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--arch", "ResNet8", "--w_bit", "3", "--granularity", "channel", "--clip_weights", "1"],
        ["--load_pretrained", "", "--adam", "1", "--lambda_s", "100", "--lr", "1e-3", *SMALL],
        ["--adam", "1", "--lr", "1e-3", "--psg_acts_on", "update", *SMALL],
        ["--psg", "0", *SMALL, "--precision", "bf16"],  # dropout: the RNG is resumed too
        ["--target", "zero", "--load_pretrained", "", "--lr", "0.01", "--l1", "1e-5", *SMALL],
    ],
    ids=["PSGD", "PSG with Adam", "PSG on Adam's update", "dropout, vanilla, in bf16", "sparse"],
)
def test_resumed_run_equals_the_uninterrupted_one(cli, tmp_path, flags):
    epochs, cut = 2, 1
    common = [*QUICK, *flags, "--decay_epoch", "2"]
    assert cli("train.py", *common, "--epoch", epochs, "--exp_name", "whole").code == 0
    assert cli("train.py", *common, "--epoch", cut, "--exp_name", "cut").code == 0
    # What a kill after the row was written and before the checkpoint was leaves behind.
    with open(tmp_path / "runs/cut/metrics.csv", "a") as file:
        file.write(f"{cut + 1},9,9,9")
    assert cli("train.py", "--exp_name", "cut", "--resume", "--epoch", epochs).code == 0
    whole, resumed = (load_checkpoint(tmp_path / "runs" / name / "last.pth") for name in ("whole", "cut"))
    assert whole["epoch"] == resumed["epoch"] == epochs
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key
    assert whole["scheduler"] == resumed["scheduler"]
    for a, b in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
    assert metrics(tmp_path / "runs/whole") == metrics(tmp_path / "runs/cut")
    settings = json.loads((tmp_path / "runs/cut/args.json").read_text())
    assert settings["resumed"][0]["after_epoch"] == cut


def test_resuming_on_a_log_that_another_program_has_written(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--psg", "0", "--precision", "fp32", "--exp_name", "a"]
    assert cli("train.py", *flags, "--epoch", "1").code == 0
    log = tmp_path / "runs/a/metrics.csv"
    written = log.read_text()
    log.write_text(written.replace(",", ";"))
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2")
    assert outcome.code == 2 and "runs/a/metrics.csv has no epochs: move it away" in outcome.err
    log.write_text(written.replace("\n1,", "\n1.0,"))
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2").code == 0
    assert [row["epoch"] for row in metrics(tmp_path / "runs/a")] == [1, 2]


def test_run_folder(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--psg", "0", "--exp_name", "a/b", "--epoch", "2", "--save_epochs", "1"]
    first = cli("train.py", *flags)
    assert first.code == 0 and "32 test images" in first.out and "step: plain loop" in first.out
    folder = tmp_path / "runs/a/b"
    settings = json.loads((folder / "args.json").read_text())
    assert settings["args"]["lr"] == 0.05 and settings["args"]["precision"] in ("fp32", "bf16")
    assert {"command", "commit", "torch", "device"} <= settings.keys()
    assert settings["machine"].endswith(" threads")
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"lr", "train_loss", "train_top1", "fp_top1", "w4_top1", "grid_share"} <= rows[0].keys()
    saved = load_checkpoint(folder / "epoch_1.pth")
    assert saved["epoch"] == 1 and saved["arch"] == "squeezenet1_1" and saved["num_classes"] == 10
    assert isinstance(saved["args"], dict) and saved["metrics"]["fp_top1"] == rows[0]["fp_top1"]
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("fp_top1")] == [1, 2]
    before = (folder / "metrics.csv").read_bytes()
    assert cli("train.py", *flags, "--epoch", "1").code == 0
    assert (folder / "metrics.csv").read_bytes() == before
    assert len(metrics(tmp_path / "runs/a/b-2")) == 1


def test_save_epochs_takes_epochs_and_ranges(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--psg", "0", "--exp_name", "a", "--save_epochs", "2-3", "1", "3"]
    assert cli("train.py", *flags, "--epoch", "2").code == 0
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", "4", "--save_epochs", "4").code == 0
    assert sorted(path.name for path in (tmp_path / "runs/a").glob("epoch_*")) == [
        "epoch_1.pth", "epoch_2.pth", "epoch_4.pth",
    ]  # fmt: skip
    settings = json.loads((tmp_path / "runs/a/args.json").read_text())
    assert settings["args"]["save_epochs"] == [1, 2, 3] and settings["resumed"][0]["save_epochs"] == [4]


def test_a_resume_goes_on_as_the_resume_before(cli, tmp_path, monkeypatch):
    """A run begun for one epoch in bfloat16, resumed for three in float32, cut off after its second, then resumed."""
    begun = [*QUICK, *SMALL, "--psg", "0", "--precision", "bf16", "--exp_name", "a", "--epoch", "1"]
    assert cli("train.py", *begun).code == 0
    save = save_checkpoint

    def cut_off(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "save_checkpoint", cut_off)
    changed = ["--epoch", "3", "--save_epochs", "3", "--precision", "fp32"]
    assert cli("train.py", "--exp_name", "a", "--resume", *changed).code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli("train.py", "--exp_name", "a", "--resume").code == 0
    assert len(metrics(tmp_path / "runs/a")) == 3 and (tmp_path / "runs/a/epoch_3.pth").exists()
    settings = json.loads((tmp_path / "runs/a/args.json").read_text())
    assert settings["args"]["precision"] == "bf16" and {r["precision"] for r in settings["resumed"]} == {"fp32"}


def test_a_decay_at_or_before_the_first_epoch_does_not_count(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--psg", "0", "--exp_name", "a", "--epoch", "2", "--decay_epoch", "1", "2"]
    assert cli("train.py", *flags).code == 0
    assert [row["lr"] for row in metrics(tmp_path / "runs/a")] == [0.05, pytest.approx(0.005)]


def test_a_weight_of_zeros_is_refused_before_the_run_begins(rejected, digits_run, tmp_path):
    checkpoint = load_checkpoint(digits_run)
    checkpoint["state_dict"]["fc.weight"].zero_()
    save_checkpoint(tmp_path / "zero.pth", checkpoint)
    flags = [*QUICK, "--arch", "ResNet8", "--load_pretrained", "zero.pth", "--epoch", "5"]
    assert "fc.weight is all zeros, which PSG never moves: use --eps 0.01" in rejected("train.py", *flags)


def test_run_folders_below_a_link_to_nowhere(rejected, tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    message = rejected("train.py", *QUICK, *SMALL, "--psg", "0", "--epoch", "1", "--exp_name", "a/b")
    assert "cannot be made" in message


def test_psg_starts_from_a_checkpoint(cli, tmp_path, digits_run):
    """Epochs go on from the checkpoint's, and the learning rate decays at its epoch."""
    flags = [*QUICK, "--arch", "ResNet8", "--load_pretrained", digits_run]
    outcome = cli("train.py", *flags, "--epoch", "5", "--decay_epoch", "5")
    assert outcome.code == 0
    rows = metrics(tmp_path / "runs/cifar10/4bits")
    assert [(row["epoch"], row["lr"]) for row in rows] == [(4, 0.05), (5, pytest.approx(0.005))]
    groups = load_checkpoint(tmp_path / "runs/cifar10/4bits/last.pth")["optimizer"]["param_groups"]
    assert [group.get("bits") for group in groups] == [4, None]
    assert groups[0]["lambda_s"] == 150 and groups[0]["weight_decay"] == 1e-4


def test_two_bits_set_weight_decay_to_zero_and_say_so(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--load_pretrained", "", "--w_bit", "2", "--epoch", "1"]
    outcome = cli("train.py", *flags, "--exp_name", "a")
    assert "weight decay 0 (as published at 2 bits; --w_decay overrides)" in outcome.out
    assert json.loads((tmp_path / "runs/a/args.json").read_text())["args"]["w_decay"] == 0
    cli("train.py", *flags, "--w_decay", "0.001", "--exp_name", "b")
    groups = load_checkpoint(tmp_path / "runs/b/last.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.001}


def test_adam_learning_rate_is_the_published_one(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--load_pretrained", "", "--adam", "1", "--lr", "1e-4", "--epoch", "1", "--exp_name", "a"]
    assert cli("train.py", *flags).code == 0
    assert metrics(tmp_path / "runs/a")[0]["lr"] == pytest.approx(1e-4 * 0.01 * 150)


def test_sparse_training(cli, tmp_path, digits_run):
    """Target zero scales by |w| and is watched pruned; its columns name the sparsity."""
    flags = [*QUICK, "--arch", "ResNet8", "--load_pretrained", digits_run]
    flags += ["--target", "zero", "--sparsity", "0.75", "--lambda_s", "20"]
    outcome = cli("train.py", *flags, "--epoch", "4", "--exp_name", "a")
    assert outcome.code == 0 and "PSG for S75, lambda_s 20" in outcome.out and "  S75 " in outcome.out
    (row,) = metrics(tmp_path / "runs/a")
    assert "s75_top1" in row and "grid_share" not in row
    cure = "batch norm may help: python eval.py --model_path runs/a/last.pth --sparsity 0.75 --post bn_reestimate\n"
    assert (cure in outcome.out) == (row["fp_top1"] - row["s75_top1"] > WORTH_RENEWING)
    checkpoint = load_checkpoint(tmp_path / "runs/a/last.pth")
    groups = checkpoint["optimizer"]["param_groups"]
    assert [group.get("target") for group in groups] == ["zero", None] and len(groups[0]["params"]) == 10
    assert training_facts(checkpoint)["trained"] == "PSGD sparse"
    assert cli("eval.py", "--model_path", "runs/a/last.pth", "--sparsity", "0.75", "--out", "b").code == 0
    with open(tmp_path / "b/results.csv", newline="") as file:
        evaluated = list(csv.DictReader(file))
    assert float(evaluated[1]["top1"]) == pytest.approx(row["s75_top1"], abs=1e-3)


def test_the_flags_of_a_goal_are_those_of_its_deployed_network():
    assert (GridGoal(Grid(2)).flags, SparseGoal(0.9).flags) == ("--w_bit 2", "--sparsity 0.9")
    whole = [GridGoal(Grid(2, first_last=False)), SparseGoal(0.9, first_last=False)]
    assert all(goal.flags.endswith(" --first_last_quant 0") for goal in whole)


@pytest.mark.parametrize("psg, model, low, said", [
    (1, SmallNet(), 89.4, True), (1, SmallNet(), 89.6, False), (0, SmallNet(), 50.0, False),
    (1, nn.Linear(3, 2), 50.0, False),
])  # fmt: skip
def test_a_network_that_re_estimated_batch_norm_may_help(psg, model, low, said):
    run = SimpleNamespace(args=SimpleNamespace(psg=psg), model=model, goal=GridGoal(Grid(2)))
    found = closing_remarks(run, RunFolder(Path("runs/a b")), {"fp_top1": 90.0, "w2_top1": low})
    command = "python eval.py --model_path 'runs/a b/last.pth' --w_bit 2 --post bn_reestimate"
    assert found == ([f"W2 is 0.6 points below FP: re-estimated batch norm may help: {command}"] if said else [])


@pytest.mark.parametrize("flags, name", [(["--l1", "1e-4"], "SGD L1"), (["--grad_l1", "1e-2"], "SGD grad-L1")])
def test_penalties_change_the_run_and_are_named(cli, tmp_path, flags, name):
    common = [*QUICK, *SMALL, "--psg", "0", "--epoch", "1", "--lr", "0.01"]
    assert cli("train.py", *common, "--exp_name", "plain").code == 0
    assert cli("train.py", *common, *flags, "--exp_name", "penalised").code == 0
    plain, penalised = (load_checkpoint(tmp_path / f"runs/{run}/last.pth") for run in ("plain", "penalised"))
    assert training_facts(penalised)["trained"] == name and training_facts(plain)["trained"] == "SGD"
    assert not torch.equal(plain["state_dict"]["features.0.weight"], penalised["state_dict"]["features.0.weight"])


def test_flags_reach_what_they_set(cli, tmp_path, monkeypatch):
    """The images that are trained on and looked at, the seeds, the algorithms, and every setting of PSG."""
    shuffled, seed, used, seeds, algorithms = InMemorySplit.shuffled, torch.manual_seed, [], [], []

    def noted(split, batch_size, seed, world):
        used.append((len(split), batch_size, seed))
        return shuffled(split, batch_size, seed, world)

    monkeypatch.setattr(InMemorySplit, "shuffled", noted)
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **_: algorithms.append(on))
    flags = [*QUICK, *SMALL, "--seed", "5", "--val_split", "28", "--epoch", "1", "--exp_name", "a", "--w_bit", "3"]
    flags += ["--granularity", "channel", "--first_last_quant", "0", "--eps", "0.01", "--lambda_s", "7", "--lr", "0.01"]
    flags += ["--psg_acts_on", "update", "--precision", "bf16"]  # which evaluation does not follow
    outcome = cli("train.py", *flags)
    assert outcome.code == 0 and "28 validation images" in outcome.out
    assert "squeezenet1_1 on cifar10 from scratch" in outcome.out
    assert used == [(100, 100, 5)] and seeds[0] == 5 and 5 * 2**20 + 1 in seeds and algorithms[0] is True
    checkpoint = load_checkpoint(tmp_path / "runs/a/last.pth")
    group, others = checkpoint["optimizer"]["param_groups"]
    assert (group["bits"], group["per_channel"], group["psg_eps"], group["lambda_s"]) == (3, True, 0.01, 7)
    assert group["acts_on"] == "update"
    assert "bits" not in others and len(others["params"]) > 2  # the biases, the first layer and the last
    model = model_from_checkpoint(checkpoint, "a")
    held_out = load_dataset("cifar10", "data", torch.device("cpu")).train.part(slice(-28, None))
    quantized = quantize_weights(model, Grid(3, first_last=False, per_channel=True))
    (row,) = metrics(tmp_path / "runs/a")
    for name, network in (("fp", model), ("w3", quantized)):
        assert row[f"{name}_loss"] == pytest.approx(evaluate(network, held_out).loss, rel=1e-4)
    assert row["grid_share"] == pytest.approx(grid_share(model, Grid(3, first_last=False, per_channel=True)))


def test_cu_num_without_a_gpu_says_so(cli):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags = [flag for flag in QUICK if flag not in ("--device", "cpu")]
    outcome = cli("train.py", *flags, *SMALL, "--psg", "0", "--epoch", "1", "--cu_num", "0")
    assert "device: cpu (no CUDA GPU found)" in outcome.out


def test_loss_that_explodes_stops_the_run(cli, tmp_path):
    outcome = cli("train.py", *QUICK, *SMALL, "--psg", "0", "--lr", "1e20", "--epoch", "2", "--exp_name", "a")
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
    assert " of epoch 1;" in outcome.err and "last good checkpoint: none" in outcome.err


SCRATCH = ["--dataset", "digits", "--load_pretrained", ""]


def test_checkpoint_of_another_network(rejected, digits_run):
    flags = ["--dataset", "digits", "--load_pretrained", digits_run, "--arch", "vgg16_bn"]
    assert "is a ResNet8, but --arch is vgg16_bn" in rejected("train.py", *flags)


def test_checkpoint_of_another_class_count(rejected, digits_run, tmp_path):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    labels = np.arange(4)
    np.savez(tmp_path / "cifar100.npz", x_train=images, y_train=labels, x_test=images, y_test=labels,
             classes=np.array([f"c{n}" for n in range(100)]))  # fmt: skip
    flags = ["--data_dir", tmp_path, "--load_pretrained", digits_run]
    assert "has 10 classes, but the data set has 100" in rejected("train.py", *flags)


def test_resume_with_other_settings(cli, tmp_path):
    assert cli("train.py", *QUICK, *SMALL, "--psg", "0", "--epoch", "1", "--exp_name", "a").code == 0
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--lr", "0.2", "--epoch", "2")
    assert outcome.code == 2 and "started with other settings: --lr 0.2 (was 0.05)" in outcome.err
    assert load_checkpoint(tmp_path / "runs/a/last.pth")["epoch"] == 1


def test_resume_from_a_file_without_run_state(cli, tmp_path):
    assert cli("train.py", *QUICK, *SMALL, "--psg", "0", "--epoch", "1", "--exp_name", "a").code == 0
    path = tmp_path / "runs/a/last.pth"
    checkpoint = load_checkpoint(path)
    del checkpoint["optimizer"]
    torch.save(checkpoint, path)
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2")
    assert outcome.code == 2 and "lacks optimizer: a run cannot be resumed from it" in outcome.err
    (tmp_path / "runs/a/args.json").write_text("{}")
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2")
    assert outcome.code == 2 and "args.json cannot be read (it has no args of train.py)" in outcome.err


def test_unwritable_run_folder(rejected, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    assert "run folder runs/a cannot be made" in rejected("train.py", *SCRATCH, "--exp_name", "a", "--epoch", "1")


def renamed_classes(order, names=None):
    """data/cifar10.npz anew, with its classes in another order, or under other names."""
    permuted(Path("data/cifar10.npz"), order, names)


def test_a_resume_keeps_the_order_of_the_classes(cli, tmp_path):
    """The resumed run equals the uninterrupted one, though the data set counts its classes otherwise by then."""
    flags = [*QUICK, *SMALL, "--psg", "0", "--precision", "fp32", "--lr", "0.01"]
    assert cli("train.py", *flags, "--epoch", "2", "--exp_name", "whole").code == 0
    assert cli("train.py", *flags, "--epoch", "1", "--exp_name", "cut").code == 0
    renamed_classes(ORDER)
    assert cli("train.py", "--exp_name", "cut", "--resume", "--epoch", "2").code == 0
    whole, resumed = (load_checkpoint(tmp_path / "runs" / name / "last.pth") for name in ("whole", "cut"))
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert whole["classes"] == resumed["classes"] == [str(number) for number in range(10)]
    assert metrics(tmp_path / "runs/whole") == metrics(tmp_path / "runs/cut")
    renamed_classes(range(10), WORDS)
    outcome = cli("train.py", "--exp_name", "cut", "--resume", "--epoch", "3")
    assert outcome.code == 2 and "cut/last.pth is for other classes than the data set: its '0' is not" in outcome.err


def test_pretrained_on_classes_of_other_names_or_in_another_order(cli, tmp_path):
    flags = [*QUICK, *SMALL, "--psg", "0", "--lr", "0.01"]
    assert cli("train.py", *flags, "--epoch", "1", "--exp_name", "a").code == 0
    renamed_classes(ORDER)
    more = [*flags, "--load_pretrained", "runs/a/last.pth", "--epoch", "2", "--exp_name"]
    outcome = cli("train.py", *more, "b")
    assert outcome.code == 0 and "warning" not in outcome.err
    assert load_checkpoint(tmp_path / "runs/b/last.pth")["classes"] == [str(number) for number in range(10)]
    renamed_classes(range(10), WORDS)
    outcome = cli("train.py", *more, "c")
    assert outcome.code == 0
    assert "warning: runs/a/last.pth is for other classes than the data set: its '0' is not" in outcome.err
    assert load_checkpoint(tmp_path / "runs/c/last.pth")["classes"] == WORDS


def test_a_teacher_changes_what_is_learned_and_is_named(cli, tmp_path, rejected):
    words = [*QUICK, *SMALL, "--load_pretrained", "", "--psg", "0", "--epoch", "1"]
    assert cli("train.py", *words, "--exp_name", "alone").code == 0
    assert cli("train.py", *words, "--teacher", "runs/alone/last.pth", "--exp_name", "taught").code == 0
    alone, taught = (load_checkpoint(tmp_path / f"runs/{name}/last.pth") for name in ("alone", "taught"))
    # The first step sees the same images, network and labels, so only the teacher can change the second one.
    assert alone["metrics"]["train_loss"] != taught["metrics"]["train_loss"]
    assert training_facts(taught)["trained"] == "SGD teacher"
    for classes, words_of_error in ((alone["classes"][::-1], "in another order"), (["a"] * 10, "other classes")):
        save_checkpoint(tmp_path / "other.pth", alone | {"classes": classes})
        assert words_of_error in rejected("train.py", *words, "--teacher", "other.pth")
    assert "no checkpoint at none.pth" in rejected("train.py", *words, "--teacher", "none.pth")
