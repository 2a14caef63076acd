"""The commands of the README, of docs/ and of the scripts' docstrings: each is run, or at least understood, as it
stands."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import quant
import tools.benchmark
import tools.hessian
from models import ARCHITECTURES, ResNet32
from tests.helpers import ROOT, ResNet8, SmallNet
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import Parser

README = (ROOT / "README.md").read_text()
SCRIPTS = ["train.py", "eval.py", "visualize.py", "export.py"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("python ", "make ", "pip "))]


def shell_commands(document: str) -> list[list[str]]:
    return [words for block in blocks("bash", (ROOT / document).read_text()) for words in commands(block)]


PYTHON_COMMANDS = [
    words
    for document in ("README.md", "docs/training.md", "docs/pruning.md", "docs/deployment.md")
    for words in shell_commands(document)
    if words[0] == "python"
]


def test_readme_begins_with_the_two_make_commands():
    assert shell_commands("README.md")[:2] == [["make", "quickstart"], ["make", "test"]]
    for target in ("quickstart", "test", "portable", "lint", "oldest"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert (ROOT / "requirements.txt").exists() and (ROOT / "environment.yml").exists()


def commands_of_make(folder, *words) -> str:
    """What make would run in `folder`, an empty one, for targets and settings `words`."""
    for name in ("Makefile", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(["make", "-n", *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_make_reproduce_asks_for_what_the_scripts_know(tmp_path):
    """Its commands for two seeds and five targets, where there are no runs: all flags parse, none is missing."""
    made = commands_of_make(tmp_path, "reproduce", "SEEDS=1 2", "TARGETS=4bits 4bits_channel 3bits 3bits_channel 2bits")
    text = made.replace("\\\n", " ")
    parse = importlib.import_module("train").parser().parse_args
    runs = [parse(shlex.split(flags)) for flags in re.findall(r"python train\.py ([^;\n]*)", text)]
    stages = [args for args in runs if args.psg and not args.adam and not args.resume]
    settings = {(args.w_bit, args.lambda_s, args.granularity) for args in stages}
    assert settings == {
        (4, 150, "tensor"), (4, 150, "channel"), (3, 600, "tensor"), (3, 150, "channel"), (2, 600, "tensor")
    }  # fmt: skip
    started = {(args.exp_name, args.psg, args.adam, args.w_bit, args.seed) for args in runs if not args.resume}
    assert started == {
        ("vanilla", 0, 0, None, 1),
        *((f"cifar100/{stage}_seed{seed}", 1, 0, int(stage[0]), seed)
          for stage in ("4bits", "4bits_channel", "3bits", "3bits_channel", "2bits") for seed in (1, 2)),
        ("cifar100/adam_seed1", 0, 1, None, 1), ("cifar100/adam_4bits_seed1", 1, 1, 4, 1),
    }  # fmt: skip
    assert {args.exp_name for args in runs if args.resume} == {name for name, *_ in started}
    renewed = re.findall(r"tools\.average runs/cifar100/(\d)bits\w*_seed\d --epochs 150 --w_bit (\d) --out ", text)
    assert len(renewed) == 10 and all(bits == width for bits, width in renewed)


@pytest.fixture
def workshop(tmp_path):
    """An empty folder with the shipped models, of which each stage has its first block only, and a CIFAR-100 of 136
    images of noise."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "models").mkdir()
    for path in (ROOT / "models").glob("*.pth"):
        checkpoint = load_checkpoint(path)
        state = {name: own for name, own in checkpoint["state_dict"].items() if not re.match(r"layer\d\.[1-9]", name)}
        save_checkpoint(tmp_path / "models" / path.name, checkpoint | {"state_dict": state})
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (136, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, 136)
    names = np.array([f"class {n}" for n in range(100)])
    np.savez(tmp_path / "data/cifar100.npz", x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16],
             classes=names)  # fmt: skip
    return tmp_path


def zeros(network, images, labels):
    """In place of eigenvalues, which take seconds and have a test of their own."""
    return torch.zeros(sum(parameter.numel() for parameter in network.parameters()), dtype=torch.float64)


def test_every_python_command_of_the_documents_runs(cli, workshop, monkeypatch):
    """In their order, as they stand, except for the numbers of epochs, images, sparsities, pictures and rounds."""
    assert len(PYTHON_COMMANDS) >= 25
    monkeypatch.setattr(tools.benchmark, "WARM_UP", 0)
    monkeypatch.setattr(tools.benchmark, "LOOP_STEPS", 1)
    monkeypatch.setattr(tools.benchmark, "BATCH_SIZE", 16)
    monkeypatch.setattr(tools.benchmark, "STARTS", 1)
    monkeypatch.setattr(tools.hessian, "EPOCHS", 1)
    monkeypatch.setattr(tools.hessian, "exact_eigenvalues", zeros)
    monkeypatch.setattr(tools.benchmark, "ResNet32", ResNet8)
    monkeypatch.setitem(ARCHITECTURES, "ResNet32", ResNet8)
    done = []
    for words in PYTHON_COMMANDS:
        if words in done:
            continue
        done.append(words)
        script, flags = words[1], words[2:]
        if script == "-m":
            script, flags = flags[0], flags[1:]
        if script == "tools.benchmark":
            flags += ["--rounds", "1"]
        if script in ("eval.py", "export.py"):
            flags += ["--calib_images", "16"]
        if "--sparsity" in flags and "--post" in flags:
            del flags[flags.index("--sparsity") + 2 : flags.index("--post")]
        if script == "visualize.py" and not flags:
            flags = ["--layers", "conv1.weight"]  # of 34 pictures
        if "--epoch" in flags:
            flags[flags.index("--epoch") + 1] = "83" if "--load_pretrained" in flags else "1"
        outcome = cli(script, *flags)
        assert outcome.code == 0, (words, outcome.err)
    for run in ("w4", "cifar100/4bits", "vanilla"):
        assert (workshop / "runs" / run / "last.pth").exists()
    assert (workshop / "results/sweep/results.csv").exists()
    assert (workshop / "visualizations/conv1.weight.png").exists()


def test_the_loop_of_the_readme_runs(monkeypatch, capsys):
    (block,) = blocks("python")
    model = SmallNet()
    before = model.conv2.weight.detach().clone()
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(len(model(torch.zeros(1, 3, 8, 8))[0]), (4,)))]
    monkeypatch.setitem(sys.modules, "psgd", quant)  # which is what `pip install .` makes of it
    scope = {"model": model, "epochs": 2, "loader": batches}
    exec(block, scope)
    assert not torch.equal(model.conv2.weight, before) and scope["optimizer"].pace().steps == 2
    assert all(len(channel.unique()) <= 15 for channel in scope["four_bit_model"].conv2.weight)
    assert capsys.readouterr().out.count("near the grid") == 2


def as_installed(monkeypatch):
    """Gives quant and its modules the names that they have when psgd is installed."""
    for name, module in [*sys.modules.items()]:
        if name.partition(".")[0] == "quant":
            monkeypatch.setitem(sys.modules, name.replace("quant", "psgd", 1), module)


def test_every_python_block_of_the_documents_runs(monkeypatch, tmp_path):
    as_installed(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = [block for path in sorted((ROOT / "docs").glob("*.md")) for block in blocks("python", path.read_text())]
    assert len(found) == 6
    for block in found:
        exec(block, {"model": ResNet32(10), "batches": [torch.randn(4, 3, 32, 32)], "torch": torch})
    assert (tmp_path / "w4a8.onnx").exists()


class Parsed(Exception):  # noqa: N818
    """A script has understood its flags."""


@pytest.fixture
def parses(monkeypatch):
    """parses("train.py", *flags): the script understands the flags; it is stopped there."""
    original = Parser.parse_args

    def stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    def call(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(Parsed):
            importlib.import_module(script.removesuffix(".py")).main()

    monkeypatch.setattr(Parser, "parse_args", stop)
    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_commands_parse(script, parses):
    found = commands(importlib.import_module(script.removesuffix(".py")).__doc__)
    assert len(found) >= 2
    for words in found:
        assert words[1] == script
        parses(*words[1:])


def test_commands_that_take_too_long_to_run_parse(parses, tmp_path):
    """Those of the make targets, and those of the documents for days of training or for data of one's own."""
    found = [commands_of_make(tmp_path, "quickstart", "reproduce")]
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in blocks("(?:ba)?sh", document.read_text()):
            for name, value in re.findall(r'^(\w+)="(.*)"$', block, flags=re.MULTILINE):
                block = block.replace(f"${name}", value)
            found.append(block.replace("$bits", "4"))
    text = "\n".join(found).replace("\\\n", " ")
    called = re.findall(r"(?:\bpython (?:-m )?|torchrun --nproc_per_node \d )(\w+\.\w+) ([^;\n]*)", text)
    assert len(called) > 60
    for script, flags in called:
        parses(script, *shlex.split(flags, comments=True))


@pytest.mark.parametrize("script", [*SCRIPTS, "tools.benchmark"])
def test_help_shows_defaults(cli, script):
    outcome = cli(script, "--help")
    assert outcome.code == 0 and outcome.err == ""
    assert "python" in outcome.out and "(default: " in outcome.out and "(default: None)" not in outcome.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_no_torch(script):
    code = f"import sys, runpy; sys.argv = ['{script}', '--help']\n" + (
        f"try: runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
