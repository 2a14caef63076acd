"""PSGD in a LightningModule: `configure_optimizers` returns it like any optimizer.

    pip install . lightning scikit-learn
    python examples/lightning_module.py

A small fully connected network on scikit-learn's digits.
"""

import lightning
import torch
from psgd import PSGD, grid_share, psg_param_groups, quantize_weights
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

lightning.seed_everything(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train, test = TensorDataset(images[:1437], labels[:1437]), slice(1437, None)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, _):
        chosen, wanted = batch
        return cross_entropy(self.network(chosen), wanted)

    def configure_optimizers(self):
        base = torch.optim.SGD(psg_param_groups(self.network, 4), lr=0.05, momentum=0.9)
        optimizer = PSGD(base, lambda_s="auto", steps=self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.75 * self.trainer.max_epochs)])
        return {"optimizer": optimizer, "lr_scheduler": decay}


model = Classifier()
trainer = lightning.Trainer(
    max_epochs=60, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network(images[test]).argmax(1) == labels[test]).float().mean().item()


network = model.network
print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(network, 4):.1f} %")
print(f"test accuracy: float {accuracy(network):.2f}, 4 bits {accuracy(quantize_weights(network, 4)):.2f}")
