"""Weights that a layer computes from other parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from quant import (
    clip_weights,
    correct_bias,
    describe,
    export,
    prune_weights,
    psg_param_groups,
    quantize_weights,
    sparse_param_groups,
)
from quant.post_training import capture

CALLS = {
    "groups": lambda net, path: psg_param_groups(net, 4),
    "sparse groups": lambda net, path: sparse_param_groups(net),
    "quantized": lambda net, path: quantize_weights(net, 4),
    "clipped": lambda net, path: clip_weights(net, 4),
    "pruned": lambda net, path: prune_weights(net, 0.5),
    "file": lambda net, path: export(net, path / "net.safetensors", 4),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("wrap", [weight_norm, parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_they_are_named_where_they_are_left_alone(tmp_path, net, wrap, call):
    wrap(net.conv2)
    with pytest.warns(
        UserWarning, match="the weights of conv2 are computed, as by weight_norm or another param"
    ) as said:
        call(net, tmp_path)
    (named,) = {warning.filename for warning in said if "are computed" in str(warning.message)}
    assert named == __file__ or call is CALLS["file"]  # the line that called


class Attention(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        wrap(self.attention.out_proj)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize(
    "wrap", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), parametrizations.weight_norm]
)
def test_an_attention_that_computes_its_projection_is_observed(wrap):
    torch.manual_seed(0)
    net, words = Attention(wrap).eval(), torch.randn(4, 5, 8)
    [(_, projected)] = capture(net, "attention.out_proj", [words])
    torch.testing.assert_close(projected, net.attention(words, words, words)[0])
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted.attention.in_proj_bias += 1
        corrected = correct_bias(shifted, net, [words])
        assert (corrected(words) - net(words)).mean((0, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_bias_beside_a_computed_weight_stays_in_float(wrap):
    net = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 4)), nn.Linear(4, 2))
    rows = {row.name: row for row in describe(net, 4).rows}
    assert rows["1.bias"].bits == 32 and rows["1.bias"].reason == "bias beside a computed weight"
    assert rows["0.bias"].bits == 4
    with pytest.warns(UserWarning, match="the weights of 1 are computed"):
        assert torch.equal(quantize_weights(net, 2)[1].bias, net[1].bias)
