"""PSGD in Hugging Face's Trainer: it takes the optimizer as `optimizers=(optimizer, scheduler)`.

    pip install . transformers accelerate scikit-learn
    python examples/huggingface_trainer.py

A small vision transformer, from scratch, on scikit-learn's digits. The base is AdamW, so PSG acts on its updates, which
have no momentum (beta1 = 0). The Trainer clips gradients to a norm of 1 before the step, which does no harm.
"""

import torch
from psgd import PSGD, grid_share, psg_param_groups, quantize_weights
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

set_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
train = [{"pixel_values": image, "labels": label} for image, label in zip(images[:1437], labels[:1437])]
test = slice(1437, None)

model = ViTForImageClassification(ViTConfig(
    image_size=8, patch_size=2, num_channels=1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
))  # fmt: skip


def run(optimizer: torch.optim.Optimizer, epochs: int) -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    arguments = TrainingArguments(
        output_dir="runs/trainer", num_train_epochs=epochs, per_device_train_batch_size=64, save_strategy="no",
        logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=train, optimizers=(optimizer, scheduler)).train()


steps = -(-len(train) // 64)  # in an epoch
run(torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01), epochs=10)
base = torch.optim.AdamW(psg_param_groups(model, 4), lr=3e-3, betas=(0.0, 0.999), weight_decay=0.01)
run(PSGD(base, lambda_s="auto", acts_on="update", steps=40 * steps), epochs=40)


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network.eval()(images[test]).logits.argmax(1) == labels[test]).float().mean().item()


print(f"weights within a tenth of a step of the 4-bit grid: {100 * grid_share(model, 4):.1f} %")
print(f"test accuracy: float {accuracy(model):.2f}, 4 bits {accuracy(quantize_weights(model, 4)):.2f}")
