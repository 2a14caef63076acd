import copy
import gc
from argparse import Namespace

import pytest
import torch
from torch import nn

from quant import quantize_activations
from quant.activations import relu_names
from tests.helpers import ResNet8, split, trained_resnet
from utils.training.evaluation import evaluate, fold_batch_norm
from utils.training.extra_loss import extra_loss
from utils.training.loop import NonFiniteError, train_epoch, train_step


def test_evaluate_equals_one_plain_forward_pass():
    model, data = trained_resnet(), split()
    result = evaluate(model, data)
    with torch.no_grad():
        ((images, labels),) = data.batches(len(data))
        logits = model(images)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=0.8)


@pytest.mark.parametrize("a_bit", [32, 8])
def test_folding_batch_norm_keeps_the_function(a_bit):
    model = quantize_activations(trained_resnet(), a_bit, dict.fromkeys(relu_names(ResNet8()), 4.0))
    folded = fold_batch_norm(copy.deepcopy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        difference = (folded(images) - model(images)).abs()
    # A value that falls between two levels of a quantizer may go the other way.
    assert difference.max() < 1e-3 if a_bit == 32 else difference.median() < 0.02


def test_a_penalty_is_minimised():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    twin, images, labels = copy.deepcopy(model), torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    for net, penalty in ((model, None), (twin, lambda *_: twin[1].weight.sum())):
        train_step(net, torch.optim.SGD(net.parameters(), lr=0.1), images, labels, "fp32", penalty)
    assert torch.allclose(model[1].weight - twin[1].weight, torch.tensor(0.1), atol=1e-6)


def test_with_a_teacher_the_targets_are_halfway_between_labels_and_its_outputs():
    torch.manual_seed(0)
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0)) for _ in range(2))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    targets = (nn.functional.one_hot(labels, 3) + teacher(images).softmax(1)) / 2
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(images), targets.detach()).backward()
    extra = extra_loss(Namespace(grad_l1=0, first_last_quant=1, precision="fp32"), model, teacher.eval())
    loss, _ = train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), images, labels, "fp32", extra)
    torch.testing.assert_close(model[1].weight.grad, twin[1].weight.grad)
    assert teacher[1].weight.grad is None
    assert loss / 4 == pytest.approx(nn.functional.cross_entropy(twin(images), labels).item())


def test_a_penalty_and_a_teacher_are_both_added():
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    logits = model(images)
    loss, added = nn.functional.cross_entropy(logits, labels), []
    for strength, taught in ((2.0, None), (0, teacher), (2.0, teacher)):
        extra = extra_loss(Namespace(grad_l1=strength, first_last_quant=1, precision="fp32"), model, taught)
        added.append(extra(images, logits, loss).item())
    assert added[0] > 0 and added[2] == pytest.approx(added[0] + added[1], rel=1e-5)


def test_folding_leaves_what_is_used_twice():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    images = torch.randn(2, 3, 4, 4)
    for net in (Twice(), nn.Sequential(conv, nn.ReLU(), norm)):
        expected = net.eval()(images)
        assert torch.equal(fold_batch_norm(net)(images), expected) and norm in net.modules()


def test_train_epoch_reports_the_mean_over_images():
    """A network that does not change: the loss over batches of 3 and 1 images weighs every image equally."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    batches = [(torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))) for n in (3, 1)]
    result = train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.0), batches, "fp32")
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    logits = model(images)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_loss_that_is_not_finite_is_named_by_its_step():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    good = (torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
    bad = (torch.full((2, 3, 2, 2), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteError, match="the loss became nan at step 3"):
        train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.0), [good, good, bad, good], "fp32")


def test_weight_that_is_not_finite_after_the_last_step_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    good = (torch.full((2, 3, 2, 2), 1e5), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteError, match="1.weight was no longer finite after step 1"):
        train_epoch(model, torch.optim.SGD(model.parameters(), lr=1e38), [good], "fp32")


def test_weight_of_zeros_after_the_last_step_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    nn.init.zeros_(model[1].weight)
    good = (torch.ones(2, 3, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(NonFiniteError, match="1.weight was all zeros, which nothing moves, after step 1"):
        train_epoch(model, torch.optim.SGD(model.parameters(), lr=0.0), [good], "fp32")


def test_folding_leaves_no_reference_cycles():
    network = trained_resnet()
    while gc.collect():  # what a finalizer lets go of is garbage of the next round
        pass
    fold_batch_norm(network)
    assert gc.collect() < 50  # a trace that waits for the collector is 1,700 objects
    assert gc.isenabled()
