"""examples/character_gpt.py as a user runs it: a tiny network, and a text of a few words."""

import os
import random
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, read_csv

ARMS = ["adamw", "gradient", "update", "update_outside", "ste"]
SETTINGS = {"layers": 1, "heads": 2, "width": 16, "context": 16, "batch": 4, "steps": 10, "warmup": 2, "dropout": 0.2}
TINY = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def gpt(installed, tmp_path_factory):
    """gpt(*arguments) runs the example in gpt.folder, which has a text of 15 different characters."""
    folder = tmp_path_factory.mktemp("gpt")
    words = random.Random(0).choices(["to be", "or not", "that is", "the question", "a sea of"], k=400)
    (folder / "text.txt").write_text("\n".join(words))
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]

    def call(*arguments):
        command = [sys.executable, ROOT / "examples/character_gpt.py", *TINY, *arguments]
        quiet = "ignore:lambda_s"  # that a stage of four steps is short
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": quiet}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    call.folder = folder
    return call


@pytest.fixture(scope="module")
def study(gpt):
    """What a run of all arms prints; its files are in the folder "all"."""
    done = gpt("--data", "text.txt", "--arm", *ARMS, "--bits", "4", "3", "--out", "all")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def rows_of(folder):
    """The rows in `folder` without the seconds that they took."""
    return [{key: row[key] for key in row if key != "seconds"} for row in read_csv(folder / "results.csv")]


def test_every_arm_adds_a_row(gpt, study):
    rows = rows_of(gpt.folder / "all")
    assert [(row["arm"], row["bits"]) for row in rows] == [
        *[(arm, "4") for arm in ARMS], *[(arm, "3") for arm in ARMS[1:]],
    ]  # fmt: skip
    for row in rows:
        assert all(0 < float(row[key]) < 4 for key in ("float", "w8", "w4", "w3", "w2"))  # log(15) is 2.7
        assert 0 < float(row["share"]) < 1
        assert bool(row["tau"]) == row["arm"].startswith("update")
        assert row["lambda_s"] == {"gradient": "150.0", "adamw": "", "ste": ""}.get(row["arm"], "auto")


def test_the_shared_table_is_scaled_as_the_last_layer(study):
    """The tables of `describe`: one for each arm, all arms of 4 bits before those of 3."""
    lines = [line.split() for line in study.splitlines() if line.startswith(("positions", "embed", "blocks", "head"))]
    said = [(line[0], line[2]) for line in lines if "norm" not in line[0]]
    layers = [f"blocks.0.{name}.weight" for name in ("qkv", "project", "up", "down")]
    for part, bits in ((said[:6], ["4"] * 5), (said[-6:], ["8", "3", "3", "3", "8"])):
        assert part == [("positions.weight", "float"), *zip([*layers, "head.weight"], bits, strict=True)]


def test_arms_start_from_the_same_network(gpt, study):
    """Bit for bit, whichever arm comes first. In "all" the arm `update` found the file of its start there."""
    assert gpt("--data", "text.txt", "--arm", "update", "--out", "one").returncode == 0
    all_arms, one = (torch.load(gpt.folder / name / "seed1.pth") for name in ("all", "one"))
    torch.testing.assert_close(all_arms, one, rtol=0, atol=0)
    assert torch.equal(one["model"]["head.weight"], one["model"]["embed.weight"])
    assert rows_of(gpt.folder / "one") == [rows_of(gpt.folder / "all")[ARMS.index("update")]]


def test_errors_are_one_line(gpt, study):
    (gpt.folder / "short.txt").write_text("to be")
    for words, told in (
        (["--data", "input.txt"], "no file --data input.txt: get https://raw.githubusercontent.com/karpathy/char-rnn"),
        (["--data", "short.txt"], "has only 5 characters, too few for a --context of 16"),
        (["--data", "text.txt", "--width", "8", "--out", "all"], "name another --out"),
    ):
        done = gpt(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and told in done.stderr, done.stderr
