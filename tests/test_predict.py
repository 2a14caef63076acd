"""eval.py --images: what networks say about image files, in float and quantized."""

import re

import pytest
import torch

from models import ResNet32
from quant import Grid, quantize_weights
from tests.helpers import copy_with_args
from utils.checkpoint import load_checkpoint, model_from_checkpoint
from utils.data.folder import pixels
from utils.data.load import load_dataset
from utils.data.specs import DATASETS

CPU = torch.device("cpu")


def columns(out, path):
    """Of the table below `path`: the heads, and for each the (percent, name) of its lines."""
    lines = out.split(f"\n{path}\n")[1].split("\n\n")[0].splitlines()
    heads, *rows = [re.split(r"\s{3,}", line.strip()) for line in lines]
    cells = [[(float(cell.split(" % ")[0]), cell.split(" % ")[1]) for cell in column] for column in zip(*rows)]
    return dict(zip(heads, cells, strict=True))


def test_probabilities_and_names(cli, own_photographs, photograph_network):
    """Against the network itself on the images as they are evaluated."""
    paths = [f"d/val/{name}/{number}.jpg" for name in ("blue", "red") for number in (0, 2)]
    outcome = cli("eval.py", "--images", *paths, "--model_path", photograph_network, "--w_bit", "4", "2")
    assert outcome.code == 0, outcome.err
    assert "p.pth: ResNet8 for imagefolder; of an image it gets the middle 48 x 48 pixels" in outcome.out
    test = load_dataset("imagefolder", own_photographs, CPU, image_size=48).test
    (images, _) = next(test.chosen([torch.tensor([0, 2, 3, 5])]))
    model = model_from_checkpoint(load_checkpoint(photograph_network), photograph_network).eval()
    for head, network in (("float", model), ("W4", quantize_weights(model, 4)), ("W2", quantize_weights(model, 2))):
        with torch.no_grad():
            wanted = 100 * network(images).softmax(1)
        for path, row in zip(paths, wanted):
            found = columns(outcome.out, path)[head]
            assert {name: share for share, name in found} == {
                name: pytest.approx(row[number].item(), abs=0.02) for number, name in enumerate(("blue", "red"))
            }
            assert found[0][0] >= found[1][0]


def test_a_network_for_small_images(cli, tmp_path, own_photographs):
    """The image is reduced to their size, which is said; classes without names are numbers, the five likeliest."""
    torch.manual_seed(0)
    model = ResNet32(100).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pth")
    outcome = cli(
        "eval.py", "--images", "d/val/red/1.jpg", "--model_path", "c.pth", "--sparsity", "0.5", "--w_bit", "32"
    )
    assert outcome.code == 0, outcome.err
    said = "c.pth: ResNet32 for cifar100; of an image it gets the middle 32 x 32 pixels, with the shorter side resized"
    assert said in outcome.out
    found = columns(outcome.out, "d/val/red/1.jpg")
    assert list(found) == ["float", "float, 50 % zeros"]
    spec = DATASETS["cifar100"]
    image = pixels([str(own_photographs / "val/red/1.jpg")], spec).float()
    with torch.no_grad():
        logits = model(((image - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 3, 1, 2))[0]
    best = logits.softmax(0).topk(5)
    assert [name for _, name in found["float"]] == [f"class {index}" for index in best.indices.tolist()]
    assert [share for share, _ in found["float"]] == pytest.approx((100 * best.values).tolist(), abs=0.02)


def test_grids_as_in_training(cli, tmp_path, own_photographs, photograph_network):
    by_channel = copy_with_args(photograph_network, tmp_path / "q.pth", granularity="channel")
    outcome = cli("eval.py", "--images", "d/val/red/1.jpg", "--model_path", by_channel, "--w_bit", "2")
    model = model_from_checkpoint(load_checkpoint(by_channel), by_channel).eval()
    test = load_dataset("imagefolder", own_photographs, CPU, image_size=48).test
    (images, _) = next(test.chosen([torch.tensor([4])]))
    with torch.no_grad():
        wanted = 100 * quantize_weights(model, Grid(2, per_channel=True))(images).softmax(1)[0]
    assert columns(outcome.out, "d/val/red/1.jpg")["W2"][0][0] == pytest.approx(wanted.max().item(), abs=0.02)


def test_what_is_no_image_is_one_line(rejected, tmp_path, own_photographs, photograph_network):
    flags = ["--model_path", photograph_network, "--images", "d/val/red/0.jpg"]
    (tmp_path / "a.txt").write_text("no image")
    assert "a.txt cannot be read as an image (it is not an image file)" in rejected("eval.py", *flags, "a.txt")
    message = "b.jpg cannot be read as an image (No such file or directory): replace it, or leave it out"
    assert message in rejected("eval.py", *flags, "b.jpg")
    assert "d/val cannot be read as an image (Is a directory)" in rejected("eval.py", *flags, "d/val")


@pytest.mark.parametrize("flags", [["--a_bit", "8"], ["--post", "adaround"], ["--out", "a"]])
def test_what_needs_a_data_set_is_refused(rejected, own_photographs, flags):
    message = f"--images prints predictions with float activations: leave {flags[0]} out"
    assert message in rejected("eval.py", "--images", "d/val/red/0.jpg", *flags)
