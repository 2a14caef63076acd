"""Post-training methods on activations that are not finite: refused, and the network stays as it was."""

import copy

import pytest
import torch

from quant import adaround, correct_bias, quantize_weights, reestimate_batch_norm
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
