"""The mean of a run's weights over epochs, with batch-norm statistics taken anew: a better network from the same run.

    python train.py --exp_name w4 --save_epochs $(seq 93 150)
    python -m utils.average runs/w4/epoch_*.pth --out models/W4_ResNet_mean.pth

Weights that sit on the grid have sat on the same point for epochs, so their mean sits there too; the others lose their
noise (stochastic weight averaging, Izmailov et al. 2018; its use on PSG runs is ours). The statistics come from
unaugmented training images, with the mean weights in float or, with --w_bit, quantized: one file serves both.
"""

from utils.cli import Parser, UserError, bits_or_float, count, index, run, seed


def main() -> None:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("files", nargs="+", metavar="FILE", help="checkpoints of one run, of different epochs")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write")
    p.add_argument("--w_bit", type=bits_or_float, default=32, help="bit-width of the weights under the statistics")
    p.add_argument("--calib_images", type=count, default=10240, metavar="N", help="training images for the statistics")
    p.add_argument("--seed", type=seed, default=1, help="of the choice of images")
    p.add_argument("--data_dir", default="data", help="folder of <dataset>.npz or of torchvision's archive")
    p.add_argument("--cu_num", type=index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")
    # fmt: on
    args = p.parse_args()

    import torch

    from quant import quantize_weights, reestimate_batch_norm
    from utils.checkpoint import RUN_STATE, load_checkpoint, model_from_checkpoint, save_checkpoint
    from utils.data import calibration_batches, load_dataset
    from utils.device import select_device

    device, device_line = select_device(args.device, args.cu_num)
    found = sorted(((load_checkpoint(path), path) for path in args.files), key=lambda pair: pair[0].get("epoch", 0))
    checkpoints = [checkpoint for checkpoint, _ in found]
    epochs = [checkpoint.get("epoch", 0) for checkpoint in checkpoints]
    runs = {(c.get("args", {}).get("exp_name"), c.get("args", {}).get("seed")) for c in checkpoints}
    if len(set(epochs)) < len(epochs) or len(runs) > 1 or runs == {(None, None)}:
        raise UserError("the files must be different epochs of one run of train.py: give runs/NAME/epoch_*.pth")
    networks = [model_from_checkpoint(checkpoint, path) for checkpoint, path in found]
    last = checkpoints[-1]
    settings = last["args"]
    dataset = load_dataset(settings["dataset"], args.data_dir, device)
    train, _, _ = dataset.splits(settings["val_split"])
    if args.calib_images > len(train):
        raise UserError(f"--calib_images {args.calib_images} is more than the {len(train)} training images")

    mean = networks[-1].to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        for name, parameter in mean.named_parameters():
            parameter.copy_(torch.stack([network.get_parameter(name).cpu() for network in networks]).mean(0))
    images = (batch for batch, _ in calibration_batches(train, dataset.spec, args.calib_images, args.seed))
    normed = reestimate_batch_norm(quantize_weights(mean, args.w_bit), images)
    state = normed.state_dict() | dict(mean.named_parameters())
    kept = {key: value for key, value in last.items() if key not in (*RUN_STATE, "metrics")}
    averaged = {
        "state_dict": {k: v.detach().cpu() for k, v in state.items()},
        "averaged_epochs": [epochs[0], epochs[-1]],
    }
    save_checkpoint(args.out, kept | averaged)
    print(f"{device_line}; the mean of {len(epochs)} epochs, {epochs[0]} to {epochs[-1]}: {args.out}")


if __name__ == "__main__":
    run(main)
