"""Loss and top-1 of networks, as they are and as they are deployed."""

import contextlib
import gc
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.functional import cross_entropy
from torch.nn.utils.fusion import fuse_conv_bn_eval

from quant.layers import copy_network
from quant.tracing import conv_norm_pairs, trace
from utils.cli import warn
from utils.data.split import LabelledBatch, Split
from utils.device import autocast
from utils.distributed import ALONE, World
from utils.progress import shown
from utils.training.goals import Goal
from utils.training.loop import NonFiniteError, Result


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """`model` itself, in eval mode, with every batch norm that follows a convolution folded into it: for evaluation.

    Computes the same function up to rounding, faster. A model that torch.fx cannot trace stays as it is.
    """
    with collected_at_once():
        try:
            pairs = [(str(conv.target), str(norm.target)) for conv, norm in conv_norm_pairs(model.eval(), trace(model))]
        except TraceError:
            return model
    for before, after in pairs:
        conv, norm = model.get_submodule(before), model.get_submodule(after)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            model.set_submodule(before, fuse_conv_bn_eval(conv, norm))
            model.set_submodule(after, nn.Identity())
    return model


@contextlib.contextmanager
def collected_at_once() -> Iterator[None]:
    """Frees the reference cycles that the block leaves behind when it ends.

    Every evaluation makes a trace. The garbage collector frees objects that have survived a while only after tens of
    megabytes of them.
    """
    enabled = gc.isenabled()
    gc.disable()  # what is made in the block stays in the youngest generation
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


def evaluate(model: nn.Module, split: Split, precision: str = "fp32", world: World = ALONE) -> Result:
    """Loss and top-1 of `model` in eval mode on every image of `split`, divided among the processes of `world`."""
    part = split.part(slice(world.rank, None, world.size)) if world.size > 1 else split
    batches = part.batches(part.eval_batch_size)
    steps = -(-len(part) // part.eval_batch_size)
    return evaluate_batches(model, shown(batches, "evaluation", steps, not world.is_main), precision, world)


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[LabelledBatch],
    precision: str = "fp32",
    world: World = ALONE,
) -> Result:
    """Loss and top-1 of `model` in eval mode on the images of all `batches`, of all processes."""
    model.eval()
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    count = 0
    for images, labels in batches:
        with autocast(images.device, precision):
            logits = model(images).float()
        losses.append(cross_entropy(logits, labels, reduction="sum"))
        hits.append((logits.argmax(1) == labels).sum())
        count += len(labels)
    right = torch.stack(hits).sum()
    if world.size > 1:
        right, total = world.sum(torch.stack([right, right.new_tensor(count)])).tolist()
        return Result(world.sum(torch.stack(losses).double().sum()).item() / total, 100 * right / total)
    return Result(torch.stack(losses).cpu().double().sum().item() / count, 100 * right.item() / count)


def evaluate_goal(model: nn.Module, goal: Goal, split: Split, world: World = ALONE) -> dict[str, float]:
    """Loss and top-1 of `model` as it is and as `goal` deploys it, and how far its weights are from that; by column.

    In float32, like eval.py: bfloat16 is off by up to a tenth of a point. Raises NonFiniteError if the loss of `model`
    as it is is not finite. If that of the deployed copy is not, the first process prints a warning.
    """
    full = evaluate(fold_batch_norm(copy_network(model)), split, world=world)
    if not math.isfinite(full.loss):
        raise NonFiniteError(f"the network's outputs were not finite (loss {full.loss}) in the evaluation")
    low = evaluate(fold_batch_norm(goal.deployed(model)), split, world=world)
    if not math.isfinite(low.loss) and world.is_main:
        warn(f"the network's outputs are not finite (loss {low.loss}) at {goal.name}")
    name = goal.name.lower()
    return {
        "fp_loss": full.loss, "fp_top1": full.top1, f"{name}_loss": low.loss, f"{name}_top1": low.top1,
        **goal.distances(model),
    }  # fmt: skip
