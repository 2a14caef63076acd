"""PSGD for a network of timm, with timm's parameter groups: no weight decay for norms and biases.

    pip install . timm scikit-learn
    python examples/timm_network.py

A MobileNetV3 on scikit-learn's digits, enlarged to 32 x 32. A scale for each output channel, because it has depthwise
convolutions.
"""

import timm
import torch
from psgd import PSGD, Grid, grid_share, psg_param_groups, quantize_weights
from sklearn.datasets import load_digits
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, 32, mode="bilinear")
labels = torch.tensor(digits.target)
train, test = slice(0, 1437), slice(1437, None)
model = timm.create_model("mobilenetv3_small_050", in_chans=1, num_classes=10)


def run(optimizer: torch.optim.Optimizer, epochs: int) -> None:
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * epochs)])
    for _ in range(epochs):
        model.train()
        for chosen in torch.randperm(1437).split(32):
            loss = cross_entropy(model(images[train][chosen]), labels[train][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        decay.step()


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


grid = Grid(4, per_channel=True)
groups = param_groups_weight_decay(model, weight_decay=1e-4)
run(torch.optim.SGD(groups, lr=0.05, momentum=0.9), epochs=8)
print(f"before: float {accuracy(model):.2f} and at 4 bits {accuracy(quantize_weights(model, grid)):.2f}")

groups = psg_param_groups(param_groups_weight_decay(model, weight_decay=1e-4), grid, model=model)
base = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
run(PSGD(base, lambda_s="auto", steps=12 * 45), epochs=12)  # 45 batches an epoch
print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, grid):.1f} %")
print(f"test accuracy: float {accuracy(model):.2f}, 4 bits {accuracy(quantize_weights(model, grid)):.2f}")
