import pytest
import torch
from torch import nn

from models import ARCHITECTURES, ResNet32, build_model, vgg16_bn
from quant import layer_grids

COUNTS = {"ResNet32": 472_756, "vgg16_bn": 34_011_172, "vit_tiny": 2_729_380}


@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_count_at_100_classes(arch):
    assert sum(p.numel() for p in build_model(arch, 100).parameters()) == COUNTS[arch]


def test_resnet32_quantized_weights():
    model = ResNet32(100)
    names = [name for name in layer_grids(model, 4) if name.endswith("weight")]
    assert len(names) == 34
    assert sum(model.get_parameter(name).numel() for name in names) == 470_192


def test_resnet32_published_keys():
    keys = set(ResNet32(100).state_dict())
    block = {f"layer{stage}.{n}" for stage in (1, 2, 3) for n in range(5)}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{key}" for key in norm}
    for name in block:
        expected |= {f"{name}.conv1.weight", f"{name}.conv2.weight"}
        expected |= {f"{name}.bn{n}.{key}" for n in (1, 2) for key in norm}
    for name in ("layer2.0", "layer3.0"):
        expected |= {f"{name}.downsample.0.weight"} | {f"{name}.downsample.1.{key}" for key in norm}
    assert keys == expected


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("num_classes", [10, 100])
def test_output_shape_and_backward(arch, num_classes):
    model = build_model(arch, num_classes)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, num_classes)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resnet32_stages_halve_the_image_and_double_the_channels():
    model = ResNet32(10)
    x = torch.randn(1, 3, 32, 32)
    x = model.relu(model.bn1(model.conv1(x)))
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("arch", [ResNet32, vgg16_bn])
def test_plain_modules_and_one_relu_a_place(arch):
    """No module outside torch.nn computes anything, and no ReLU module is used at two places."""
    model = arch(10)
    calls = {}
    leaves = [module for module in model.modules() if not list(module.children())]
    assert all(type(module).__module__.startswith("torch.nn") for module in leaves)
    for module in leaves:
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, *_: calls.__setitem__(id(m), calls.get(id(m), 0) + 1))
    model.eval()(torch.randn(1, 3, 32, 32))
    assert set(calls.values()) == {1}
    assert len(calls) == (31 if isinstance(model, ResNet32) else 15)
