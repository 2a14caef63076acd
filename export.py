"""Write a trained network as real integers: packed .safetensors, and .onnx for other runtimes.

The 4-bit network, into deploy/W4_ResNet_w4.safetensors and .onnx
  python export.py --model_path models/W4_ResNet.pth --w_bit 4 --out deploy

With 8-bit activations, ranges calibrated on training images, and uint8 images as the input; built for speed
  python export.py --model_path models/W4_ResNet.pth --w_bit 4 --a_bit 8 --integer_kernels --with_normalize --out deploy

Both files are read again and run before they get their names: outputs that are not those of the quantized network are
an error, and nothing is left behind. Needs: pip install -r requirements-export.txt
"""

import hashlib
import sys
from argparse import Namespace
from pathlib import Path

from utils.cli import DATA_DIR_HELP, Default, Parser, UserError, bits, bits_or_float, count, first_line, run, seed

CLASSES = {"cifar100": 100, "cifar10": 10, "digits": 10}
CHECKED = 512  # images on which the files are compared with the network
LOGIT_TOLERANCE = 1e-4
# With activation quantizers a value between two levels may be rounded either way, and so near ties may fall otherwise:
TIE = 0.1  # of the spread of an image's logits: two classes nearer than that are tied
AGREEMENT = 0.99  # least share of images with the same top-1, or a tied one


def parse() -> Namespace:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--model_path", default="models/W4_ResNet.pth", metavar="FILE", help="checkpoint")
    p.add_argument("--w_bit", type=bits, default=4, help="bit-width of the weights")
    p.add_argument("--granularity", choices=["tensor", "channel"], default=None,
                   help="a step for each weight tensor, or for each of its output channels "
                   "(default: as the file was trained, tensor if it does not say)")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="1: first and last layer too, at 8 bits if the others have fewer than 4; 0: keep them float")
    p.add_argument("--a_bit", type=bits_or_float, default=32, help="bit-width of the activations in the .onnx file")
    p.add_argument("--integer_kernels", action="store_true",
                   help="with --a_bit, for speed: .onnx weights as INT8 whatever their bit-width, and what residual "
                   "sums take at 8 bits too, so that a runtime has integers from the second layer to the last sum")
    p.add_argument("--calib_images", type=count, default=Default(1024), metavar="N",
                   help="training images for the activations' ranges (least squared error); "
                   "all if there are fewer and N is not given")
    p.add_argument("--seed", type=seed, default=1, help="of the choice of these images")
    p.add_argument("--with_normalize", action="store_true",
                   help="the .onnx file takes uint8 [N, 32, 32, 3] and normalises inside")
    p.add_argument("--dataset", default=None, choices=list(CLASSES),
                   help="data set (default: the one the file was trained on, cifar100 if it names none)")
    p.add_argument("--data_dir", default=None, help=DATA_DIR_HELP)
    p.add_argument("--out", default="deploy", metavar="DIR", help="folder to write to")
    # fmt: on
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.integer_kernels and args.a_bit == 32:
        raise UserError("--integer_kernels needs --a_bit: float activations have none")
    try:
        import onnx  # noqa: F401 - looked for before anything is done
        import onnxruntime  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise UserError(f"{first_line(error)}: pip install -r requirements-export.txt") from None

    from utils.files import output_folder

    with output_folder("--out", args.out) as out:
        write(args, out)


def write(args: Namespace, out: Path) -> None:
    """Writes both files to `out`, checks them and says what they are."""
    import onnx
    import safetensors
    import torch

    from models import build_model
    from quant import (
        calibrate,
        integer_weights,
        load_packed,
        quantize_activations,
        quantize_sums,
        quantize_weights,
        save_packed,
        to_onnx,
    )
    from utils.checkpoint import dataset_name, load_checkpoint, model_from_checkpoint, per_channel
    from utils.data import DATASETS, calib_images, calibration_batches, normalize
    from utils.deployment import check_activations
    from utils.files import replacing
    from utils.pairing import Datasets
    from utils.sources import at_hand
    from utils.trained_for import mismatches

    path = Path(args.model_path)
    checkpoint = load_checkpoint(path)
    name = args.dataset or dataset_name(checkpoint)
    if name not in CLASSES:
        raise UserError(
            f"{path} is for {name}; this script exports networks for {', '.join(CLASSES)}: use quant.export"
        )
    model = model_from_checkpoint(checkpoint, path, num_classes=CLASSES[name]).eval()
    spec = DATASETS[name]
    grid = {
        "bits": args.w_bit, "first_last": bool(args.first_last_quant),
        "per_channel": per_channel(checkpoint, args.granularity),
    }  # fmt: skip
    datasets = Datasets(args.data_dir, torch.device("cpu"))
    folder = datasets.folder(checkpoint, name)
    dataset = datasets.of(checkpoint, path, name) if at_hand(name, folder) else None
    reference = quantize_weights(model, **grid)
    deployed = reference
    if args.a_bit != 32:
        if dataset is None:
            raise UserError(f"--a_bit {args.a_bit} needs training images, and there is no {name} in {folder}")
        taken = calib_images(args.calib_images, dataset.train)
        check_activations(model, path)
        batches = [images for images, _ in calibration_batches(dataset.train, spec, taken, args.seed)]
        try:
            deployed = quantize_activations(reference, args.a_bit, calibrate(model, batches, args.a_bit))
            if args.integer_kernels:
                deployed = quantize_sums(deployed, batches)
        except ValueError as error:
            raise UserError(f"{path}: {first_line(error)}") from None

    if dataset:
        images = dataset.test.images[:CHECKED]
    else:
        images = torch.randint(0, 256, (CHECKED, 32, 32, 3), dtype=torch.uint8)
    floats = normalize(images, spec).contiguous()

    with torch.no_grad():
        expected = reference(floats)
        expected_deployed = expected if deployed is reference else deployed(floats)
    if not (expected.isfinite().all() and expected_deployed.isfinite().all()):
        raise UserError(
            f"{path}: the network's outputs are not finite at W{args.w_bit}A{args.a_bit}: nothing is written"
        )
    stem = out / f"{path.stem}_w{args.w_bit}"
    float_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    kind = "test" if dataset else "random"
    print(f"{path}: {float_bytes} bytes of float32 parameters; checked on {len(images)} {kind} images")

    classes = checkpoint.get("classes") or (dataset.classes if dataset else None)
    facts = {
        "arch": checkpoint.get("arch") or type(model).__name__, "num_classes": expected.shape[1], "dataset": name,
        "grid": grid, **({"classes": classes} if classes else {}),
        "source": path.name, "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    constants = (torch.tensor(spec.mean), torch.tensor(spec.std)) if args.with_normalize else None
    packed_path, onnx_path = f"{stem}.safetensors", f"{stem}{f'a{args.a_bit}' if args.a_bit != 32 else ''}.onnx"
    with replacing(packed_path) as packed, replacing(onnx_path) as graph:
        try:
            save_packed(packed, model, facts, **grid)
        except safetensors.SafetensorError as error:  # as a full disk is to it
            raise UserError(f"{packed_path} cannot be written ({first_line(error)}): nothing is written") from None
        again = load_packed(packed, build_model(facts["arch"], facts["num_classes"]))
        with torch.no_grad():
            if not torch.equal(again(floats), expected):
                raise UserError(f"{packed_path} does not give the outputs of the quantized network: nothing is written")
        try:
            integers = integer_weights(model, **grid)
            onnx.save(to_onnx(deployed, integers, images.shape[1], constants, args.integer_kernels), graph)
        except ValueError as error:
            raise UserError(f"{path}: {first_line(error)}") from None
        inputs = images if args.with_normalize else floats
        logits = run_onnx(graph, inputs, as_written=True)
        difference = (logits - expected_deployed).abs().max().item()
        agreement = percent_right(logits, expected_deployed.argmax(1))
        best, spread = expected_deployed.amax(1), expected_deployed.amax(1) - expected_deployed.amin(1)
        tied = best - expected_deployed.gather(1, logits.argmax(1, keepdim=True))[:, 0] <= TIE * spread
        good = tied.float().mean() >= AGREEMENT if args.a_bit != 32 else difference <= LOGIT_TOLERANCE
        if not good:
            raise UserError(
                f"{onnx_path} differs from the quantized network: largest logit difference {difference:.2g}, "
                f"top-1 agreement {agreement:.2f} %: nothing is written"
            )
        verdict = f"largest logit difference {difference:.1e}, top-1 agreement {agreement:.2f} %"
        if args.a_bit != 32:
            by_kernels = percent_right(run_onnx(graph, inputs, as_written=False), expected_deployed.argmax(1))
            verdict += f" ({by_kernels:.2f} % with the runtime's integer kernels, which round biases)"
    for file, words in ((packed_path, "outputs equal the quantized network's, bit for bit"), (onnx_path, verdict)):
        size = Path(file).stat().st_size
        print(f"{file}: {size} bytes, {float_bytes / size:.1f} times smaller; {words}")
    if dataset:
        labels = dataset.test.labels[:CHECKED]
        with torch.no_grad():
            right = [percent_right(outputs, labels) for outputs in (model(floats), expected_deployed)]
        kind = f"W{args.w_bit}" + (f"A{args.a_bit}" if args.a_bit != 32 else "")
        print(f"top-1 on these test images: {right[0]:.2f} % in float, {right[1]:.2f} % at {kind}")
    found = mismatches(checkpoint, args.w_bit, grid["first_last"], grid["per_channel"])
    if found:
        print(f"warning: {path} is exported as it was not made to be: {'; '.join(found)}", file=sys.stderr)


def percent_right(logits, labels) -> float:
    """Percent of the images whose best class is their label."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def same_top1(logits, expected) -> float:
    """Percent of the images with the same best class."""
    return 100 * (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def run_onnx(path: Path, images, as_written: bool):
    """Logits of the file at `path` by onnxruntime on the CPU, as a torch tensor: node for node, or as it runs best."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


if __name__ == "__main__":
    run(main)
