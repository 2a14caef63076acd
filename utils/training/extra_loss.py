"""What the settings of a run add to the cross-entropy of its steps: a penalty on gradients, and a teacher."""

from argparse import Namespace
from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quant.penalties import gradient_penalty
from utils.checkpoint import load_checkpoint, model_from_checkpoint
from utils.cli import UserError
from utils.data.load import Dataset
from utils.device import autocast
from utils.opening import matched
from utils.training.checks import check_takes

# From images, logits and their loss, 0-d, to what is added to the loss.
ExtraLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def load_teacher(path: str, dataset: Dataset, device: torch.device) -> nn.Module:
    """The network of the file `path`, in eval mode. Raises UserError if it is for other images or classes."""
    source = load_checkpoint(path)
    if matched(dataset, source, path) is not dataset:
        raise UserError(f"--teacher {path} has the classes in another order than the network that is trained")
    teacher = model_from_checkpoint(source, path, num_classes=len(dataset.classes)).requires_grad_(False).to(device)
    check_takes(teacher, f"{source.get('arch')} of --teacher {path}", dataset.spec.size)
    return teacher.to(memory_format=torch.channels_last)


def distillation(teacher: nn.Module, precision: str) -> ExtraLoss:
    """Takes half of the loss from the labels and gives it to the outputs of `teacher`.

    At temperature 1 and with equal weights, as quantized networks are distilled by Esser et al. (LSQ, ICLR 2020); the
    idea is that of Hinton et al. (2015).
    """

    def extra(images: Tensor, logits: Tensor, loss: Tensor) -> Tensor:
        with torch.no_grad(), autocast(images.device, precision):
            targets = teacher(images).float().softmax(1)
        return (cross_entropy(logits.float(), targets) - loss) / 2

    return extra


def extra_loss(args: Namespace, model: nn.Module, teacher: nn.Module | None) -> ExtraLoss | None:
    """The sum of what `args` add to the loss of `model`, or None."""
    penalty = gradient_penalty(model, args.grad_l1, bool(args.first_last_quant))
    extras: list[ExtraLoss] = [lambda images, logits, loss: penalty(loss)] if penalty else []
    extras += [distillation(teacher, args.precision)] if teacher else []
    if not extras:
        return None
    return lambda images, logits, loss: reduce(torch.add, [extra(images, logits, loss) for extra in extras])
