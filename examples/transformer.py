"""PSGD on a transformer: linear layers go to the grid, the embedding and LayerNorm are left alone. The base is AdamW,
whose normalization cancels a scaling of the gradient, so PSG acts on its updates, which have no momentum (beta1 = 0).

    pip install . scikit-learn
    python examples/transformer.py
    python examples/transformer.py runs/transformer    # writes its pace too, as `python -m tools.pace --runs` reads it

scikit-learn's digits as sequences of eight rows.
"""

import csv
import json
import sys
from pathlib import Path

import torch
from psgd import PSGD, Grid, grid_share, layer_grids, psg_param_groups, quantize_weights
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

torch.manual_seed(0)
digits = load_digits()
rows = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
train, test = slice(0, 1437), slice(1437, None)


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class Classifier(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Embedding(8, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.embed(x) + self.position.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


model = Classifier()
grid = Grid(4, exclude=nn.Embedding)  # which stays in float anyway; said here, it needs no warning
left_alone = [name for name, _ in model.named_parameters() if name not in layer_grids(model, grid)]
print(f"left alone: {', '.join(left_alone)}")


history = []


def run(optimizer: torch.optim.Optimizer, epochs: int) -> None:
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(1437).split(64):
            loss = cross_entropy(model(rows[train][chosen]), labels[train][chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if isinstance(optimizer, PSGD):
            pace, near = optimizer.pace(), grid_share(model, grid)
            history.append([epoch, 3e-3, near, pace.tau, pace.expected_share])


run(torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01), epochs=20)
base = torch.optim.AdamW(psg_param_groups(model, grid), lr=3e-3, betas=(0.0, 0.999), weight_decay=0.01)
optimizer = PSGD(base, lambda_s="auto", acts_on="update", steps=40 * 23)  # 23 batches an epoch
run(optimizer, epochs=40)


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network(rows[test]).argmax(1) == labels[test]).float().mean().item()


expected = 100 * optimizer.pace().expected_share
print(
    f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, grid):.1f} % (law: {expected:.1f})"
)
print(f"test accuracy: float {accuracy(model):.2f}, 4 bits {accuracy(quantize_weights(model, grid)):.2f}")

if folder := sys.argv[1:]:
    Path(folder[0]).mkdir(parents=True, exist_ok=True)
    (Path(folder[0]) / "args.json").write_text(json.dumps({"args": {"psg": 1, "w_bit": 4}}))
    with open(Path(folder[0]) / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([["epoch", "lr", "grid_share", "tau", "expected_share"], *history])
