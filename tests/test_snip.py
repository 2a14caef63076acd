"""SNIP: pruning before training."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from quant.pruning import masks_of_smallest, nonzero_weights, prunable_weights
from tools.snip import saliencies
from utils.checkpoint import load_checkpoint, model_from_checkpoint

SMALL = ["--dataset", "cifar10", "--arch", "ResNet8", "--device", "cpu"]


def test_saliencies_are_the_gradients_of_gates():
    """The definition: |dL/dc| at c = 1, where gates c multiply the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    images, labels = torch.randn(16, 5), torch.randint(3, (16,))
    gates = {name: torch.ones_like(weight, requires_grad=True) for name, weight in prunable_weights(model).items()}
    gated = {name: gate * model.get_parameter(name).detach() for name, gate in gates.items()}
    loss = cross_entropy(torch.func.functional_call(model, gated, images), labels)
    expected = [gradient.abs() for gradient in torch.autograd.grad(loss, [*gates.values()])]
    halves = zip(images.split(8), labels.split(8))
    for found, wanted in zip(saliencies(model, halves), expected, strict=True):
        torch.testing.assert_close(found / 2, wanted)  # the sum over two batches is twice the mean


def test_the_largest_over_all_layers_are_kept():
    masks = masks_of_smallest([torch.tensor([[1.0, 9.0], [2.0, 0.0]]), torch.tensor([8.0, 3.0])], 0.5)
    assert [mask.tolist() for mask in masks] == [[[0, 1], [0, 0]], [1, 1]]


def test_a_run_is_resumed_by_its_own_tool(cli, tmp_path, few_digits):
    """Else its zeros would be trained away, or a dense network would get a mask of ones."""
    words = [*SMALL, "--epoch", "1", "--exp_name"]
    assert cli("tools.snip", *words, "my run").code == 0
    outcome = cli("train.py", "--exp_name", "my run", "--resume", "--epoch", "2")
    assert outcome.code == 2 and "python -m tools.snip --exp_name 'my run' --resume continues it" in outcome.err
    assert cli("train.py", "--psg", "0", "--target", "zero", *words, "b").code == 0
    outcome = cli("tools.snip", "--exp_name", "b", "--resume", "--epoch", "2")
    assert outcome.code == 2 and "runs/b was not started by tools.snip: train.py --resume continues it" in outcome.err


def test_a_layer_without_a_weight_is_refused(rejected, few_digits):
    words = [*SMALL, "--epoch", "1", "--sparsity", "0.9999"]
    assert "--sparsity 0.9999 leaves no weight of layer" in rejected("tools.snip", *words)


def test_a_run_keeps_its_zeros_through_a_resume(cli, tmp_path, few_digits):
    flags = ["--sparsity", "0.75", *SMALL, "--lr", "0.1", "--exp_name", "a"]
    assert cli("tools.snip", *flags, "--epoch", "1").code == 0

    def network():
        path = tmp_path / "runs/a/last.pth"
        return model_from_checkpoint(load_checkpoint(path), path)

    first = network()
    assert cli("tools.snip", "--exp_name", "a", "--resume", "--epoch", "2").code == 0
    weights = [*prunable_weights(first).values()]
    for before, after in zip(weights, prunable_weights(network()).values()):
        assert torch.equal(before == 0, after == 0) and not torch.equal(before, after)
    total = sum(weight.numel() for weight in weights)
    assert nonzero_weights(first) == round(0.25 * total)
