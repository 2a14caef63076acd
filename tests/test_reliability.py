"""Runs that are killed, stopped, started twice, out of disk or fed by strangers: nothing is lost and nothing trusted.

The long form: KILLS=50 SOAK=200 python -m pytest tests/test_reliability.py -s
"""

import contextlib
import csv
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models import ResNet32
from tests.helpers import ROOT
from utils.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from utils.cli import UserError
from utils.runs import RunFolder

KILLS, SOAK = int(os.environ.get("KILLS", "2")), int(os.environ.get("SOAK", "16"))
pytestmark = pytest.mark.usefixtures("few_digits")
# A network whose epoch takes a fraction of a second, with dropout and without batch norm's slowness.
FLAGS = ["--dataset", "cifar10", "--arch", "squeezenet1_1", "--lr", "0.001", "--batch_size", "64", "--lambda_s", "20"]
FLAGS += ["--device", "cpu", "--precision", "fp32", "--deterministic"]


def start(folder, *flags, script="train.py", apart=False):
    """The process of a command; `apart`: in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)], cwd=folder, text=True, start_new_session=apart,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def files_up_to(size):
    """No file of this process may grow over `size` bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for(process, words):
    """Reads the process's output up to a line that begins with `words`; False if it ends before."""
    return any(line.startswith(words) for line in process.stdout)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(file)]


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "seconds" not in tag]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_kill_at_random_moments(tmp_path):
    """After its first epoch, then within two of each resume; what comes out equals the run that nobody killed."""
    generator = random.Random(1)
    process = start(tmp_path, "--exp_name", "killed", "--epoch", 1000, *FLAGS)
    assert wait_for(process, "epochs "), process.stderr.read()
    begun = time.monotonic()
    assert wait_for(process, "epoch   1 "), process.stderr.read()
    an_epoch = time.monotonic() - begun
    for _ in range(KILLS - 1):
        process.kill()
        process.communicate()
        process = start(tmp_path, "--exp_name", "killed", "--epoch", 1000, "--resume")
        assert wait_for(process, "epochs "), process.stderr.read()
        time.sleep(generator.uniform(0, 2 * an_epoch))
    process.kill()
    process.communicate()
    last = load_checkpoint(tmp_path / "runs/killed/last.pth")["epoch"] + 1
    for flags in (["killed", "--resume"], ["whole", *FLAGS]):
        process = start(tmp_path, "--epoch", last, "--exp_name", *flags)
        _, err = process.communicate()
        assert process.returncode == 0, err
    killed, whole = (load_checkpoint(tmp_path / "runs" / name / "last.pth") for name in ("killed", "whole"))
    assert killed["epoch"] == whole["epoch"] == last
    assert all(torch.equal(value, killed["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert rows(tmp_path / "runs/killed") == rows(tmp_path / "runs/whole")
    assert [row["epoch"] for row in rows(tmp_path / "runs/killed")] == [str(n) for n in range(1, last + 1)]
    assert scalars(tmp_path / "runs/killed") == scalars(tmp_path / "runs/whole")
    assert not list((tmp_path / "runs/killed").glob("*.tmp"))
    print(f"{KILLS} kills, {last} epochs of {an_epoch:.1f} s")


def test_a_signal_ends_the_run_in_good_order(tmp_path, cli):
    process = start(tmp_path, *FLAGS, "--exp_name", "a", "--epoch", 1000)
    assert wait_for(process, "epoch   1 ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 143
    assert "stopped by SIGTERM; python train.py --exp_name a --resume continues" in err
    assert "Traceback" not in err
    done = load_checkpoint(tmp_path / "runs/a/last.pth")["epoch"]
    assert len(rows(tmp_path / "runs/a")) == done
    outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", done + 1)
    assert outcome.code == 0 and f"epoch {done + 1:3d} " in outcome.out


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    """A folder of two classes, with more training images than a test waits for."""
    folder = tmp_path_factory.mktemp("images")
    for part, count in (("train", 300), ("val", 2)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16)).save(folder / part / name / f"{number}.png")
    return folder


def with_children(pid):
    """`pid` and what it has started, each process after its own."""
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [*(found for child in path.read_text().split() for found in with_children(int(child))), pid]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number, at_once", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_to_every_process_is_one_line(tmp_path, many_images, number, at_once):
    """As a terminal, SLURM and systemd send it: to the processes that read images too, and to these first."""
    flags = ["--dataset", "imagefolder", "--data_dir", many_images, "--workers", "2", *FLAGS[2:-1]]
    process = start(tmp_path, *flags, "--batch_size", "8", "--exp_name", "a", "--epoch", "9", apart=True)
    assert wait_for(process, "epochs ")
    while len(processes := with_children(process.pid)) < 3:
        time.sleep(0.05)
    time.sleep(0.5)  # so that they are in the midst of their images
    if at_once:
        os.killpg(process.pid, number)
    else:
        for pid in processes:
            os.kill(pid, number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert err == f"stopped by {number.name}; no epoch is complete yet: run the same command to start over\n"


def test_a_reader_of_images_that_is_killed_is_one_line(tmp_path, many_images):
    flags = ["--dataset", "imagefolder", "--data_dir", many_images, "--workers", "1", *FLAGS[2:-1]]
    process = start(tmp_path, *flags, "--batch_size", "8", "--exp_name", "a", "--epoch", "9")
    assert wait_for(process, "epochs ")
    while len(processes := with_children(process.pid)) < 2:
        time.sleep(0.05)
    os.kill(processes[0], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("error: a process that reads images was killed (signal") and "try fewer --workers" in err


def test_sigterm_in_an_evaluation(tmp_path):
    """One line, and no folder is left that holds nothing."""
    facts = {"arch": "ResNet32", "num_classes": 10, "args": {"dataset": "digits"}}
    save_checkpoint(tmp_path / "a.pth", facts | {"state_dict": ResNet32(10).state_dict()})
    flags = ["--model_path", "a.pth", "--w_bit", *range(2, 9), "--out", "out"]
    process = start(tmp_path, *flags, script="eval.py")
    assert wait_for(process, "device: ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and err == "stopped by SIGTERM\n"
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time_in_a_folder(tmp_path, cli):
    process = start(tmp_path, *FLAGS, "--exp_name", "a", "--epoch", 1000)
    assert wait_for(process, "epoch   1 ")
    before = (tmp_path / "runs/a/args.json").read_bytes()
    second = cli("train.py", "--exp_name", "a", "--resume")
    assert second.code == 2 and f"runs/a is in use by process {process.pid} on " in second.err
    assert (tmp_path / "runs/a/args.json").read_bytes() == before
    process.kill()
    process.communicate()
    done = load_checkpoint(tmp_path / "runs/a/last.pth")["epoch"]
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", done + 1).code == 0  # a dead holder holds nothing


def test_a_folder_without_an_epoch_is_used_again(tmp_path, monkeypatch, rejected):
    """A run that was killed in its first epoch leaves its settings, logs and half a file, and no trace in the next."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("a")
    folder.write_settings({"args": {}})
    folder.start_logging(after_epoch=0)
    (folder.path / ".last.pth.1-0.tmp").write_text("half")
    left = {path.name for path in folder.path.iterdir()}
    assert {"args.json", "lock"} < left and len(left) == 4
    del folder  # and its lock, as if the process had ended
    message = rejected("train.py", "--exp_name", "a", "--resume")
    assert "nothing to resume: runs/a/last.pth is not there; start without --resume\n" in message
    assert RunFolder.create("a").exp_name == "a"
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["last.pth", "epoch_3.pth", "metrics.csv", "notes.txt", "b/args.json"])
def test_a_folder_with_anything_else_is_left_alone(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs/a" / name
    file.parent.mkdir(parents=True)
    file.write_text("x")
    assert RunFolder.create("a").exp_name == "a-2"
    assert [path for path in (tmp_path / "runs/a").rglob("*") if path.is_file()] == [file]


def test_many_runs_of_one_name_at_once_have_folders_of_their_own(tmp_path):
    code = "import sys, time; sys.path.insert(0, sys.argv[1]); from utils.runs import RunFolder\n"
    code += "folder = RunFolder.create('a'); print(folder.exp_name, flush=True); time.sleep(1000)"
    (tmp_path / "runs/a").mkdir(parents=True)  # as a run that was killed at once leaves it
    processes = [
        subprocess.Popen([sys.executable, "-c", code, ROOT], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    names = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.kill()
        process.communicate()
    assert sorted(names) == sorted(set(names)) and "a" in names and "" not in names


def test_a_bare_resume_names_the_runs_that_there_are(tmp_path, rejected):
    for number, name in enumerate(["old", "digits/4bits", "b", "new"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "last.pth").write_text("")
        os.utime(tmp_path / "runs" / name / "last.pth", (number, number))
    message = rejected("train.py", "--resume")
    assert "nothing to resume: runs/cifar100/4bits/last.pth is not there; start without --resume, or " in message
    assert "choose --exp_name new, b, digits/4bits and 1 more" in message


@pytest.mark.parametrize(
    "flags, name",
    [
        ("", "cifar100/4bits"),
        ("--w_bit 3", "cifar100/3bits"),
        ("--dataset digits", "digits/4bits"),
        ("--dataset digits --target zero", "digits/sparse90"),
        ("--target zero --sparsity 0.975", "cifar100/sparse97.5"),
        ("--dataset cifar10 --psg 0", "cifar10/vanilla"),
    ],
)
def test_a_run_without_a_name_is_called_by_data_set_and_goal(rejected, flags, name):
    """And is resumed by the same flags."""
    assert f"runs/{name}/last.pth is not there" in rejected("train.py", *flags.split(), "--resume")


def test_a_run_without_a_name_is_resumed_without_one(tmp_path, cli):
    flags = ["--dataset", "cifar10", "--w_bit", "3"]
    assert cli("train.py", *FLAGS, *flags, "--epoch", 1).code == 0
    outcome = cli("train.py", *flags, "--resume", "--epoch", 2)
    assert outcome.code == 0, outcome.err
    assert [row["epoch"] for row in rows(tmp_path / "runs/cifar10/3bits")] == ["1", "2"]


def test_full_disk(tmp_path, cli):
    """A file may not grow over 1 MB, and a checkpoint has 3: the run says so and the last good one stays."""
    flags = [*FLAGS, "--exp_name", "a"]
    assert cli("train.py", *flags, "--epoch", "1").code == 0
    good = (tmp_path / "runs/a/last.pth").read_bytes()
    with files_up_to(2**20):
        outcome = cli("train.py", "--exp_name", "a", "--resume", "--epoch", 2)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
    assert "runs/a/last.pth could not be written" in outcome.err and "what was there before is intact" in outcome.err
    assert (tmp_path / "runs/a/last.pth").read_bytes() == good and not list((tmp_path / "runs/a").glob("*.tmp"))
    assert cli("train.py", "--exp_name", "a", "--resume", "--epoch", "2").code == 0
    assert [row["epoch"] for row in rows(tmp_path / "runs/a")] == ["1", "2"]


def test_full_disk_at_an_export(tmp_path, cli, digits_run):
    with files_up_to(2**14):
        outcome = cli("export.py", "--model_path", digits_run)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert "deploy/last_w4.safetensors cannot be written" in outcome.err
    assert not (tmp_path / "deploy").exists()


def test_strength_without_measure_is_named(tmp_path, cli):
    flags = [*FLAGS[:-1], "--batch_size", "16", "--lambda_s", "1e6", "--lr", "0.1", "--epoch", "3", "--exp_name", "a"]
    outcome = cli("train.py", *flags)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1
    assert " of epoch 1; last good checkpoint: none; try a smaller --lr or --lambda_s" in outcome.err


def test_damaged_checkpoints(tmp_path):
    """Any byte changed, and any length: a file that loads, or one line; never another exception."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"epoch": 3, "arch": "ResNet32", "state_dict": ResNet32(10).state_dict()})
    content = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(content)
        # In half of them in the last 6,000 bytes, the directory of the archive, where a change is rarely harmless.
        first = 0 if trial % 2 else len(damaged) - 6000
        for _ in range(1 + trial % 3):
            damaged[generator.randrange(first, len(damaged))] ^= 1 << generator.randrange(8)
        if trial % 10 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        path.write_bytes(damaged)
        try:
            model_from_checkpoint(load_checkpoint(path), path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 6


def test_a_changed_file_is_not_the_published_one(tmp_path, cli, digits_run):
    (tmp_path / "models").mkdir()
    shutil.copy(digits_run, tmp_path / "models/a.pth")
    import hashlib

    digest = hashlib.sha256((tmp_path / "models/a.pth").read_bytes()).hexdigest()
    (tmp_path / "models/SHA256SUMS").write_text(f"{digest}  a.pth\n")
    flags = ["--model_path", "models/a.pth", "--w_bit", "8", "--val_split", "16"]
    assert "the published file" not in cli("eval.py", *flags).err
    (tmp_path / "models/SHA256SUMS").write_text(f"{'0' * 64}  a.pth\n")
    outcome = cli("eval.py", *flags)
    assert outcome.code == 0 and "warning: models/a.pth is not the published file" in outcome.err


def test_sums_of_the_shipped_files():
    """models/SHA256SUMS names the files that lie there."""
    import hashlib

    sums = dict(reversed(line.split()) for line in (ROOT / "models/SHA256SUMS").read_text().splitlines())
    shipped = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / "models").glob("*.pth")}
    assert sums == shipped


def resources(pid):
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_soak(tmp_path):
    """Memory at the end within 15 MB of that after epoch 5; open files and threads the same."""
    process = start(tmp_path, *FLAGS, "--exp_name", "a", "--epoch", SOAK + 1)
    assert wait_for(process, "epoch   5 ")
    early = resources(process.pid)
    assert wait_for(process, f"epoch {SOAK:3d} ")
    late = resources(process.pid)
    process.kill()
    process.communicate()
    print(f"{SOAK} epochs: resident {early[0]} -> {late[0]} kB, files {early[1]} -> {late[1]}, threads {early[2:]}")
    assert late[0] - early[0] < 15_000 and late[1:] == early[1:]
