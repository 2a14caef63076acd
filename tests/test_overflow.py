"""Post-training methods on activations that are not finite, on no images, and on layers that are not called."""

import copy

import pytest
import torch
from torch import nn

from quant import adaround, calibrate, correct_bias, layer_rows, quantize_sums, quantize_weights, reestimate_batch_norm
from tests.helpers import SmallNet

METHODS = {
    "the inputs or outputs of conv1": lambda low, net, images: adaround(low, net, images, 4, iterations=1),
    "the outputs of conv1": correct_bias,
    "the inputs of bn1": lambda low, net, images: reestimate_batch_norm(low, images),
}


@pytest.mark.parametrize("what", METHODS)
def test_nothing_is_fitted_to_activations_that_are_not_finite(what):
    torch.manual_seed(0)
    net, images = SmallNet().eval(), [torch.full((4, 3, 8, 8), 3e38)]
    low = quantize_weights(net, 4)
    before = copy.deepcopy(low.state_dict())
    with torch.no_grad():
        net.conv1.weight.mul_(10)
    with pytest.raises(ValueError, match=f"{what} are not finite on these images: nothing can be fitted"):
        METHODS[what](low, net, images)
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())


@pytest.mark.parametrize(
    "call",
    [
        reestimate_batch_norm,
        quantize_sums,
        lambda net, images: calibrate(net, images, 4),
        lambda net, images: correct_bias(quantize_weights(net, 4), net, images),
        lambda net, images: list(layer_rows(net, images, 4)),
    ],
)
def test_a_batch_without_images_is_refused(net, call):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"a batch must hold at least one image, got shape \[0, 3, 8, 8\]"):
        call(net, [torch.zeros(0, 3, 8, 8)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_batch_norm_that_is_not_called_keeps_its_statistics(net):
    net.head = nn.BatchNorm2d(8)
    net.head.running_mean.fill_(3)
    reestimate_batch_norm(net, [torch.randn(4, 3, 8, 8)])
    assert net.bn1.num_batches_tracked == 1
    assert net.head.running_mean.unique() == 3 and net.head.num_batches_tracked == 0
