"""The mean of a run's weights over epochs, with fresh batch-norm statistics: a better network from the same run.

    python train.py --exp_name w4 --save_epochs 103-150
    python -m tools.average runs/w4 --epochs 103-150 --out w4_mean.pth
    python -m tools.average runs/w4 --epochs 150 --w_bit 4 --out w4_bn.pth            # fresh statistics only
    python -m tools.average runs/sparse --epochs 150 --sparsity 0.9 --out s90_bn.pth  # those of the pruned network

Weights that sit on the grid have sat on the same point for epochs, so their mean sits there too; the others lose their
noise (stochastic weight averaging, Izmailov et al. 2018; its use on PSG runs is ours). The statistics come from
unaugmented training images, with the mean weights in float or, with --w_bit or --sparsity, as they are deployed. From 3
bits up such a file also serves as a float network; with 2 bits, or with many zeros, the float network is lost.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant import prune_weights, quantize_weights, reestimate_batch_norm
from utils import flags
from utils.checkpoint import RUN_STATE, grid_of, load_checkpoint, model_from_checkpoint, save_checkpoint
from utils.cli import Parser, UserError, bits_or_float, epochs, first_line, run, seed, sparsity
from utils.device import select_device
from utils.files import check_output_file
from utils.opening import Datasets, OpenedNetwork, open_network
from utils.trained_for import step_mismatch

NEEDED = ("dataset", "val_split", "first_last_quant")  # settings of the run


def parser() -> Parser:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("run", metavar="DIR", help="run folder with a file for each of the epochs")
    p.add_argument("--epochs", type=epochs, required=True, metavar="N-M", help="epochs to take the mean of")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write")
    p.add_argument("--w_bit", type=bits_or_float, default=32,
                   help="bit-width of the weights when the statistics are taken")
    p.add_argument("--sparsity", type=sparsity, default=0.0, metavar="S",
                   help="share of zero weights, by magnitude over all layers, when the statistics are taken")
    flags.add_calib_images(p, 4096, "the statistics")
    p.add_argument("--seed", type=seed, default=1, help="of the choice of images")
    flags.add_data_dir(p)
    flags.add_device(p)
    # fmt: on
    return p


def epoch_files(folder: str, numbers: Sequence[int]) -> list[Path]:
    """The checkpoints of the epochs `numbers` in a run folder. Raises UserError, naming the first, if one is absent."""
    paths = [Path(folder) / f"epoch_{number}.pth" for number in numbers]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        wanted = "-".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))
        raise UserError(f"{absent[0]} is not there: train with --save_epochs {wanted}")
    return paths


def training_settings(path: Path) -> dict[str, Any]:
    """The arguments that the network of the file `path` was trained with. Raises UserError if one of NEEDED is
    missing."""
    settings: dict[str, Any] = load_checkpoint(path).get("args", {})
    missing = [name for name in NEEDED if name not in settings]
    if missing:
        raise UserError(f"{path} does not say its --{missing[0]}: it is not a checkpoint of train.py")
    return settings


@torch.no_grad()
def take_mean(model: nn.Module, others: Sequence[Path], arch: str | None, classes: int) -> None:
    """Sets each parameter of `model` to the mean of itself and of those of the files `others`, summed in float64.

    Raises UserError for a file whose network is not of the same architecture (None: ResNet32) and number of classes.
    """
    sums = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in model.named_parameters()}
    for path in others:
        network = model_from_checkpoint(load_checkpoint(path), path, arch, classes)
        for name, value in network.named_parameters():
            sums[name] += value
    for name, parameter in model.named_parameters():
        parameter.copy_((sums[name] + parameter.cpu()) / (len(others) + 1))


def state_with_statistics(args: Namespace, opened: OpenedNetwork, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict of the network, its batch-norm statistics those of training images with the weights as deployed.

    Raises UserError for a network without batch norm, and if there are fewer images than `args` ask for.
    """
    train, _, _ = opened.data.splits(settings["val_split"])
    taken = train.count_for(args.calib_images)
    grid = grid_of(opened.checkpoint, args.w_bit, bool(settings["first_last_quant"]))
    model = opened.model.to(memory_format=torch.channels_last)
    try:
        pruned = prune_weights(model, args.sparsity, first_last=grid.first_last)
        deployed = quantize_weights(pruned, grid, inplace=True)
        reestimate_batch_norm(deployed, train.calibration(taken, args.seed))
    except ValueError as error:
        raise UserError(f"{opened.path}: {first_line(error)}") from None
    state = deployed.state_dict() | dict(model.named_parameters())
    return {name: value.detach().cpu() for name, value in state.items()}


def main() -> None:
    args = parser().parse_args()
    check_output_file("--out", args.out)
    device, device_line = select_device(args.device, args.cu_num)
    first, last = args.epochs[0], args.epochs[-1]
    paths = epoch_files(args.run, args.epochs)
    settings = training_settings(paths[-1])
    if mismatch := step_mismatch(settings, args.w_bit):
        raise UserError(f"{paths[-1]}: {mismatch}")
    opened = open_network(paths[-1], Datasets(args.data_dir, device))
    take_mean(opened.model, paths[:-1], opened.checkpoint.get("arch"), len(opened.data.classes))
    kept = {key: value for key, value in opened.checkpoint.items() if key not in (*RUN_STATE, "metrics")}
    kept["state_dict"] = state_with_statistics(args, opened, settings)
    kept["averaged_epochs"] = [first, last]
    kept["deployed"] = {"w_bit": args.w_bit, "sparsity": args.sparsity}  # when the statistics were taken
    save_checkpoint(args.out, kept)
    print(f"{device_line}; the mean of {len(paths)} epochs, {first} to {last}: {args.out}")


if __name__ == "__main__":
    run(main)
