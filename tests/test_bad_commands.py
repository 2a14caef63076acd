"""Wrong command lines of every script: exit code 2, one line on stderr that says what to do, no new files."""

import pytest
import torch

from models import ResNet32
from utils.cli import first_line, run

SCRATCH = ["--dataset", "digits", "--load_pretrained", ""]
BAD = [
    ("train.py", ["--w_bit", "1"], "--w_bit: 1 must be from 2 to 8"),
    ("train.py", ["--w_bit", "9"], "--w_bit: 9 must be from 2 to 8"),
    ("train.py", ["--w_bit", "4.5"], "'4.5' is not a whole number"),
    ("train.py", ["--target", "one"], "--target: invalid choice: 'one'"),
    ("train.py", ["--target", "zero", "--w_bit", "4"], "--w_bit 4 does not go with --target zero"),
    ("train.py", ["--target", "zero", "--clip_weights", "1"], "--clip_weights 1 does not go with --target zero"),
    ("train.py", ["--target", "zero", "--lambda_s", "auto"], "--lambda_s auto does not go with --target zero"),
    (
        "train.py",
        ["--target", "zero", "--granularity", "channel"],
        "--granularity channel does not go with --target zero",
    ),
    ("train.py", ["--psg", "0", "--lambda_s", "auto"], "--lambda_s auto does not go with --psg 0"),
    ("train.py", ["--psg", "0", "--eps", "0.1"], "--eps 0.1 does not go with --psg 0"),
    ("train.py", ["--decoupled_decay", "1"], "--decoupled_decay 1 needs --adam 1"),
    ("train.py", ["--w_decay_target", "0.004"], "--w_decay_target 0.004 needs --target zero and --psg 1"),
    ("train.py", ["--sparsity", "0.9"], "--sparsity 0.9 does not go with --target grid"),
    ("train.py", ["--target", "zero", "--sparsity", "1"], "--sparsity: 1 must be less than 1"),
    ("train.py", ["--l1", "-1"], "--l1: -1 must be 0 or greater"),
    ("train.py", ["--lambda_s", "0"], "--lambda_s: 0 must be greater than 0"),
    ("train.py", ["--lambda_s", "-150"], "--lambda_s: -150 must be greater than 0"),
    ("train.py", ["--lambda_s", "much"], "--lambda_s: 'much' is not a number, or auto"),
    ("train.py", ["--seed", "2147483648"], "--seed: 2147483648 must be from 0 to 2147483647"),
    ("train.py", ["--lr", "nan"], "--lr: 'nan' is not a finite number"),
    ("train.py", ["--w_decay", "-1"], "--w_decay: -1 must be 0 or greater"),
    ("train.py", ["--save_epochs", "9-3"], "--save_epochs: 9-3 ends before it begins"),
    ("train.py", ["--save_epochs", "1-x"], "--save_epochs: 'x' is not a whole number"),
    ("train.py", ["--save_epochs", "1-10000000000"], "--save_epochs: 10000000000 must be from 1 to 1000000"),
    ("train.py", ["--epoch", "0"], "--epoch: 0 must be 1 or greater"),
    ("train.py", ["--arch", "ResNet50"], "unknown architecture 'ResNet50'"),
    ("train.py", ["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
    ("train.py", ["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    ("train.py", ["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ("train.py", ["--device", "gpu"], "device 'gpu' cannot be used here"),
    ("train.py", ["--device", "meta"], "device 'meta' cannot be used here"),
    ("train.py", [*SCRATCH, "--arch", "resnet18", "--batch_size", "4"], "resnet18 cannot be trained on one image"),
    ("train.py", [*SCRATCH, "--resume_epoch", "9", "--epoch", "3"], "--epoch 3 is before the first epoch, 9"),
    ("train.py", [*SCRATCH, "--val_split", "1437"], "--val_split 1437 leaves none of the 1437 training images"),
    ("train.py", [*SCRATCH, "--grad_l1", "1e-3", "--compile", "1"], "--grad_l1 differentiates twice: it needs"),
    ("train.py", [*SCRATCH, "--exp_name", "../out"], "--exp_name '../out' must name a folder below runs/"),
    ("train.py", [*SCRATCH, "--exp_name", "/out"], "--exp_name '/out' must name a folder below runs/"),
    ("train.py", [], "no checkpoint at models/ResNet82.pth"),
    ("train.py", ["--dataset", "digits", "--load_pretrained", "no.pth"], "no checkpoint at no.pth"),
    ("train.py", ["--resume", "--exp_name", "none"], "nothing to resume: runs/none/last.pth is not there"),
    ("eval.py", ["--w_bit", "1"], "--w_bit: 1 must be from 2 to 8, or 32 for full precision"),
    ("eval.py", ["--w_bit", "4", "16"], "--w_bit: 16 must be from 2 to 8, or 32"),
    ("eval.py", ["--a_bit", "x"], "'x' is not a whole number, or 32"),
    ("eval.py", ["--model_path", "no.pth"], "no checkpoint at no.pth"),
    ("eval.py", ["--clipping_range", "0"], "--clipping_range: 0 must be greater than 0, or search"),
    ("eval.py", ["--percentile", "101"], "--percentile: 101 must be 100 or less"),
    ("eval.py", ["--act_range", "kl"], "--act_range: invalid choice: 'kl'"),
    ("eval.py", ["--act_range", "mse"], "--act_range mse needs --a_bit: activations are float without it"),
    ("eval.py", ["--act_at", "inputs", "--w_bit", "4"], "--act_at inputs needs --a_bit"),
    ("eval.py", ["--report"], "--report writes layers.csv: name a folder with --out DIR"),
    ("eval.py", ["--post", "magic"], "--post: invalid choice: 'magic'"),
    ("eval.py", ["--sparsity", "1"], "--sparsity: 1 must be less than 1 (0.9 prunes 90 percent)"),
    ("eval.py", ["--sparsity", "0.5", "-0.1"], "--sparsity: -0.1 must be 0 or greater"),
    ("eval.py", ["--prune", "channel"], "--prune: invalid choice: 'channel'"),
    ("eval.py", ["--val_split", "-1"], "--val_split: -1 must be 0 or greater"),
    ("eval.py", ["--calib_images", "0"], "--calib_images: 0 must be 1 or greater"),
    ("eval.py", ["--images", "a.jpg"], "no checkpoint at models/W4_ResNet.pth"),
    ("visualize.py", ["--figure", "grid", "--labels", "A"], "--labels A: figure grid takes its names from the results"),
    ("visualize.py", ["--figure", "9"], "--figure: invalid choice: '9'"),
    ("visualize.py", ["--w_bit", "1"], "--w_bit: 1 must be from 2 to 8"),
    ("visualize.py", ["--sparsity", "1.5"], "--sparsity: 1.5 must be less than 1"),
    ("visualize.py", ["--model_path", "no.pth"], "no checkpoint at no.pth"),
    ("visualize.py", ["--model_path", "no.pth", "--labels", "a", "b"], "2 --labels for 1 of --model_path"),
    ("visualize.py", ["--labels", "a", "a"], "the labels a, a are not all different"),
    ("visualize.py", ["--runs", "a", "b"], "--runs has no effect with --figure layers: it is for curves"),
    (
        "visualize.py",
        ["--results", "r.csv"],
        "--results has no effect with --figure layers: it is for 1a, grid",
    ),
    ("visualize.py", ["--figure", "2", "--layers", "fc"], "--layers has no effect with --figure 2: it is for layers"),
    ("visualize.py", ["--figure", "curves"], "runs/vanilla/metrics.csv cannot be read"),
    ("visualize.py", ["--figure", "1a"], "results/weights/w4/results.csv cannot be read"),
    ("visualize.py", ["--figure", "4"], "results/studies/hessian/digits.csv cannot be read"),
    ("visualize.py", ["--figure", "report", "--results", "a", "b"], "--results a b: this figure takes only one"),
    ("visualize.py", ["--layer", "fc"], "unrecognized arguments: --layer fc (did you mean --layers?)"),
    ("export.py", ["--model_path", "no.pth"], "no checkpoint at no.pth"),
    ("export.py", ["--w_bit", "32"], "--w_bit: 32 must be from 2 to 8"),
    ("export.py", ["--a_bit", "1"], "--a_bit: 1 must be from 2 to 8, or 32 for full precision"),
    (
        "eval.py",
        ["--a_bit", "8", "--act_at", "inputs", "--act_range", "bn"],
        "--act_at inputs needs minmax, percentile",
    ),
    ("export.py", ["--act_at", "inputs"], "--act_at inputs needs --a_bit"),
    ("export.py", ["--integer_kernels"], "--integer_kernels needs --a_bit"),
    ("export.py", ["--granularity", "row"], "--granularity: invalid choice: 'row'"),
    ("export.py", ["--calib_images", "few"], "'few' is not a whole number"),
    ("export.py", ["--seed", "-1"], "--seed: -1 must be from 0 to 2147483647"),
    ("export.py", ["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet'"),
    ("export.py", ["--image_size", "0"], "--image_size: 0 must be 1 or greater"),
    ("export.py", ["--wbit", "4"], "unrecognized arguments: --wbit 4 (did you mean --w_bit?)"),
    ("eval.py", ["a.pth"], "unrecognized arguments: a.pth (did you mean --model_path a.pth?)"),
    ("export.py", ["--w_bit", "4", "x/a.pth"], "unrecognized arguments: x/a.pth (did you mean --model_path x/a.pth?)"),
    ("visualize.py", ["a.pth"], "(did you mean --model_path a.pth?)"),
    ("train.py", ["a.pth"], "(did you mean --load_pretrained a.pth?)"),
    ("tools.average", [], "the following arguments are required: DIR, --epochs, --out"),
    ("tools.average", ["r", "--epochs", "3-1", "--out", "x"], "--epochs: 3-1 ends before it begins"),
    ("tools.average", ["r", "--epochs", "1-2", "--out", "x"], "r/epoch_1.pth is not there"),
    ("tools.strip_checkpoint", ["no.pth", "x.pth"], "no checkpoint at no.pth"),
    ("tools.table", ["no.csv"], "no.csv cannot be read"),
    ("tools.hessian", ["--steps", "0"], "--steps: 0 must be 1 or greater"),
    ("tools.hessian", ["--model_path", "no.pth"], "no checkpoint at no.pth"),
    ("tools.snip", ["--target", "grid"], "--psg and --target follow from tools.snip: leave them out"),
    ("tools.snip", ["--psg", "1"], "--psg and --target follow from tools.snip: leave them out"),
    ("tools.benchmark_optimizer", ["--csv", "x.json"], "--csv: x.json must end in .csv"),
    ("tools.benchmark_peers", ["--csv", "x"], "--csv: x must end in .csv"),
    ("tools.benchmark_distributed", ["--csv", "x"], "--csv: x must end in .csv"),
    ("tools.benchmark", ["--rounds", "none"], "'none' is not a whole number"),
    ("tools.benchmark_deploy", ["--model_path", "no.pth"], "no checkpoint at no.pth"),
]


@pytest.mark.parametrize("script, flags, message", BAD, ids=[" ".join([script, *flags]) for script, flags, _ in BAD])
def test_one_line_says_what_is_wrong(rejected, script, flags, message):
    assert message in rejected(script, *flags)


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: torch.empty(10**15), "try a smaller batch"),
        (lambda: torch.zeros(2).put_(torch.tensor([1]), torch.ones(1)), "put_ does not have a deterministic"),
    ],
)
def test_what_torch_finds_out_late(attempt, message, capsys):
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(SystemExit) as stop:
            run(attempt)
    finally:
        torch.use_deterministic_algorithms(False)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and message in line


def silent(kind):
    """A function that raises an error without text."""

    def attempt():
        raise kind

    return attempt


def test_an_error_without_text_has_the_name_of_its_type(capsys):
    texts = {"": "ValueError", " \n": "ValueError", "a\nb": "a", "\n  a": "a", "\x1b[1mbold\x1b[0m x": "bold x"}
    for text, line in texts.items():
        assert first_line(ValueError(text)) == line
    assert first_line(MemoryError()) == "MemoryError"
    for kind, message in ((OSError, "error: OSError\n"), (torch.OutOfMemoryError, "(OutOfMemoryError); try a smaller")):
        with pytest.raises(SystemExit) as stop:
            run(silent(kind))
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_warning_of_the_library_is_one_line(cli, few_digits, tmp_path):
    """A bias that is all zeros is on every grid, and PSG never moves it."""
    state = ResNet32(10).state_dict()
    state["fc.bias"].zero_()
    torch.save({"arch": "ResNet32", "num_classes": 10, "state_dict": state}, tmp_path / "zero.pth")
    flags = ["--dataset", "cifar10", "--load_pretrained", "zero.pth", "--epoch", 1, "--batch_size", 64]
    outcome = cli("train.py", *flags)
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 0 and len(lines) == 1, outcome
    assert lines[0].startswith("warning: all zeros, which PSG never moves: fc.bias; give PSGD an eps > 0")


def test_a_run_folder_in_place_of_a_flag(rejected, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/last.pth").touch()
    assert "unrecognized arguments: a (did you mean --model_path a/last.pth?)" in rejected("eval.py", "a")
