"""What networks say about image files: the most likely classes in float and quantized, side by side."""

from argparse import Namespace

import torch
from torch import Tensor, nn

from quant.grid import FLOAT_BITS
from utils.checkpoint import grid_of
from utils.cli import UserError, warn
from utils.data.folder import pixels
from utils.data.in_memory import normalize
from utils.data.specs import DataSpec
from utils.deployment import Deployment, Setting
from utils.device import autocast, resolve_precision, select_device
from utils.opening import Datasets, OpenedNetwork, open_network
from utils.trained_for import evaluation_mismatches

SHOWN = 5  # most likely classes
AT_ONCE = 32  # images


def predict(args: Namespace) -> None:
    """Prints what each network says about each of the files `args.images`, for each --sparsity and --w_bit.

    Raises UserError, before anything is printed, for a file that is not an image.
    """
    device, device_line = select_device(args.device, args.cu_num)
    args.precision = resolve_precision(args.precision, device)
    datasets = Datasets(args.data_dir, device, size=args.image_size)
    networks = [open_network(path, datasets, args.dataset, args.arch, data="none") for path in args.model_path]
    images = {spec: pixels(args.images, spec) for spec in {opened.spec for opened in networks}}
    print(f"{device_line}, precision: {args.precision}")
    for opened in networks:
        deployment = deployed_as(args, opened)
        grids = [deployment.weight_grid(w_bit) for w_bit in args.w_bit]
        if found := evaluation_mismatches(opened.checkpoint, grids):
            warn(f"{opened.path}: {'; '.join(found)}")
        print(f"{opened.path}: {opened.arch} for {opened.dataset_name}; of an image {seen(opened.spec)}")
        shown = predictions(args, opened, deployment, images[opened.spec].to(device))
        for number, path in enumerate(args.images):
            print(f"\n{path}\n{table({head: lines[number] for head, lines in shown.items()})}", flush=True)


def seen(spec: DataSpec) -> str:
    """Which part of an image a network gets, in words."""
    return f"it gets the middle {spec.size} x {spec.size} pixels, with the shorter side resized to {spec.resized}"


def deployed_as(args: Namespace, opened: OpenedNetwork) -> Deployment:
    """How `args` deploy a network; nothing is fitted to images."""
    template = grid_of(opened.checkpoint, FLOAT_BITS, bool(args.first_last_quant), args.granularity, args.weight_range)
    return Deployment(opened.model, list, template, prune=args.prune)


def predictions(
    args: Namespace, opened: OpenedNetwork, deployment: Deployment, images: Tensor
) -> dict[str, list[list[str]]]:
    """By the name of a setting, a line for each of the most likely classes of each image uint8 [N, S, S, 3]."""
    settings = [Setting(), *(Setting(w_bit, sparsity=share) for share in args.sparsity for w_bit in args.w_bit)]
    found = {}
    for setting in dict.fromkeys(settings):
        head = "float" if setting.w_bit == FLOAT_BITS else f"W{setting.w_bit}"
        head += f", {100 * setting.sparsity:g} % zeros" if setting.sparsity else ""
        logits = outputs(deployment.network(setting), images, opened.spec, args.precision)
        if not logits.isfinite().all():
            raise UserError(f"{opened.path}: the network's outputs are not finite ({head})")
        found[head] = [most_likely(row, opened.classes) for row in logits.softmax(1)]
    return found


@torch.inference_mode()
def outputs(network: nn.Module, images: Tensor, spec: DataSpec, precision: str) -> Tensor:
    """Logits float32 [N, classes], on the CPU, for images uint8 [N, S, S, 3]."""
    with autocast(images.device, precision):
        return torch.cat([network(normalize(part, spec)).float() for part in images.split(AT_ONCE)]).cpu()


def most_likely(probabilities: Tensor, classes: list[str] | None) -> list[str]:
    """A line for each of the first classes, by name or by number."""
    best = probabilities.topk(min(SHOWN, len(probabilities)))
    names = [classes[index] if classes else f"class {index}" for index in best.indices.tolist()]
    return [f"{100 * share:6.2f} % {name}" for share, name in zip(best.values.tolist(), names)]


def table(columns: dict[str, list[str]]) -> str:
    """Columns of lines side by side, each under its head."""
    whole = [[head, *lines] for head, lines in columns.items()]
    widths = [max(map(len, column)) for column in whole]
    rows = zip(*whole, strict=True)
    return "\n".join("  " + "   ".join(f"{cell:{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows)
