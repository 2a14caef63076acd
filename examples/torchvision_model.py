"""PSGD on a torchvision network, for 3 bits, and its export to two files.

    pip install ".[export]" torchvision
    python examples/torchvision_model.py

A few steps from random weights on random images, to show the calls.
"""

import torch
from psgd import PSGD, export, grid_share, psg_param_groups
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

torch.manual_seed(0)
model = resnet18(num_classes=10)  # or resnet18(weights="DEFAULT")
groups = psg_param_groups(model, 3)  # the first and the last layer get 8 bits
optimizer = PSGD(torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-4), lambda_s=600)
print({group.get("bits", "float"): len(group["params"]) for group in optimizer.param_groups})

images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
for step in range(6):
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}, on the grid {100 * grid_share(model, 3):.1f} %")

export(model, "resnet18_w3.safetensors", 3)
export(model, "resnet18_w3.onnx", 3, image_size=64)
