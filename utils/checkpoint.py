"""Checkpoints: one dict, read with weights_only=True and written so that a crash never leaves half a file.

Keys: epoch, state_dict, optimizer, scheduler, arch, num_classes, classes (their names, in the order of the outputs),
args (a plain dict), metrics; tools.average adds averaged_epochs and deployed. The published .pth files (epoch,
state_dict, ...), bare state_dicts and files of other programs load too.
"""

import contextlib
import hashlib
import pickle
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import build_model, check_arch
from quant import Grid
from utils.checkpoint_files import read_file, unwrapped
from utils.cli import UserError, first_line, warn
from utils.data.specs import DEFAULT
from utils.files import atomic_write

# Quantizer constants that the published code kept in its state_dicts; ours are derived from the weights.
PUBLISHED_EXTRAS = (".scale_value", ".wscale_value", ".bscale_value")
RUN_STATE = ("optimizer", "scheduler")
# Types of what a file holds beside its weights.
KINDS = {"epoch": int, "arch": str, "args": dict, "averaged_epochs": list, "classes": list, "deployed": dict}
MOST_CLASSES = 10**6  # a file that claims so many is refused before a network is built
OPTIONAL = "num_batches_tracked"  # old files lack it, and batch norm with a momentum does not use it
COUNTER = "n_averaged"  # of torch's AveragedModel, beside the weights
DEFAULT_ARCH = "ResNet32"  # of published files, which name none
# The length of these is the number of classes.
HEADS = {"ResNet32": "fc.bias", "vgg16_bn": "classifier.6.bias", "vit_tiny": "heads.head.bias"}


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Writes `checkpoint` so that `path` is always a whole file, the old or the new one; UserError if it fails."""
    with atomic_write(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU; it has at least the key state_dict.

    Files of other programs may keep their weights under another key (utils/checkpoint_files.py). Nothing in a file is
    executed. If the SHA256SUMS of its folder lists another sum for the file, it is used with a warning. Raises
    UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    if path.is_dir():
        last = path / "last.pth"
        advice = f"its last checkpoint is {last}" if last.is_file() else "name a file"
        raise UserError(f"{path} is a folder: {advice}")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    warn_if_changed(path)
    checkpoint = read_file(path)
    for key, kind in KINDS.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise UserError(f"{path} is not a checkpoint of this project: its {key} is {checkpoint[key]!r}"[:300])
    odd = [name for name in checkpoint.get("classes", []) if not isinstance(name, str)]
    if odd:
        raise UserError(f"{path} is not a checkpoint of this project: a class name is {odd[0]!r}"[:300])
    return checkpoint


def dataset_name(checkpoint: dict[str, Any]) -> str:
    """The data set that a network was trained on: CIFAR-100 for published files, which do not say."""
    return str(checkpoint.get("args", {}).get("dataset", DEFAULT))


def image_size(checkpoint: dict[str, Any], name: str) -> int | None:
    """Pixels per side of the images of the data set `name` that a network was trained on; None if it does not say."""
    size = checkpoint.get("args", {}).get("image_size") if dataset_name(checkpoint) == name else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def warn_if_changed(path: Path) -> None:
    """Prints a warning if the SHA256SUMS beside `path` has another sum for it."""
    sums = path.parent / "SHA256SUMS"
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else []
    listed = {name.lstrip(" *"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    if path.name in listed and hashlib.sha256(path.read_bytes()).hexdigest() != listed[path.name]:
        warn(f"{path} is not the published file: its sha256 is not the one in {sums}")


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copies the checkpoint's weights into `model`; UserError lists what is missing, left over or does not fit.

    Parts that a wrapper adds to names, such as module., are ignored.
    """
    wanted = model.state_dict()
    state = {k: v for k, v in unwrapped(checkpoint["state_dict"], wanted).items() if not k.endswith(PUBLISHED_EXTRAS)}
    if COUNTER not in wanted:
        state.pop(COUNTER, None)
    problems = [f"missing {key}" for key in wanted if key not in state and not key.endswith(OPTIONAL)]
    problems += [f"unknown {key}" for key in state if key not in wanted]
    problems += [
        f"{key} is {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [f"{key} {odd}" for key, value in wanted.items() if key in state and (odd := oddity(state[key], value))]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} does not fit {type(model).__name__}: {shown}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} has values that are NaN or infinite")
    wanted.update(state)  # this keeps the modules' versions, which some modules ask for
    model.load_state_dict(wanted)


def oddity(value: torch.Tensor, wanted: torch.Tensor) -> str:
    """Why `value` cannot be copied to `wanted` without a loss, in words; empty if it can."""
    if wanted.is_floating_point() and not value.is_floating_point():
        return f"is {value.dtype} instead of {wanted.dtype}"
    if value.layout is not torch.strided:
        return f"is a tensor of layout {value.layout}"
    return "is on the meta device, without values" if value.is_meta else ""


def known_arch(arch: str) -> str:
    """`arch`, if it is one of ours or of torchvision's; else UserError."""
    try:
        return check_arch(arch)
    except ValueError as error:
        raise UserError(str(error)) from None


def new_model(arch: str, num_classes: int, weights: str | None = None) -> nn.Module:
    """`build_model`, with a UserError for an unknown architecture, and for weights that are unknown or unavailable."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        if not weights:
            return build_model(arch, num_classes)
        with contextlib.redirect_stderr(sys.stdout):  # torch reports the download there
            return build_model(arch, num_classes, weights)
    except ValueError as error:
        raise UserError(str(error)) from None
    except (OSError, HTTPException) as error:
        if not weights:
            raise
        told = f"the weights {weights} of {arch} could not be downloaded ({first_line(error)})"
        raise UserError(f"{told}: try again with a connection, or put torchvision's file into {cache}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # torch raises these for a damaged file
        advice = f"delete the file in {cache}"
        raise UserError(f"--weights {weights} of {arch} cannot be read ({first_line(error)}): {advice}") from None


def model_from_checkpoint(
    checkpoint: dict[str, Any], path: str | Path, arch: str | None = None, num_classes: int | None = None
) -> nn.Module:
    """The trained network of a checkpoint that was read from `path`.

    `arch` None takes the architecture that the file names, or ResNet32 for published files, which name none.
    `num_classes` None takes the file's number; any other value is used if the file does not say. Raises UserError if
    the file has another architecture or number of classes.
    """
    saved_arch = checkpoint.get("arch") or arch or DEFAULT_ARCH
    if arch not in (None, saved_arch):
        raise UserError(f"{path} is a {saved_arch}, but --arch is {arch}")
    try:
        check_arch(saved_arch)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    classes = checkpoint.get("num_classes", num_classes)
    if saved_arch in HEADS:
        head = unwrapped(checkpoint["state_dict"]).get(HEADS[saved_arch])
        if head is None or not head.dim() or not len(head):
            raise UserError(f"{path} lacks {HEADS[saved_arch]}, so it is not a {saved_arch}")
        classes = len(head)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 < classes < MOST_CLASSES:
        raise UserError(f"{path} does not say how many classes it has (num_classes is {classes!r})")
    if len(checkpoint.get("classes", range(classes))) != classes:
        raise UserError(f"{path} names {len(checkpoint['classes'])} classes, but its network has {classes}")
    if num_classes not in (None, classes):
        raise UserError(f"{path} has {classes} classes, but the data set has {num_classes}")
    model = new_model(saved_arch, classes)
    load_weights(model, checkpoint, path)
    return model


def grid_of(
    checkpoint: dict[str, Any],
    bits: int,
    first_last: bool = True,
    granularity: str | None = None,
    weight_range: str = "absmax",
) -> Grid:
    """The grid of a network at `bits` bits, with a step for each "tensor" or each output "channel" by `granularity`.

    None: as in training, or for each tensor if the file does not say.
    """
    by_channel = (granularity or checkpoint.get("args", {}).get("granularity")) == "channel"
    return Grid(bits, first_last, by_channel, weight_range)


def training_facts(checkpoint: dict[str, Any]) -> dict[str, str]:
    """How a network was trained, as columns of a results table: trained, seed and epoch; empty if unknown.

    `trained` is the optimizer and, with PSG, the target bit-width: "SGD", "PSGD W4", "Adam", "PSG-AdamW W4", or "PSGD
    sparse" for target zero; "LSQ W4" or "Adam-LSQ W4" for a method of tools.peers; then " update" where PSG acts on the
    update, " channel" for grids of output channels, " L1" and " grad-L1" for penalties, " teacher" for distillation.
    Files of tools.average add " mean" and give the first and last epoch as `epoch`; those of one epoch, which differ
    from its file only in the batch-norm statistics, add " bn".
    """
    args = checkpoint.get("args", {})
    facts = {"trained": "", "seed": str(args.get("seed", "")), "epoch": str(checkpoint.get("epoch", ""))}
    if {"psg", "adam"} <= args.keys():
        adam = "AdamW" if args.get("decoupled_decay") else "Adam"
        plain, scaled = (adam, f"PSG-{adam}") if args["adam"] else ("SGD", "PSGD")
        goal = "sparse" if args.get("target") == "zero" else f"W{args.get('w_bit')}"
        peer = args.get("method", "psgd").upper()
        if peer != "PSGD":
            scaled = f"{adam}-{peer}" if args["adam"] else peer
        has_goal = args["psg"] or peer != "PSGD"
        facts["trained"] = f"{scaled} {goal}" if has_goal else plain
        if has_goal:
            facts["trained"] += " update" if args.get("psg_acts_on") == "update" else ""
            facts["trained"] += " channel" if args.get("granularity") == "channel" else ""
        facts["trained"] += " L1" if args.get("l1") else ""
        facts["trained"] += " grad-L1" if args.get("grad_l1") else ""
        facts["trained"] += " teacher" if args.get("teacher") else ""
    averaged = checkpoint.get("averaged_epochs", [])
    if len(averaged) == 2:
        first, last = averaged
        if first == last:
            facts["trained"] += " bn"
        else:
            facts |= {"trained": f"{facts['trained']} mean", "epoch": f"{first}-{last}"}
    return facts


def load_run(checkpoint: dict[str, Any], path: str | Path, model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Restores model, optimizer and scheduler from the `checkpoint` of a run, read from `path`; returns the number of
    its last epoch.

    Raises UserError if the file does not hold a run's state.
    """
    missing = [key for key in ("epoch", *RUN_STATE) if key not in checkpoint]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: a run cannot be resumed from it, only started from it")
    load_weights(model, checkpoint, path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the optimizer state in {path} does not fit this run ({first_line(error)})") from None
    return checkpoint["epoch"]
