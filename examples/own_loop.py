"""PSGD in your own training loop: a small convolutional network on scikit-learn's digits, for 4 bits.

    pip install . scikit-learn
    python examples/own_loop.py

With a cosine schedule, gradient clipping and batch norm, as in a usual loop.
"""

import torch
from psgd import PSGD, grid_share, psg_param_groups, quantize_weights, reestimate_batch_norm
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train, test = slice(0, 1437), slice(1437, None)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Flatten(), nn.Linear(512, 10),
)  # fmt: skip
optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.05, momentum=0.9), lambda_s=50)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)

for _ in range(30):
    model.train()
    for chosen in torch.randperm(1437).split(64):
        loss = cross_entropy(model(images[train][chosen]), labels[train][chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # before the step, while gradients are unscaled
        optimizer.step()
    scheduler.step()


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network.eval()(images[test]).argmax(1) == labels[test]).float().mean().item()


print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, 4):.1f} %")
four_bit_model = reestimate_batch_norm(quantize_weights(model, 4), images[train].split(64))
print(f"test accuracy: float {accuracy(model):.2f}, 4 bits {accuracy(four_bit_model):.2f}")
