"""The mean of a run's weights over epochs, with batch-norm statistics taken anew: a better network from the same run.

    python train.py --exp_name w4 --save_epochs 103-150
    python -m utils.average runs/w4 --epochs 103-150 --out w4_mean.pth
    python -m utils.average runs/w4 --epochs 150 --w_bit 4 --out w4_bn.pth            # new statistics alone
    python -m utils.average runs/sparse --epochs 150 --sparsity 0.9 --out s90_bn.pth  # those of the pruned network

Weights that sit on the grid have sat on the same point for epochs, so their mean sits there too; the others lose their
noise (stochastic weight averaging, Izmailov et al. 2018; its use on PSG runs is ours). The statistics come from
unaugmented training images, with the mean weights in float or, with --w_bit or --sparsity, as they are deployed. From 3
bits up such a file serves as a float network too; of 2 bits, or of many zeros, the float network is lost.
"""

from pathlib import Path

from utils import cli
from utils.cli import Parser, UserError, bits_or_float, count, epochs, first_line, index, run, seed, sparsity


def main() -> None:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("run", metavar="DIR", help="run folder with a file for each of the epochs")
    p.add_argument("--epochs", type=epochs, required=True, metavar="N-M", help="epochs to take the mean of")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write")
    p.add_argument("--w_bit", type=bits_or_float, default=32, help="bit-width of the weights under the statistics")
    p.add_argument("--sparsity", type=sparsity, default=0.0, metavar="S",
                   help="share of zero weights, by magnitude over all layers, under the statistics")
    p.add_argument("--calib_images", type=count, default=cli.Default(4096), metavar="N",
                   help="training images for the statistics; all if there are fewer and N is not given")
    p.add_argument("--seed", type=seed, default=1, help="of the choice of images")
    p.add_argument("--data_dir", default=None, help=cli.DATA_DIR_HELP)
    p.add_argument("--cu_num", type=index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")
    # fmt: on
    args = p.parse_args()

    import torch
    from utils.pairing import Datasets

    from quant import prune_weights, quantize_weights, reestimate_batch_norm
    from utils.checkpoint import RUN_STATE, load_checkpoint, model_from_checkpoint, per_channel, save_checkpoint
    from utils.data import calib_images, calibration_batches
    from utils.device import select_device
    from utils.files import check_output_file

    check_output_file("--out", args.out)
    device, device_line = select_device(args.device, args.cu_num)
    paths = [Path(args.run) / f"epoch_{epoch}.pth" for epoch in args.epochs]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        wanted = "-".join(str(epoch) for epoch in dict.fromkeys((args.epochs[0], args.epochs[-1])))
        raise UserError(f"{absent[0]} is not there: train with --save_epochs {wanted}")
    last = load_checkpoint(paths[-1])
    settings = last.get("args", {})
    missing = [name for name in ("dataset", "val_split", "first_last_quant") if name not in settings]
    if missing:
        raise UserError(f"{paths[-1]} does not say its --{missing[0]}: it is no checkpoint of train.py")
    mean = model_from_checkpoint(last, paths[-1])
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in mean.named_parameters()}
    for path in paths:
        network = model_from_checkpoint(load_checkpoint(path), path, last.get("arch"))
        for name, value in network.named_parameters():
            sums[name] += value.detach()
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(sums[name] / len(paths))

    dataset = Datasets(args.data_dir, device).of(last, paths[-1])
    train, _, _ = dataset.splits(settings["val_split"])
    taken = calib_images(args.calib_images, train)
    mean.to(device, memory_format=torch.channels_last)
    first_last = bool(settings["first_last_quant"])
    pruned = prune_weights(mean, args.sparsity, first_last=first_last)
    deployed = quantize_weights(pruned, args.w_bit, first_last, per_channel(last), inplace=True)
    images = (batch for batch, _ in calibration_batches(train, dataset.spec, taken, args.seed))
    try:
        state = reestimate_batch_norm(deployed, images).state_dict() | dict(mean.named_parameters())
    except ValueError as error:
        raise UserError(f"{paths[-1]}: {first_line(error)}") from None
    kept = {key: value for key, value in last.items() if key not in (*RUN_STATE, "metrics")}
    kept["state_dict"] = {name: value.detach().cpu() for name, value in state.items()}
    kept["averaged_epochs"] = [args.epochs[0], args.epochs[-1]]
    kept["deployed"] = {"w_bit": args.w_bit, "sparsity": args.sparsity}  # under the statistics
    save_checkpoint(args.out, kept)
    print(f"{device_line}; the mean of {len(paths)} epochs, {args.epochs[0]} to {args.epochs[-1]}: {args.out}")


if __name__ == "__main__":
    run(main)
