"""One training step and one epoch of them. Nothing is read back from the device inside an epoch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from utils.data.split import LabelledBatch
from utils.device import autocast
from utils.distributed import ALONE, World
from utils.training.extra_loss import ExtraLoss


@dataclass
class Result:
    """Mean cross-entropy and top-1 accuracy in percent."""

    loss: float
    top1: float


class NonFiniteError(ArithmeticError):
    """The loss or a weight became NaN or infinite, or a whole weight tensor zero. The message says which, and at which
    step (from 1) or in which part of an epoch."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: str,
    extra: ExtraLoss | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the sum of its losses and the number of its correct answers, 0-d, on the device.

    `extra` is added to what is minimized, not to what is returned. `share` weights a loss whose gradient
    is averaged over processes with batches of different sizes.
    """
    with autocast(images.device, precision):
        logits = model(images)
        loss = cross_entropy(logits, labels)
    optimizer.zero_grad()
    (share * (loss + extra(images, logits, loss)) if extra else share * loss).backward()
    optimizer.step()
    return loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()


def epoch_result(model: nn.Module, losses: Tensor, hits: Tensor, images_seen: int, world: World = ALONE) -> Result:
    """Loss and accuracy over the images of an epoch, over all processes, from each step's sums [steps].

    Raises NonFiniteError if a loss, or a weight of `model`, is not finite.
    """
    per_step = world.sum(losses.float()).cpu().double()
    right, seen = world.sum(torch.stack([hits.sum(), hits.new_tensor(images_seen)])).tolist()
    bad = (~per_step.isfinite()).nonzero()
    if len(bad):
        step = int(bad[0])
        raise NonFiniteError(f"the loss became {per_step[step].item()} at step {step + 1}")
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise NonFiniteError(f"{name} was no longer finite after step {len(losses)}")
        if parameter.dim() > 1 and not parameter.any():
            raise NonFiniteError(f"{name} was all zeros, which nothing moves, after step {len(losses)}")
    return Result(per_step.sum().item() / seen, 100 * right / seen)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[LabelledBatch],
    precision: str,
    extra: ExtraLoss | None = None,
    world: World = ALONE,
    sizes: Sequence[int] = (),
) -> Result:
    """One pass over `batches`; returns loss and accuracy over the images as they were trained on.

    With several processes, `batches` are this process's parts of batches of `sizes` images. Raises NonFiniteError at
    the end of the epoch in which the loss, or a weight, stopped being finite.
    """
    model.train()
    sums, images_seen = [], 0
    for step, (images, labels) in enumerate(batches):
        share = len(labels) * world.size / sizes[step] if world.size > 1 else 1.0
        sums.append(train_step(model, optimizer, images, labels, precision, extra, share))
        images_seen += len(labels)
    losses, hits = map(torch.stack, zip(*sums))
    return epoch_result(model, losses, hits, images_seen, world)
