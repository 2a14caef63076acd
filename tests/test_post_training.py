"""Post-training methods: batch norm re-estimated on images, and the mean of a run's weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import StochasticDepth

from models import build_model
from quant import (
    Grid,
    adaround,
    calibrate,
    correct_bias,
    fake_quantize_weight,
    layer_rows,
    prune_weights,
    quantize_sums,
    quantize_weights,
    reestimate_batch_norm,
    weight_scale,
)
from tests.helpers import ResNet8, copy_with_args
from utils.checkpoint import load_checkpoint, model_from_checkpoint, save_checkpoint
from utils.data.load import load_dataset


def test_statistics_are_those_of_the_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    images = torch.randn(64, 3, 5, 5) * 3 + 1
    normed = reestimate_batch_norm(copy.deepcopy(net), images.split(16))
    assert not normed.training and normed[1].momentum == net[1].momentum
    features = net[0](images).detach()
    assert torch.allclose(normed[1].running_mean, features.mean((0, 2, 3)), atol=1e-5)
    batch_vars = torch.stack([part.var((0, 2, 3)) for part in features.split(16)])
    assert torch.allclose(normed[1].running_var, batch_vars.mean(0), rtol=1e-5)


def test_nothing_is_random_while_statistics_are_taken():
    net = nn.Sequential(nn.Dropout(0.5), StochasticDepth(0.5, "row"), nn.Linear(8, 4), nn.BatchNorm1d(4))
    images = torch.randn(32, 8)
    normed = reestimate_batch_norm(net.train(), [images])
    assert torch.allclose(normed[3].running_mean, net[2](images).mean(0), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [torch.randn(2, 4, 8, 8), {"images": torch.randn(2, 3, 8, 8)}], ids=["shape", "dict"])
def test_a_failed_call_leaves_the_network_as_it_was(net, training, bad):
    net.train(training)(torch.randn(4, 3, 8, 8))
    quantized = quantize_weights(net, 2)
    batches = [torch.randn(2, 3, 8, 8), bad]
    for call in (
        lambda: reestimate_batch_norm(quantized, batches),
        lambda: correct_bias(quantized, net, batches),
        lambda: adaround(quantized, net, batches, 2, iterations=1),
    ):
        before = {name: value.clone() for name, value in quantized.state_dict().items()}
        with pytest.raises((RuntimeError, TypeError)):
            call()
        after = quantized.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert {module.training for module in [*net.modules(), *quantized.modules()]} == {training}
        assert quantized.bn1.momentum == 0.1


def test_a_layer_that_fails_late_gets_its_weights_back(net):
    """The first layers are corrected by then."""
    quantized = quantize_weights(net.eval(), 2)
    quantized.fc.forward = lambda x: x @ torch.zeros(3, 3)
    for call in (correct_bias, lambda *words: adaround(*words, 2, iterations=1)):
        before = {name: value.clone() for name, value in quantized.state_dict().items()}
        with pytest.raises(RuntimeError):
            call(quantized, net, [torch.randn(2, 3, 8, 8)])
        assert quantized.conv1.bias is None
        assert all(torch.equal(before[name], value) for name, value in quantized.state_dict().items())


def test_batches_may_be_those_of_a_loader(net):
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    plain, pairs = images.split(4), [*DataLoader(TensorDataset(images, labels), batch_size=4)]
    quantized = quantize_weights(net.eval(), 3)
    for call in (
        lambda batches: reestimate_batch_norm(copy.deepcopy(quantized), batches).state_dict(),
        lambda batches: correct_bias(copy.deepcopy(quantized), net, batches).state_dict(),
        lambda batches: adaround(copy.deepcopy(quantized), net, batches, 3, iterations=2).state_dict(),
        lambda batches: calibrate(net, batches, 4),
        lambda batches: quantize_sums(net, batches).state_dict(),
        lambda batches: {row["layer"]: row["input_max"] for row, _ in layer_rows(net, batches, 4)},
    ):
        expected, found = call(plain), call(pairs)
        assert expected.keys() == found.keys()
        assert all(torch.equal(torch.as_tensor(expected[key]), torch.as_tensor(found[key])) for key in expected)


class Attention(nn.Module):
    """An attention whose out_proj is used without a call of it, and a linear layer called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(input=self.attention(x, x, x)[0].mean(1))


def test_the_projection_of_attention_is_a_layer_like_others():
    torch.manual_seed(0)
    net, images = Attention().eval(), torch.randn(16, 5, 6)
    nn.init.normal_(net.attention.out_proj.bias)
    names = ["embed", "attention.out_proj", "head"]
    rows = {row["layer"]: row for row, _ in layer_rows(net, [images], 4)}
    assert list(rows) == names
    with torch.no_grad():
        x = net.embed(images)
        weights = copy.deepcopy(net.attention)
        weights.out_proj.weight.copy_(torch.eye(8))
        weights.out_proj.bias.zero_()
        inputs = weights(x, x, x)[0]
    assert rows["attention.out_proj"]["input_max"] == pytest.approx(inputs.max().item(), rel=1e-5)
    quantized = quantize_weights(net, 2)
    corrected = correct_bias(copy.deepcopy(quantized), net, [images])
    with torch.no_grad():
        outputs = [model.attention(*[model.embed(images)] * 3)[0].mean((0, 1)) for model in (net, corrected)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(net.state_dict())
    learned = adaround(copy.deepcopy(quantized), net, [images], 2, iterations=300, lr=0.1)
    assert not torch.equal(learned.attention.out_proj.weight, quantized.attention.out_proj.weight)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_no_batches_are_refused(net):
    quantized = quantize_weights(net, 4)
    for call in (
        lambda: correct_bias(quantized, net, []),
        lambda: adaround(quantized, net, [], 4),
        lambda: next(iter(layer_rows(net, [], 4))),
    ):
        with pytest.raises(ValueError, match="needs at least one batch of images"):
            call()


def test_layers_that_do_not_run_are_named(net):
    net.aux = nn.Linear(8, 2)
    with pytest.warns(UserWarning, match="not called in eval mode, and so left out: aux"):
        correct_bias(quantize_weights(net, 4), net, [torch.randn(2, 3, 8, 8)])


def test_a_batch_norm_that_is_not_called_is_no_missing_batch(net):
    model = nn.ModuleList([nn.BatchNorm2d(3), net])
    model.forward = net.forward
    reestimate_batch_norm(model, [torch.randn(8, 3, 8, 8)])
    assert [int(norm.num_batches_tracked) for norm in (model[0], net.bn1)] == [0, 1]


def test_bad_networks_and_images():
    with pytest.raises(ValueError, match="Sequential has no batch-norm statistics"):
        reestimate_batch_norm(nn.Sequential(nn.Linear(2, 2)), [torch.randn(4, 2)])


def test_no_images_leave_the_statistics_as_they_are(net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(net, [])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_correct_bias_restores_the_mean_of_every_layer(net):
    """Also of the last one, behind all the others, and in a convolution that had no bias."""
    batches = torch.randn(64, 3, 8, 8).split(32)
    quantized = quantize_weights(net.eval(), 2)

    def watch(model):
        layers = [model.conv1, model.conv2, model.fc]
        handles = [layer.register_forward_hook(lambda m, i, o: outputs.append(o.transpose(0, 1).flatten(1).mean(1)))
                   for layer in layers]  # fmt: skip
        outputs = []
        with torch.no_grad():
            model(torch.cat(batches))
        for handle in handles:
            handle.remove()
        return outputs

    wanted, before = watch(net), watch(quantized)
    corrected = correct_bias(quantized, net, batches)
    assert corrected is quantized and net.conv1.bias is None
    for number, (want, was, now) in enumerate(zip(wanted, before, watch(corrected))):
        assert (want - was).abs().max() > 2e-5, number
        assert (want - now).abs().max() < 2e-6, number


def test_corrected_biases_stay_the_parameters_that_they_are(net):
    """Optimizers hold them, frozen ones stay frozen, and one that is computed is refused before anything changes."""
    batches = [torch.randn(8, 3, 8, 8)]
    quantized = quantize_weights(net.eval(), 2).requires_grad_(False)
    bias = quantized.fc.bias
    before = bias.clone()
    correct_bias(quantized, net, batches)
    assert quantized.fc.bias is bias and not torch.equal(bias, before)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    prune.random_unstructured(quantized.fc, "bias", 0.5)
    kept = copy.deepcopy(quantized.state_dict())
    with pytest.raises(ValueError, match=r"fc.bias is computed from other parameters"):
        correct_bias(quantized, net, batches)
    assert all(torch.equal(value, kept[name]) for name, value in quantized.state_dict().items())


def test_adaround_of_a_closed_case():
    """Inputs that are all one: the output is the sum of the weights. Weights 0.2 to 0.6 of a step above a grid point
    mostly go down to the nearest, and the sum is off by several steps; learned, enough of them go up.
    """
    torch.manual_seed(0)
    layer = nn.Linear(41, 3, bias=False)
    with torch.no_grad():
        layer.weight.uniform_(0.2, 0.6)
        layer.weight[:, 0] = 127.0  # the largest weight of the tensor: a step of 1 at 8 bits
    net = nn.Sequential(layer)
    quantized = quantize_weights(net, 8)
    images = torch.ones(64, 41)
    nearest = (net(images) - quantized(images)).abs().sum()
    rounded = adaround(quantized, net, [images], 8, iterations=1000)
    assert rounded is quantized and set(rounded[0].weight.unique().tolist()) <= {0.0, 1.0, 127.0}
    assert (net(images) - rounded(images)).abs().sum() < 0.5 * nearest


def test_adaround_on_a_network(net):
    """Every weight goes to one of its two neighbours on the grid, and the output comes nearer to the float one."""
    images = torch.randn(128, 3, 8, 8)
    net.eval()
    nearest = quantize_weights(net, 3)
    rounded = adaround(copy.deepcopy(nearest), net, images.split(64), 3, iterations=200)
    with torch.no_grad():
        errors = [(net(images) - other(images)).square().mean().item() for other in (nearest, rounded)]
    assert errors[1] < 0.5 * errors[0]  # a quarter
    for name, bits in (("conv1.weight", 8), ("conv2.weight", 3), ("fc.weight", 8)):
        weight, scale = net.get_parameter(name), weight_scale(net.get_parameter(name), bits)
        steps = (rounded.get_parameter(name) - weight) / scale
        assert steps.abs().max() < 1 and torch.allclose(
            rounded.get_parameter(name) / scale, (rounded.get_parameter(name) / scale).round(), atol=1e-4
        )
    assert torch.equal(rounded.fc.bias, fake_quantize_weight(net.fc.bias, 8))
    grid = Grid(3, per_channel=True, weight_range="mse")
    rounded = adaround(quantize_weights(net, grid), net, [images], grid, iterations=20)
    steps = rounded.conv2.weight / weight_scale(net.conv2.weight, grid)
    assert torch.allclose(steps, steps.round(), atol=1e-4)


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory, digits_run):
    """Folder with the files of three epochs, as of a PSG run with grids of channels: a network and two beside it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = load_checkpoint(digits_run)
    args = checkpoint["args"] | {"psg": 1, "w_bit": 4, "granularity": "channel", "dataset": "cifar10"}
    state, parameters = checkpoint["state_dict"], dict(ResNet8(10).named_parameters())
    generator = torch.Generator().manual_seed(0)
    for epoch in (1, 2, 3):
        moved = {n: state[n] + 0.01 * torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
        facts = {"epoch": epoch, "args": args, "state_dict": state | moved}
        save_checkpoint(folder / f"epoch_{epoch}.pth", checkpoint | facts)
    return folder


@pytest.mark.parametrize("width, zeros", [(32, 0), (4, 0), (32, 0.6)])
def test_mean_of_a_run(cli, tmp_path, few_digits, three_epochs, width, zeros):
    flags = ["--epochs", "1-3", "--out", "mean.pth", "--w_bit", width, "--sparsity", zeros, "--calib_images", 100]
    outcome = cli("tools.average", three_epochs, *flags)
    assert outcome.code == 0 and "the mean of 3 epochs, 1 to 3" in outcome.out, outcome.err
    states = [load_checkpoint(three_epochs / f"epoch_{epoch}.pth")["state_dict"] for epoch in (1, 2, 3)]
    checkpoint = load_checkpoint(tmp_path / "mean.pth")
    assert "optimizer" not in checkpoint and checkpoint["averaged_epochs"] == [1, 3] and checkpoint["epoch"] == 3
    assert checkpoint["deployed"] == {"w_bit": width, "sparsity": zeros} and checkpoint["classes"][9] == "9"
    model = model_from_checkpoint(checkpoint, "mean.pth")
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, sum(state[name] for state in states) / 3, atol=1e-6), name
    digits = load_dataset("cifar10", "data", torch.device("cpu"))
    images = [batch for batch, _ in digits.train.calibration(100, seed=1)]
    deployed = quantize_weights(prune_weights(model, zeros), Grid(width, per_channel=True))
    expected = reestimate_batch_norm(deployed, images).state_dict()
    for name, value in model.named_buffers():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-5), name
    outcome = cli("eval.py", "--model_path", "mean.pth")
    assert "PSGD W4 channel mean" in outcome.out and "1-3" in outcome.out


def test_one_epoch_keeps_its_weights(cli, tmp_path, few_digits, three_epochs):
    flags = ["--epochs", "2", "--out", "bn.pth", "--w_bit", "4", "--calib_images", "128"]
    assert cli("tools.average", three_epochs, *flags).code == 0
    before, after = (
        load_checkpoint(path)["state_dict"] for path in (three_epochs / "epoch_2.pth", tmp_path / "bn.pth")
    )
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert "PSGD W4 channel bn " in cli("eval.py", "--model_path", "bn.pth").out


def test_bad_input_of_average(rejected, few_digits, three_epochs):
    flags = ["--out", "a.pth", "--epochs"]
    assert "epoch_4.pth is not there: train with --save_epochs 2-4" in rejected(
        "tools.average", three_epochs, *flags, "2-4"
    )
    assert "runs/no/epoch_1.pth is not there" in rejected("tools.average", "runs/no", *flags, "1")
    too_many = [*flags, "1-3", "--calib_images", "5000"]
    assert "--calib_images 5000 is more than the 128" in rejected("tools.average", three_epochs, *too_many)


def test_average_knows_no_learned_steps(rejected, tmp_path, few_digits, three_epochs):
    copy_with_args(three_epochs / "epoch_2.pth", tmp_path / "epoch_2.pth", method="lsq")
    flags = [tmp_path, "--epochs", "2", "--w_bit", "4", "--out", "a.pth"]
    assert "epoch_2.pth: it was trained for grids of learned steps" in rejected("tools.average", *flags)


def test_average_refuses_an_epoch_of_another_network(rejected, tmp_path, few_digits, three_epochs):
    last = load_checkpoint(three_epochs / "epoch_2.pth")
    other = {"arch": "ResNet8", "num_classes": 5, "state_dict": ResNet8(5).state_dict()}
    save_checkpoint(tmp_path / "epoch_1.pth", other)
    save_checkpoint(tmp_path / "epoch_2.pth", last)
    message = rejected("tools.average", tmp_path, "--epochs", "1-2", "--out", "a.pth")
    assert "epoch_1.pth has 5 classes, but the data set has 10" in message


def test_adaround_leaves_pruned_weights_at_zero(net):
    pruned = prune_weights(net.eval(), 0.5)
    images = torch.randn(64, 3, 8, 8)
    learned = adaround(copy.deepcopy(pruned), pruned, [images], 4, iterations=50, lr=0.5)
    nearest = quantize_weights(pruned, 4)
    for name in ("conv1.weight", "conv2.weight"):
        zero = pruned.get_parameter(name) == 0
        assert zero.any() and not learned.get_parameter(name)[zero].any()
        assert not torch.equal(learned.get_parameter(name), nearest.get_parameter(name))


def test_correct_bias_of_linear_layers_on_tokens():
    """[N, T, C]: the channels are the last dimension, also where T equals C."""
    torch.manual_seed(0)
    stack, tokens = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5)), torch.randn(32, 6, 6)
    corrected = correct_bias(quantize_weights(stack, 4), stack, [tokens], first_last=True)
    with torch.no_grad():
        assert torch.allclose(corrected[0](tokens).mean((0, 1)), stack[0](tokens).mean((0, 1)), atol=1e-5)
        assert torch.allclose(corrected(tokens).mean((0, 1)), stack(tokens).mean((0, 1)), atol=1e-5)


def test_modes_of_the_float_network_are_restored(net):
    net.train()
    net.bn1.eval()
    images = torch.randn(8, 3, 8, 8)
    modes = [module.training for module in net.modules()]
    correct_bias(quantize_weights(net, 4), net, [images])
    adaround(quantize_weights(net, 4), net, [images], 4, iterations=1)
    for _ in layer_rows(net, [images], 4):
        pass
    calibrate(net, [images], 8)
    assert [module.training for module in net.modules()] == modes


def test_layers_without_a_weight_of_their_own():
    """One that shares its weight, and one whose weight is computed from another."""
    torch.manual_seed(0)
    first, tied, computed = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = first.weight
    stack = nn.Sequential(first, nn.ReLU(), tied, nn.ReLU(), spectral_norm(computed), nn.ReLU(), nn.Linear(4, 2))
    images = torch.randn(64, 4)
    assert [row["layer"] for row, _ in layer_rows(stack.eval(), [images], 4)] == ["0", "6"]
    learned = adaround(quantize_weights(stack, 4), stack, [images], 4, iterations=100, lr=0.1)
    assert learned[2].weight is learned[0].weight and torch.isfinite(learned(images)).all()
    scale = weight_scale(first.weight, 4)
    integers = learned[0].weight / scale
    assert torch.allclose(integers, integers.round(), atol=1e-5)
    assert torch.equal(learned[4].bias, fake_quantize_weight(computed.bias, 4))


def test_average_needs_batch_norm(rejected, tmp_path):
    network = build_model("squeezenet1_1", 10)
    checkpoint = {"epoch": 1, "state_dict": network.state_dict(), "arch": "squeezenet1_1", "num_classes": 10}
    checkpoint["args"] = {"dataset": "digits", "val_split": 0, "first_last_quant": 1}
    save_checkpoint(tmp_path / "epoch_1.pth", checkpoint)
    message = rejected("tools.average", tmp_path, "--epochs", "1", "--out", "a.pth", "--calib_images", "64")
    assert "epoch_1.pth: SqueezeNet has no batch-norm statistics" in message
    save_checkpoint(tmp_path / "epoch_1.pth", checkpoint | {"args": {}})
    message = rejected("tools.average", tmp_path, "--epochs", "1", "--out", "a.pth")
    assert "epoch_1.pth does not say its --dataset: it is not a checkpoint of train.py" in message


def test_a_network_that_is_one_layer():
    torch.manual_seed(0)
    layer, stack, images = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), torch.randn(64, 8)
    stack[0].load_state_dict(layer.state_dict())
    ((row, _),), ((other, _),) = (list(layer_rows(net, [images], 3)) for net in (layer, stack))
    assert row["layer"] == "" and other["layer"] == "0"
    assert {**row, "layer": 0} == {**other, "layer": 0}
    learned, twin = (adaround(quantize_weights(net, 3), net, [images], 3, 50, 0.1) for net in (layer, stack))
    assert torch.equal(learned.weight, twin[0].weight)
    assert not torch.equal(learned.weight, quantize_weights(layer, 3).weight)


def test_adaround_keeps_the_scales():
    torch.manual_seed(0)
    grid = Grid(3, per_channel=True)
    stack = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 30), nn.Linear(30, 2))
    images = torch.randn(64, 3)
    learned = adaround(quantize_weights(stack, grid), stack, [images], grid, iterations=300, lr=0.1)
    torch.testing.assert_close(weight_scale(learned[1].weight, grid), weight_scale(stack[1].weight, grid))


class Routed(nn.Module):
    """Two experts, between which the sign of the first value of a row decides."""

    def __init__(self):
        super().__init__()
        self.experts, self.out = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 2)

    def forward(self, x):
        mixed, first = torch.zeros_like(x), x[:, 0] > 0
        for expert, rows in zip(self.experts, (first, ~first)):
            mixed[rows] = expert(x[rows])
        return self.out(mixed)


def test_experts_that_the_first_rows_do_not_reach():
    torch.manual_seed(0)
    net, x = Routed(), torch.randn(64, 4)
    batches = [x[x[:, 0] > 0], x[x[:, 0] < 0]]
    names = ["experts.0", "experts.1", "out"]
    assert sorted(calibrate(net, batches, 8, at="inputs")) == names
    assert sorted(row["layer"] for row, _ in layer_rows(net, batches, 4)) == names
    corrected = correct_bias(quantize_weights(net, 4), net, batches)
    with torch.no_grad():
        for batch, name in zip(batches, names):
            found, wanted = (network.get_submodule(name)(batch).mean(0) for network in (corrected, net))
            torch.testing.assert_close(found, wanted)
    other = quantize_weights(net, 4)
    other.forward = lambda rows: other.out(other.experts[0](rows))
    with pytest.raises(ValueError, match=r"experts\.1 is not called in the quantized network"):
        correct_bias(other, net, batches)
    with pytest.raises(ValueError, match=r"experts\.\d has other inputs in the quantized network"):
        adaround(other, net, batches, 4, iterations=1)
