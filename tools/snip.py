"""SNIP (Lee et al., ICLR 2019): pruning before training. A baseline for sparse training.

    python -m tools.snip --sparsity 0.9 --lr 0.1 --decay_epoch 82 123 --epoch 150 --exp_name snip

The saliency of a weight is |w * dL/dw| of the fresh network, on --snip_batches batches of training images. The weights
with the largest saliencies over all layers are kept; the others are zero from the start to the end. All other flags are
those of train.py, which trains the network from scratch, without PSG.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import train
from quant.layers import copy_network
from quant.pruning import masks_of_smallest, prunable_weights
from utils.cli import Parser, UserError, count, run
from utils.data.split import LabelledBatch


def saliencies(model: nn.Module, batches: Iterable[LabelledBatch], first_last: bool = True) -> list[Tensor]:
    """|w * dL/dw| of every prunable weight, where L is the mean loss over `batches`, in training mode."""
    weights = [*prunable_weights(model, first_last).values()]
    total = [torch.zeros_like(weight) for weight in weights]
    model.train()
    for images, labels in batches:
        gradients = torch.autograd.grad(cross_entropy(model(images), labels), weights)
        torch._foreach_add_(total, gradients)
    return [(weight * gradient).detach().abs() for weight, gradient in zip(weights, total)]


@torch.no_grad()
def hold_at_zero(weights: Sequence[Tensor], masks: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Sets the weights outside of `masks` to zero, now and after every step of `optimizer`."""

    @torch.no_grad()
    def mask(*_: Any) -> None:
        torch._foreach_mul_([*weights], masks)

    mask()
    optimizer.register_step_post_hook(mask)


def prune_at_start(prepared: Any, batches: int) -> None:
    """SNIP on a prepared run (utils.training.run.Run). A resumed run keeps the zeros that it has."""
    prepared.command = "python -m tools.snip"
    if prepared.world.size > 1:
        raise UserError("tools.snip needs a single process")
    first_last = bool(prepared.args.first_last_quant)
    named = prunable_weights(prepared.model, first_last)
    weights = [*named.values()]
    if prepared.done >= prepared.first_epoch:
        masks = [(weight != 0).to(weight.dtype) for weight in weights]
    else:
        images = islice(prepared.batches.epoch(prepared.first_epoch), batches)
        model = copy_network(prepared.model)  # whose batch norm the images change
        masks = masks_of_smallest(saliencies(model, images, first_last), prepared.args.sparsity)
        if empty := next((name for name, mask in zip(named, masks) if not mask.any()), None):
            raise UserError(f"--sparsity {prepared.args.sparsity:g} leaves no weight of {empty}: try a smaller one")
    hold_at_zero(weights, masks, prepared.optimizer)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--snip_batches", type=count, default=1, metavar="N", help="batches for the saliencies")
    return p


def main() -> None:
    args, flags = parser().parse_known_args()
    command, sys.argv = sys.argv, [*sys.argv[:1], "--target", "zero", "--psg", "0", *flags]
    settings, folder = train.parse()
    sys.argv = command  # for the record
    if folder and "snip_batches" not in settings:
        raise UserError(f"{folder.path} was not started by tools.snip: train.py --resume continues it")
    if settings.psg or settings.target != "zero":
        raise UserError("--psg and --target follow from tools.snip: leave them out")
    if not folder:
        settings.snip_batches = args.snip_batches

    from utils.training.run import train as train_run

    train_run(settings, folder, lambda prepared: prune_at_start(prepared, settings.snip_batches))


if __name__ == "__main__":
    run(main)
