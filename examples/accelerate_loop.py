"""PSGD in a Hugging Face Accelerate loop: `prepare` takes it like any optimizer.

    pip install . accelerate scikit-learn
    python examples/accelerate_loop.py

A small fully connected network on scikit-learn's digits.
"""

import torch
from accelerate import Accelerator
from psgd import PSGD, grid_share, psg_param_groups, quantize_weights
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)

model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.05, momentum=0.9), lambda_s=50)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30 * len(loader))

accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=1)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
for _ in range(30):
    for batch, wanted in loader:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(batch), wanted)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

model = accelerator.unwrap_model(model).cpu()
with torch.no_grad():
    accuracies = [
        100 * (network(images[1437:]).argmax(1) == labels[1437:]).float().mean().item()
        for network in (model, quantize_weights(model, 4))
    ]
accelerator.print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, 4):.1f} %")
accelerator.print(f"test accuracy: float {accuracies[0]:.2f}, 4 bits {accuracies[1]:.2f}")
