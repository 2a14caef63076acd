"""What tests share: small networks and data, twins of the rule, and readers of what commands write."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from models import ResNet32
from quant import PSGD, Grid, layer_grids, psg_param_groups
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data.in_memory import InMemorySplit
from utils.data.load import load_dataset
from utils.data.specs import DATASETS
from utils.training.epochs import Training

ROOT = Path(__file__).parent.parent
CIFAR100 = ROOT / "data" / "cifar100.npz"
needs_cifar100 = pytest.mark.skipif(
    not CIFAR100.exists(), reason=f"needs the real CIFAR-100 at {CIFAR100.relative_to(ROOT)}"
)
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class SmallNet(nn.Module):
    """Three convolutions, batch norm, a residual sum and a linear layer: every kind of parameter, quick to run."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


class ResNet8(ResNet32):
    """ResNet-32 with one block a stage: every kind of layer that it has, and a quarter of the work."""

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__(num_classes)
        for stage in (self.layer1, self.layer2, self.layer3):
            del stage[1:]


def small_mobilenet(num_classes: int) -> MobileNetV3:
    """MobileNetV3 of two blocks: Hardswish and Hardsigmoid beside ReLU, depthwise convolutions, products."""
    layers = [InvertedResidualConfig(8, 3, 16, 8, True, kind, stride, 1, 1) for kind, stride in (("HS", 1), ("RE", 2))]
    return MobileNetV3(layers, 16, num_classes)


def copy_with_args(source, path, **args):
    """Copies the checkpoint `source` to `path`, with other `args` of its training; returns `path`."""
    checkpoint = load_checkpoint(source)
    save_checkpoint(path, checkpoint | {"args": checkpoint["args"] | args})
    return path


def twin_multiplier(weight, bits, lambda_s, eps=0.0):
    """The rule as one writes it down, a tensor at a time."""
    scale = weight.abs().max() / (2 ** (bits - 1) - 1)
    return lambda_s * (weight - torch.round(weight / scale) * scale).abs() + eps


def scale_by_hand(net, bits, lambda_s):
    """Scales the gradients of `net` by the rule."""
    for name, grid in layer_grids(net, bits).items():
        parameter = net.get_parameter(name)
        parameter.grad *= twin_multiplier(parameter.detach(), grid.bits, lambda_s)


def backward(net, seed=0):
    net.zero_grad()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    net(images).square().sum().backward()


def fill_gradients(net, seed):
    """Equal gradients for equal seeds, bit for bit, which two backward passes do not promise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def sgd(net, bits=4, lr=0.01, per_channel=False, **settings):
    groups = psg_param_groups(net, Grid(bits, per_channel=per_channel))
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=1e-4, **settings)


def weights(net):
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def take_steps(net, optimizer, steps=3, first=0):
    for step in range(first, first + steps):
        fill_gradients(net, step)
        optimizer.step()


class Walk:
    """Weights spread evenly over the cells of a 4-bit grid, with gradients of pure noise."""

    def __init__(self, sizes=(4000,), spreads=(1.0,), seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.weights = [
            nn.Parameter(torch.cat([torch.tensor([7.0]), 13 * torch.rand(n - 1, generator=self.generator) - 6.5]))
            for n in sizes
        ]
        self.spreads = spreads

    def groups(self, **settings):
        return [{"params": self.weights, "bits": 4} | settings]

    def steps(self, optimizer, count, schedule=None, loss_scale=1.0):
        for _ in range(count):
            for weight, spread in zip(self.weights, self.spreads):
                noise = torch.randn(weight.shape, generator=self.generator)
                noise[0] = 0  # the largest weight makes the grid
                weight.grad = loss_scale * spread * noise
            optimizer.step()
            if schedule:
                schedule.step()

    def share(self):
        """Share of weights at most a tenth of the scale from a grid point. The scale is 1."""
        apart = torch.cat([(weight - weight.round()).abs() for weight in self.weights])
        return (apart <= 0.1).float().mean().item()


def split(count=130, classes=10):
    """Images of noise with random labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return InMemorySplit(images, torch.randint(0, classes, (count,), generator=generator), DATASETS["cifar100"])


def trained_resnet():
    """ResNet8 with batch-norm statistics that are not those of initialization."""
    torch.manual_seed(0)
    model = ResNet8(10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    model.train()
    for images, _ in split().batches(65):
        model(images)
    return model.eval()


def run_graph(proto, *inputs):
    """The first output of an ONNX model by onnxruntime, optimized, but not with products by 8-bit activations in place
    of float ones."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})[0])


def graph_is_near(proto, model, *inputs):
    """Whether an ONNX model gives the outputs of `model`, in eval mode, up to rounding."""
    with torch.no_grad():
        expected = model.eval()(*inputs)
    return (run_graph(proto, *inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()


def small_training(device, compiled, classes=10):
    """A training of SmallNet on 60 digits, in batches of 25, 25 and 10."""
    torch.manual_seed(0)
    digits = load_dataset("digits", "", device)
    batches = digits.train.part(slice(60)).shuffled(batch_size=25, seed=3)
    model = SmallNet(classes).to(device, memory_format=torch.channels_last)
    optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.01, momentum=0.9, fused=True))
    return Training(model, optimizer, batches, "fp32", compile=compiled)


def permuted(path, order, names=None):
    """Writes the data of data/cifar10.npz to `path` with its classes in another order, or under other names."""
    with np.load("data/cifar10.npz") as archive:
        content = dict(archive)
    numbers = np.argsort(order)  # of the classes, in their new order
    content |= {f"y_{part}": numbers[content[f"y_{part}"]] for part in ("train", "test")}
    content["classes"] = np.array([(names or content["classes"])[old] for old in order])
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **content)
