"""What exported files say about themselves, and networks for photographs as export.py writes them."""

import json
import re
import shutil

import onnx
import pytest
import torch

import models
from models import build_model
from quant import Grid, quantize_weights, read_facts
from quant.deploy import save_packed
from tests.helpers import ResNet8, copy_with_args
from utils.checkpoint import load_checkpoint, model_from_checkpoint
from utils.data.load import load_dataset
from utils.data.specs import DATASETS
from utils.export_notes import page

CPU = torch.device("cpu")
MEAN, STD = list(DATASETS["imagefolder"].mean), list(DATASETS["imagefolder"].std)


def properties(path):
    """The metadata of an ONNX file."""
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def code_of(text):
    """The blocks of Python in a page."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_a_network_for_photographs(cli, tmp_path, monkeypatch, own_photographs, photograph_network):
    """At the size of its training; the lines of the page load the files, whose outputs are the quantized network's."""
    outcome = cli("export.py", "--model_path", photograph_network, "--out", "a", "--workers", "0")
    assert outcome.code == 0 and outcome.err == ""
    assert "ResNet8 for imagefolder, 2 classes: blue, red" in outcome.out
    assert "checked on 6 test images" in outcome.out and "top-1 on these test images: " in outcome.out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["p_w4.md", "p_w4.onnx", "p_w4.safetensors"]
    stated, facts = properties(tmp_path / "a/p_w4.onnx"), read_facts(tmp_path / "a/p_w4.safetensors")
    assert stated.pop("a_bit") == 32 and stated == facts
    assert facts["classes"] == ["blue", "red"] and facts["grid"]["bits"] == 4
    layout = "float32 [N, 3, S, S], (value - mean) / std"
    assert facts["input"] == {
        "size": 48, "resized": 55, "layout": layout, "channels": "RGB", "mean": MEAN, "std": STD,
    }  # fmt: skip
    split = load_dataset("imagefolder", own_photographs, CPU, image_size=48).test
    (images, _) = next(split.batches(6))
    model = model_from_checkpoint(load_checkpoint(photograph_network), photograph_network).eval()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setattr(models, "ResNet8", ResNet8, raising=False)
    with torch.no_grad():
        expected = quantize_weights(model, 4)(images)
        first, second = code_of((tmp_path / "a/p_w4.md").read_text())
        for code, given in ((first, images.contiguous().numpy()), (second.replace("psgd", "quant"), images)):
            scope = {"images": given}
            exec(code, scope)
            assert torch.allclose(torch.as_tensor(scope["logits"]), expected, atol=1e-4)


def test_the_page_about_a_file_that_takes_images_as_they_are(cli, tmp_path, monkeypatch, photograph_network):
    flags = ["--model_path", photograph_network, "--a_bit", "8", "--with_normalize", "--calib_images", "8"]
    outcome = cli("export.py", *flags, "--w_bit", "3", "--granularity", "channel", "--out", "a", "--workers", "0")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("warning") == 1 and "it was trained for 4 bits, not for 3" in outcome.err
    stated = properties(tmp_path / "a/p_w3a8.onnx")
    assert stated["a_bit"] == 8 and stated["input"]["layout"] == "uint8 [N, S, S, 3]"
    text = (tmp_path / "a/p_w3a8.md").read_text()
    for words in (
        "| weights | 3 bits, a scale for each output channel; the first and last layer 8 bits |",
        "| activations | 8 bits in p_w3a8.onnx, float in",
        "| input of p_w3a8.onnx | uint8 [N, 48, 48, 3] |", "| input of p_w3.safetensors | float32 [N, 3, 48, 48], ",
        "| mean, std | 123.675, 116.28, 103.53; 58.395, 57.12, 57.375, for values from 0 to 255 |",
        "| classes | 0 blue, 1 red |", "Note: it was trained for 4 bits, not for 3.",
    ):  # fmt: skip
        assert words in text, words
    monkeypatch.chdir(tmp_path / "a")
    scope = {"images": torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8).numpy()}
    exec(code_of(text)[0], scope)
    assert scope["logits"].shape == (3, 2)


def test_a_network_of_torchvision_is_loaded_as_its_page_says(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = build_model("squeezenet1_1", 3).eval()
    facts = {
        "arch": "squeezenet1_1", "num_classes": 3, "dataset": "imagefolder", "source": "s.pth", "notes": [],
        "post": "none", "grid": {"bits": 4, "per_channel": False}, "classes": ["a|b", "c", "d"],
        "input": {"size": 64, "resized": 73, "mean": MEAN, "std": STD},
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_packed("s.safetensors", model, Grid(4), facts)
    text = page(facts, "s.safetensors", "s.onnx", 32, with_normalize=False)
    assert "| classes | 0 a\\|b, 1 c, 2 d |" in text and "Note" not in text
    scope = {"images": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        exec(code_of(text)[1].replace("psgd", "quant"), scope)
        assert torch.equal(scope["logits"], quantize_weights(model, 4)(scope["images"]))


def test_a_state_dict_alone_of_any_architecture(cli, tmp_path, own_photographs):
    """What it does not say is given; its classes are those of the folder."""
    torch.manual_seed(0)
    torch.save(build_model("resnet18", 2).state_dict(), tmp_path / "r.pth")
    flags = ["--arch", "resnet18", "--dataset", "imagefolder", "--data_dir", "d", "--image_size", "32"]
    outcome = cli("export.py", "--model_path", "r.pth", *flags, "--workers", "0", "--out", "a")
    assert outcome.code == 0, outcome.err
    facts = read_facts(tmp_path / "a/r_w4.safetensors")
    assert (facts["arch"], facts["classes"], facts["input"]["size"]) == ("resnet18", ["blue", "red"], 32)


def test_without_the_images_it_is_checked_on_noise(cli, rejected, own_photographs, photograph_network):
    shutil.rmtree(own_photographs)
    flags = ["--model_path", photograph_network, "--workers", "0", "--out", "a"]
    message = f"--a_bit 8 needs training images, and there is no imagefolder in {own_photographs}"
    assert message in rejected("export.py", *flags, "--a_bit", "8")
    outcome = cli("export.py", *flags)
    assert outcome.code == 0, outcome.err
    assert f"checked on 64 random images, as there is no imagefolder in {own_photographs}\n" in outcome.out
    assert "2 classes: blue, red" in outcome.out and "top-1 on" not in outcome.out


@pytest.mark.parametrize("val_split, kind", [(4, "4 validation"), (0, "12 training")])
def test_without_val_it_is_checked_on_training_images(
    cli, tmp_path, own_photographs, photograph_network, val_split, kind
):
    """On those that training held out, if it did."""
    shutil.rmtree(own_photographs / "val")
    copy_with_args(photograph_network, tmp_path / "v.pth", val_split=val_split)
    outcome = cli("export.py", "--model_path", "v.pth", "--workers", "0", "--out", "a")
    assert outcome.code == 0 and f"checked on {kind} images" in outcome.out, outcome.err
