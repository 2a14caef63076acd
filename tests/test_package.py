"""The installed package psgd: quant/ under its own name, with nothing of the scripts and no import that is not used."""

import subprocess
import sys

from tests.helpers import ROOT


def test_it_is_quant_under_another_name(installed):
    assert {path.name for path in installed.iterdir() if "dist-info" not in path.name} == {"psgd"}
    assert {p.name for p in (installed / "psgd").glob("*.*")} == {p.name for p in (ROOT / "quant").glob("*.*")}


def test_it_trains_quantizes_and_exports(installed, tmp_path):
    """With torch alone, until a file is written."""
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import psgd, torch

assert psgd.__file__.startswith({str(installed)!r}) and all(hasattr(psgd, name) for name in psgd.__all__)

def build():
    from torch import nn
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))

torch.manual_seed(0)
model = build()
optimizer = psgd.PSGD(torch.optim.SGD(psgd.psg_param_groups(model, 4), lr=0.01), lambda_s=150)
images = torch.randn(8, 3, 8, 8)
model(images).square().mean().backward()
optimizer.step()
ranges = psgd.calibrate(model, [images], bits=8)
network = psgd.quantize_activations(psgd.quantize_weights(model, 4), 8, ranges)
others = ("tensorboard", "seaborn", "matplotlib", "onnx", "onnxruntime", "safetensors", "torchvision", "sklearn")
print([name for name in (*others, "quant", "utils", "models") if name in sys.modules])
psgd.export(model, "a.safetensors", 4, image_size=8)
psgd.export(model, "a.onnx", 4, image_size=8)
again = psgd.load_packed("a.safetensors", build())
assert torch.equal(again(images), psgd.quantize_weights(model, 4)(images))
print(sorted(ranges))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n['1']\n", done.stderr
    assert (tmp_path / "a.onnx").stat().st_size > 500
