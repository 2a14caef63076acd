"""torch.hub's entry points, from the checkout as a local source."""

import pytest
import torch

from models import ResNet32
from quant import Grid, grid_share, quantize_weights
from tests.helpers import ROOT, same
from utils.checkpoint import load_checkpoint


def load(**settings):
    return torch.hub.load(str(ROOT), "resnet32", source="local", **settings)


def shipped(file):
    model = ResNet32(100)
    model.load_state_dict(load_checkpoint(ROOT / "models" / file)["state_dict"])
    return model


@pytest.mark.parametrize(("settings", "file", "grid"), [
    ({}, "W4_ResNet", Grid(4)),
    ({"bits": 2, "granularity": "channel"}, "W2_channel_ResNet", Grid(2, per_channel=True)),
    ({"bits": 2, "granularity": "channel", "clipped": True}, "W2_channel_clipped_ResNet", Grid(2, per_channel=True)),
])  # fmt: skip
def test_the_float_network_and_its_quantized_copy(settings, file, grid):
    """The copy has the batch norm that was re-estimated for it."""
    model, quantized = load(**settings), load(quantized=True, **settings)
    assert not model.training and grid_share(model, grid) > 0.9
    assert same(model.state_dict(), shipped(f"{file}.pth").state_dict())
    expected = quantize_weights(shipped(f"{file}_bn.pth"), grid)
    assert not quantized.training and same(quantized.state_dict(), expected.state_dict())


def test_sgds_network():
    model = load(bits=32)
    assert grid_share(model, 4) < 0.3 and model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize(
    "settings", [{"bits": 7}, {"bits": 8, "granularity": "channel"}, {"granularity": "layer"}, {"clipped": True}]
)
def test_there_is_no_such_network(settings):
    with pytest.raises(ValueError, match=r"no network of bits=.*; there are W2_ResNet.pth, W2_channel_ResNet.pth"):
        load(**settings)
