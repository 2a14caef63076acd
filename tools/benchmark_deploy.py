"""Size, accuracy and speed of exported networks beside the same networks in torch, in one run on one machine.

    python -m utils.benchmark_deploy --model_path models/ResNet150.pth models/W4_ResNet.pth --w_bit 8 4
    python -m utils.benchmark_deploy --json results/deploy.json

For each checkpoint: float32 and bfloat16 in torch, float32 in onnxruntime, and there each --w_bit with float
activations, with 8-bit ones, and with 8-bit ones as `export.py --integer_kernels` writes them, on the grids that the
network was trained for. Images a second are medians over pieces of 256 images, the kinds taking turns; compare ratios
of one run.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from utils.benchmark import alternate

from utils.cli import DATA_DIR_HELP, Default, Parser, UserError, bits, count, first_line, run
from utils.files import check_output_file, command_line, git_commit, write_json

BATCHES = (1, 256)
PIECE = 256  # images timed at once


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--model_path", nargs="+", default=["models/W4_ResNet.pth"], metavar="FILE", help="checkpoints")
    p.add_argument("--w_bit", type=bits, nargs="+", default=[8, 4], metavar="B", help="weight bit-widths")
    p.add_argument("--data_dir", default=None, help=DATA_DIR_HELP)
    p.add_argument("--calib_images", type=count, default=Default(1024), metavar="N",
                   help="training images for activations; all if there are fewer and N is not given")  # fmt: skip
    p.add_argument("--rounds", type=count, default=20, help="times that each kind is measured at each batch size")
    p.add_argument("--json", default=None, metavar="FILE", help="write the figures there too")
    args = p.parse_args()
    if args.json:
        check_output_file("--json", args.json)

    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{first_line(error)}: pip install -r requirements-export.txt") from None
    import torch
    from utils.pairing import Datasets

    from utils.checkpoint import dataset_name, load_checkpoint, model_from_checkpoint, per_channel
    from utils.data import calib_images
    from utils.deployment import check_activations
    from utils.device import machine, select_device

    device, _ = select_device("cpu", 0)
    rows: list[dict[str, Any]] = []
    hardware = machine(device)
    print(f"{hardware}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {args.rounds} rounds")
    datasets = Datasets(args.data_dir, device)
    for path in args.model_path:
        checkpoint = load_checkpoint(path)
        name = dataset_name(checkpoint)
        if name == "imagefolder":
            raise UserError(f"{path} is for {name}; this benchmark takes networks for images of 32 x 32")
        dataset = datasets.of(checkpoint, path)
        taken = calib_images(args.calib_images, dataset.train)
        model = model_from_checkpoint(checkpoint, path, None, len(dataset.classes)).eval()
        check_activations(model, path)
        by_channel = per_channel(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = compare(args, taken, model, by_channel, dataset, Path(folder))
            except ValueError as error:  # as an operation without a counterpart in the file
                raise UserError(f"{path}: {first_line(error)}") from None
        rows += [{"model": path, **row} for row in found]
    if args.json:
        facts = {"command": command_line(), "commit": git_commit(), "machine": hardware, "torch": torch.__version__}
        write_json(args.json, {**facts, "onnxruntime": onnxruntime.__version__, "rounds": args.rounds, "rows": rows})


def compare(args, taken: int, model, by_channel: bool, dataset, folder: Path) -> list[dict[str, Any]]:
    """A row for each kind of `model`: bytes of its file (in torch of its parameters), top-1 and images a second.

    `taken` training images are for the ranges of activations.
    """
    import torch

    from utils.data import eval_batches, normalize

    kinds = torch_kinds(model) | onnx_kinds(args, taken, model, by_channel, dataset, folder)
    top1 = {}
    for name, (_, network) in kinds.items():
        hits = 0
        for images, labels in eval_batches(dataset.test, dataset.spec, 256):
            logits = network(images)
            if not logits.isfinite().all():
                raise ValueError(f"the outputs of {name} are not finite")
            hits += (logits.argmax(1) == labels).sum().item()
        top1[name] = 100 * hits / len(dataset.test)
    speed: dict[str, dict[int, float]] = {name: {} for name in kinds}
    for batch in BATCHES:
        images = normalize(dataset.test.images[:PIECE], dataset.spec).split(batch)
        pieces = {name: partial(run_all, network, images) for name, (_, network) in kinds.items()}
        for name, seconds in alternate(pieces, args.rounds, torch.device("cpu")).items():
            speed[name][batch] = PIECE / seconds
    print(f"{'':40}{'bytes':>10}{'top-1':>8}" + "".join(f"{f'images/s at {batch}':>17}" for batch in BATCHES))
    rows = []
    for name, (size, _) in kinds.items():
        rows.append({"kind": name, "bytes": size, "top1": round(top1[name], 4)})
        rows[-1] |= {f"images_per_second_at_{batch}": round(speed[name][batch], 1) for batch in BATCHES}
        figures = "".join(f"{speed[name][batch]:17.0f}" for batch in BATCHES)
        print(f"{name:40}{size:10d}{top1[name]:8.2f}{figures}", flush=True)
    return rows


def run_all(network: Callable, batches) -> None:
    for images in batches:
        network(images)


def torch_kinds(model) -> dict[str, tuple[int, Callable]]:
    """The network in torch, batch norm folded, in the two precisions: bytes of its parameters, and a function."""
    import copy

    import torch
    from utils.engine import fold_batch_norm

    from utils.device import autocast

    folded = fold_batch_norm(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())

    def network(precision: str) -> Callable:
        @torch.inference_mode()
        def forward(images):
            with autocast(images.device, precision):
                return folded(images).float()

        return forward

    return {"torch, float32": (size, network("fp32")), "torch, bfloat16": (size // 2, network("bf16"))}


def onnx_kinds(args, taken: int, model, by_channel: bool, dataset, folder: Path) -> dict[str, tuple[int, Callable]]:
    """The network in onnxruntime, in float and with integer weights: bytes of its file, and a function."""
    import onnx
    import onnxruntime
    import torch

    from quant import calibrate, integer_weights, quantize_activations, quantize_sums, quantize_weights, to_onnx
    from utils.data import calibration_batches

    batches = [images for images, _ in calibration_batches(dataset.train, dataset.spec, taken, seed=1)]
    ranges = calibrate(model, batches, 8)
    protos = {"onnxruntime, float32": to_onnx(model, {})}
    for width in args.w_bit:
        integers = integer_weights(model, width, per_channel=by_channel)
        protos[f"onnxruntime, W{width}"] = to_onnx(model, integers)
        rounded = quantize_weights(model, width, per_channel=by_channel)
        quantized = quantize_activations(rounded, 8, ranges, inplace=True)
        protos[f"onnxruntime, W{width}A8"] = to_onnx(quantized, integers)
        with_sums = quantize_sums(quantized, batches)
        protos[f"onnxruntime, W{width}A8, integer kernels"] = to_onnx(with_sums, integers, int8=True)
    kinds = {}
    for number, (name, proto) in enumerate(protos.items()):
        path = folder / f"{number}.onnx"
        onnx.save(proto, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on spinning after a run, on the cores of the kind that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as `select_device` does for torch
        if "A8" not in name:  # let the weights become floats once, when the file is loaded, not at every run
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def forward(images, session=session):
            return torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])

        kinds[name] = (path.stat().st_size, forward)
    return kinds


if __name__ == "__main__":
    run(main)
