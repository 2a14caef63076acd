"""Which networks and inputs ONNX takes, what it says of the others, and what an export leaves behind."""

import logging
import sys
import warnings

import onnx
import pytest
import torch
from torch import nn

from quant import export, quantize_activations, quantize_weights
from quant.deploy import to_onnx
from tests.helpers import graph_is_near


def refusal(model, **settings):
    with pytest.raises(ValueError) as caught:
        to_onnx(model, {}, 8, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Calls(nn.Module):
    """A convolution, and behind it `call`."""

    def __init__(self, call):
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 2, 1), call

    def forward(self, x):
        return self.call(self.conv(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 8), nn.Linear(6, 4)

    def forward(self, images, facts):
        return self.conv(images).flatten(1) + self.linear(facts)


@pytest.mark.parametrize("model, message", [
    (Calls(torch.lgamma), "Calls cannot be exported to ONNX: the operation prims.lgamma has no counterpart in ONNX; "),
    (Calls(lambda x: x if x.sum() > 0 else -x), "to ONNX: torch.export stops at 'Could not guard on data-dependent"),
    (Calls(lambda x: x.view(2, -1)), "to ONNX: its code fixes the number of samples in a batch"),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(32, 2)), "Sequential cannot be exported to ONNX: torch.export stops"),
    (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "no Conv2d, so it takes no images: give example_inputs"),
    (TwoInputs(), "of the shapes [[2, 3, 8, 8]] (missing a required argument: 'facts'): give ex"),
    (nn.Sequential(nn.Conv2d(3, 2, 1)).half(), "0.weight is torch.float16: ONNX files hold float32 networks"),
    (nn.Sequential(nn.Conv2d(3, 2, 1)).bfloat16(), "0.weight is torch.bfloat16: ONNX files hold float32 networks"),
])  # fmt: skip
def test_what_cannot_be_exported_is_named(model, message, capfd):
    assert message in refusal(model)
    assert capfd.readouterr() == ("", "")


def test_example_inputs(tmp_path):
    torch.manual_seed(0)
    net, inputs = TwoInputs().eval(), (torch.randn(1, 3, 8, 8), torch.randn(1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(net, tmp_path / "a.onnx", 4, example_inputs=inputs)
    proto = onnx.load(tmp_path / "a.onnx")
    assert [value.name for value in proto.graph.input] == ["images", "facts"]
    assert graph_is_near(proto, quantize_weights(net, 4), torch.randn(5, 3, 8, 8), torch.randn(5, 6))
    assert "must be a tuple of tensors, got list" in refusal(net, example_inputs=[inputs[0]])
    assert "must begin with a batch, got a tensor of shape []" in refusal(net, example_inputs=(torch.ones(()),))


def test_the_network_and_the_log_are_left_as_they_were(net, capfd):
    quantized = quantize_activations(net, 8, {"relu1": 1.0, "relu2": 1.0}).train()
    quantized.bn1.eval()
    to_onnx(quantized, {}, 8)
    assert capfd.readouterr() == ("", "")
    assert quantized.training and not quantized.bn1.training
    assert logging.root.manager.disable == logging.NOTSET and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "onnxscript"])
def test_a_missing_package_is_named(net, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    line = r'pip install -r requirements-export.txt, or pip install "psgd\[export\]"'
    with pytest.raises(ImportError, match=f"{name}.*: {line}"):
        export(net, tmp_path / "a.onnx", 4, image_size=8)
    assert not any(tmp_path.iterdir())
