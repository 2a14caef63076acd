"""The training and evaluation loops. Nothing is read back from the device inside an epoch."""

import contextlib
import copy
import gc
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.functional import cross_entropy
from torch.nn.utils.fusion import fuse_conv_bn_weights

from quant.goals import GridGoal, SparseGoal
from quant.penalty import Penalty
from quant.sparsity import prunable_weights
from quant.tracing import conv_norm_pairs, trace
from utils.cli import UserError, first_line
from utils.data import DataSpec, Split, eval_batches
from utils.device import autocast
from utils.distributed import ALONE, World
from utils.progress import shown

# Images at a time in evaluation: on a CPU small batches stay in its caches, a GPU wants large ones.
EVAL_BATCH_SIZE = {"cpu": 100, "cuda": 1000}
LARGE_IMAGES = 128  # at a time, of 224 x 224


@dataclass
class Result:
    """Mean cross-entropy and top-1 accuracy in percent."""

    loss: float
    top1: float


class NonFiniteError(ArithmeticError):
    """The loss or a weight became NaN or infinite, or a whole weight tensor zero; the message says which, and at which
    step (from 1), or in which part, of an epoch."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    precision: str,
    penalty: Penalty | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One step on a batch; returns the sum of its losses and the number of its correct answers, 0-d, on the device.

    `penalty` of the loss is added to what is minimised, not to what is returned. `share` weighs a loss whose gradient
    is averaged over processes with batches of other sizes.
    """
    with autocast(images.device, precision):
        logits = model(images)
        loss = cross_entropy(logits, labels)
    optimizer.zero_grad()
    (share * (loss + penalty(loss)) if penalty else share * loss).backward()
    optimizer.step()
    return loss.detach() * len(labels), (logits.detach().argmax(1) == labels).sum()


def epoch_result(model: nn.Module, losses: Tensor, hits: Tensor, images_seen: int, world: World = ALONE) -> Result:
    """Loss and accuracy over the images of an epoch, of all processes, from each step's sums [steps].

    Raises NonFiniteError if a loss, or a weight of `model`, is not finite.
    """
    per_step = world.sum(losses.float()).cpu().double()
    hits, images_seen = world.sum(torch.stack([hits.sum(), hits.new_tensor(images_seen)])).tolist()
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
    return Result(per_step.sum().item() / images_seen, 100 * hits / images_seen)


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str,
    penalty: Penalty | None = None,
    world: World = ALONE,
    sizes: Sequence[int] = (),
) -> Result:
    """One pass over `batches`; returns loss and accuracy over the images as they were trained on.

    With several processes `batches` are this one's parts of batches of `sizes` images. Raises NonFiniteError at the
    end of the epoch in which the loss, or a weight, stopped being finite.
    """
    model.train()
    sums, images_seen = [], 0
    for step, (images, labels) in enumerate(batches):
        share = len(labels) * world.size / sizes[step] if world.size > 1 else 1.0
        sums.append(train_step(model, optimizer, images, labels, precision, penalty, share))
        images_seen += len(labels)
    losses, hits = map(torch.stack, zip(*sums))
    return epoch_result(model, losses, hits, images_seen, world)


@torch.no_grad()
def check_takes(model: nn.Module, name: str, size: int, smallest_step: int) -> None:
    """Raises UserError if `model`, called `name`, cannot take images of size x size, or be trained on `smallest_step`
    of them."""
    image = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    try:
        model.eval()(image)
    except Exception as error:  # torch and torchvision raise several kinds
        raise UserError(f"--arch {name} cannot take {size} x {size} images ({first_line(error)})") from None
    if smallest_step == 1:  # batch norm over one number has no variance
        try:
            copy.deepcopy(model).train()(image)
        except ValueError as error:
            advice = "choose a --batch_size that leaves more than one image to the last step of an epoch"
            raise UserError(f"--arch {name} cannot be trained on one image ({first_line(error)}): {advice}") from None


def check_moves(model: nn.Module, first_last: bool = True) -> None:
    """Raises UserError if a whole weight of `model` is zero: it is on its target, and PSG with eps 0 never moves it."""
    for name, weight in prunable_weights(model, first_last).items():
        if not weight.any():
            raise UserError(
                f"{name} is all zeros, which PSG never moves: use --eps 0.01, or start from trained weights"
            )


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    """`model` itself, in eval mode, with every batch norm that follows a convolution folded into it: for evaluation.

    Computes the same function up to rounding, faster. A model that torch.fx cannot trace stays as it is.
    """
    with collected_at_once():
        try:
            pairs = [(conv.target, norm.target) for conv, norm in conv_norm_pairs(model.eval(), trace(model))]
        except TraceError:
            return model
    for before, after in pairs:
        conv, norm = model.get_submodule(before), model.get_submodule(after)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        model.set_submodule(after, nn.Identity())
    return model


@contextlib.contextmanager
def collected_at_once() -> Iterator[None]:
    """Frees the reference cycles that the block leaves behind when it ends.

    The garbage collector comes to objects that have survived a while only after tens of megabytes of them, and a trace
    is made for every evaluation.
    """
    enabled = gc.isenabled()
    gc.disable()  # what is made in the block stays in the youngest generation
    try:
        yield
    finally:
        gc.collect(0)
        if enabled:
            gc.enable()


def evaluate(model: nn.Module, split: Split, spec: DataSpec, precision: str = "fp32", world: World = ALONE) -> Result:
    """Loss and top-1 of `model` in eval mode on every image of `split`, shared out to the processes of `world`."""
    part = split.part(slice(world.rank, None, world.size)) if world.size > 1 else split
    batch_size = EVAL_BATCH_SIZE.get(split.device.type, 500) if isinstance(split, Split) else LARGE_IMAGES
    batches = eval_batches(part, spec, batch_size)
    steps = -(-len(part) // batch_size)
    return evaluate_batches(model, shown(batches, "evaluation", steps, not world.is_main), precision, world)


@torch.inference_mode()
def evaluate_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: str = "fp32",
    world: World = ALONE,
) -> Result:
    """Loss and top-1 of `model` in eval mode on the images of all `batches`, of all processes."""
    model.eval()
    loss_sum, hits, count = [], [], 0
    for images, labels in batches:
        with autocast(images.device, precision):
            logits = model(images).float()
        loss_sum.append(cross_entropy(logits, labels, reduction="sum"))
        hits.append((logits.argmax(1) == labels).sum())
        count += len(labels)
    hits = torch.stack(hits).sum()
    if world.size > 1:
        hits, count = world.sum(torch.stack([hits, hits.new_tensor(count)])).tolist()
        return Result(world.sum(torch.stack(loss_sum).double().sum()).item() / count, 100 * hits / count)
    return Result(torch.stack(loss_sum).cpu().double().sum().item() / count, 100 * hits.item() / count)


def evaluate_goal(
    model: nn.Module, goal: GridGoal | SparseGoal, split: Split, spec: DataSpec, world: World = ALONE
) -> dict[str, float]:
    """Loss and top-1 of `model` as it is and as `goal` deploys it, and how far its weights are from that; by column.

    In float32, as eval.py: bfloat16 is off by up to a tenth of a point. Raises NonFiniteError if the loss of `model` as
    it is is no number; as deployed, that is a warning on stderr of the first process.
    """
    full = evaluate(fold_batch_norm(copy.deepcopy(model)), split, spec, world=world)
    if not math.isfinite(full.loss):
        raise NonFiniteError(f"the network's outputs were not finite (loss {full.loss}) in the evaluation")
    low = evaluate(fold_batch_norm(goal.deployed(model)), split, spec, world=world)
    if not math.isfinite(low.loss) and world.is_main:
        print(f"warning: the network's outputs are not finite (loss {low.loss}) at {goal.name}", file=sys.stderr)
    name = goal.name.lower()
    return {
        "fp_loss": full.loss, "fp_top1": full.top1, f"{name}_loss": low.loss, f"{name}_top1": low.top1,
        **goal.distances(model),
    }  # fmt: skip
