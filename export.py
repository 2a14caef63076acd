"""Write a trained network with integer weights: packed .safetensors, and .onnx for other runtimes.

The 4-bit network, into deploy/W4_ResNet_w4.safetensors and .onnx
  python export.py --model_path models/W4_ResNet.pth --w_bit 4 --out deploy

With 8-bit activations, ranges calibrated on training images, and uint8 images as the input; built for speed
  python export.py --model_path models/W4_ResNet.pth --w_bit 4 --a_bit 8 --integer_kernels --with_normalize --out deploy

At 2 bits, with batch norm re-estimated for the quantized weights
  python export.py --model_path models/W2_channel_clipped_ResNet.pth --w_bit 2 --post bn_reestimate --out deploy

A network that was trained on a folder of images, for images of the size that it was trained on
  python export.py --model_path runs/mine/last.pth --w_bit 4 --out deploy

Both files are read back and run before they get their names. If their outputs are not those of the quantized network,
that is an error, and no file is left behind. Beside them lies a .md file that says what they take and how to load them.
Needs: pip install -r requirements-export.txt
"""

from utils import flags
from utils.cli import Parser, UserError, bits, bits_or_float, run, seed
from utils.data.specs import DATASETS


def parser() -> Parser:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--model_path", default="models/W4_ResNet.pth", metavar="FILE", help="checkpoint")
    p.add_argument("--w_bit", type=bits, default=4, help="bit-width of the weights")
    flags.add_granularity(p)
    flags.add_first_last_quant(p)
    p.add_argument("--a_bit", type=bits_or_float, default=32, help="bit-width of the activations in the .onnx file")
    flags.add_act_at(p)
    p.add_argument("--integer_kernels", action="store_true",
                   help="with --a_bit, for speed: .onnx weights as INT8 at any bit-width, and the inputs of residual "
                   "sums at 8 bits too, so that a runtime computes in integers from the second layer to the last sum")
    p.add_argument("--post", choices=["none", "bn_reestimate"], default="none",
                   help="bn_reestimate: re-estimate batch-norm statistics on training images, with quantized weights "
                   "for the packed file, and with quantized activations too for the .onnx file")
    flags.add_calib_images(p, 1024, "the activations' ranges (least squared error) and --post")
    p.add_argument("--seed", type=seed, default=1, help="seed for the choice of these images")
    p.add_argument("--with_normalize", action="store_true",
                   help="the .onnx file takes uint8 images [N, S, S, 3] and normalizes them itself")
    flags.add_arch(p)
    p.add_argument("--dataset", default=None, choices=list(DATASETS),
                   help="data set (default: the one that the file was trained on, cifar100 if it names none)")
    flags.add_data_dir(p)
    flags.add_image_size(p)
    flags.add_workers(p)
    p.add_argument("--out", default="deploy", metavar="DIR", help="folder to write to")
    # fmt: on
    return p


def main() -> None:
    args = parser().parse_args()
    if args.integer_kernels and args.a_bit == 32:
        raise UserError("--integer_kernels needs --a_bit: there are none for float activations")

    if args.act_at != "relu" and args.a_bit == 32:
        raise UserError(f"--act_at {args.act_at} needs --a_bit: activations are float without it")

    from utils.exporting import export_checked

    export_checked(args)


if __name__ == "__main__":
    run(main)
