"""Exports networks: the files are read back, run and compared before they get their names."""

import hashlib
import importlib
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from quant import Grid, calibrate, quantize_activations, quantize_sums, quantize_weights
from quant.deploy import integer_weights, load_packed, save_packed, to_onnx
from quant.grid import FLOAT_BITS
from utils.checkpoint import grid_of
from utils.cli import UserError, first_line, warn
from utils.data.in_memory import InMemorySplit, normalize
from utils.deployment import check_activations
from utils.files import output_folder, replacing
from utils.opening import Datasets, OpenedNetwork, open_network
from utils.trained_for import mismatches

CHECKED = 512  # images on which the files are compared with the network
LOGIT_TOLERANCE = 1e-4
# Activation quantizers may round a value between two levels either way, which can decide near ties the other way:
TIE = 0.1  # of the spread of an image's logits: two classes nearer than that are tied
AGREEMENT = 0.99  # least share of images with the same top-1, or a tied one


@dataclass
class Exported:
    """A network as it is exported, and its outputs for the images that its files are checked on."""

    opened: OpenedNetwork
    grid: Grid
    a_bit: int
    deployed: nn.Module  # with quantized weights and, below 32 bits, activations
    images: Tensor  # uint8 [N, S, S, 3]
    labels: Tensor | None  # of test images; None if there are none at hand
    floats: Tensor  # the same images, normalized [N, 3, S, S]
    weights_only: Tensor  # logits with quantized weights [N, classes]
    expected: Tensor  # logits of `deployed`

    @property
    def kind(self) -> str:
        return f"W{self.grid.bits}" + (f"A{self.a_bit}" if self.a_bit != FLOAT_BITS else "")


def check_packages() -> None:
    """Raises UserError if a package that exports need is missing: call it before the work."""
    for name in ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{first_line(error)}: pip install -r requirements-export.txt") from None


def export_checked(args: Namespace, size: int) -> None:
    """Writes the files that export.py's `args` ask for, of a network for images of size x size.

    Raises UserError if a package is missing or a file does not give the network's outputs; then no file is left.
    """
    check_packages()
    with output_folder("--out", args.out) as out:
        exported = prepare(args, size)
        write(args, exported, out)


def prepare(args: Namespace, size: int) -> Exported:
    """The network with quantizers, and its outputs."""
    datasets = Datasets(args.data_dir, torch.device("cpu"))
    opened = open_network(args.model_path, datasets, args.dataset, download=False, sizes=(size,))
    grid = grid_of(opened.checkpoint, args.w_bit, bool(args.first_last_quant), args.granularity)
    model = opened.model
    reference = quantize_weights(model, grid)
    deployed = with_activations(args, opened, reference) if args.a_bit != FLOAT_BITS else reference
    test = opened.dataset.test if opened.dataset else None
    if isinstance(test, InMemorySplit):
        images, labels = test.images[:CHECKED], test.labels[:CHECKED]
    else:
        images, labels = torch.randint(0, 256, (CHECKED, size, size, 3), dtype=torch.uint8), None
    floats = normalize(images, opened.spec).contiguous()
    with torch.no_grad():
        weights_only = reference(floats)
        expected = weights_only if deployed is reference else deployed(floats)
    if not (weights_only.isfinite().all() and expected.isfinite().all()):
        bits = f"W{grid.bits}A{args.a_bit}"
        raise UserError(f"{opened.path}: the network's outputs are not finite at {bits}: nothing is written")
    return Exported(opened, grid, args.a_bit, deployed, images, labels, floats, weights_only, expected)


def with_activations(args: Namespace, opened: OpenedNetwork, reference: nn.Module) -> nn.Module:
    """`reference` with activation quantizers, their ranges from training images."""
    if opened.dataset is None:
        missing = f"there is no {opened.dataset_name} in {opened.folder}"
        raise UserError(f"--a_bit {args.a_bit} needs training images, and {missing}")
    train = opened.dataset.train
    count = train.count_for(args.calib_images)
    check_activations(opened.model, opened.path)
    batches = [images for images, _ in train.calibration(count, args.seed)]
    try:
        ranges = calibrate(opened.model, batches, args.a_bit)
        deployed = quantize_activations(reference, args.a_bit, ranges)
        return quantize_sums(deployed, batches) if args.integer_kernels else deployed
    except ValueError as error:
        raise UserError(f"{opened.path}: {first_line(error)}") from None


def write(args: Namespace, exported: Exported, out: Path) -> None:
    """Writes both files to `out`, checks them and prints what they are."""
    path = Path(exported.opened.path)
    stem = out / f"{path.stem}_w{exported.grid.bits}"
    float_bytes = 4 * sum(parameter.numel() for parameter in exported.opened.model.parameters())
    kind = "random" if exported.labels is None else "test"
    print(f"{path}: {float_bytes} bytes of float32 parameters; checked on {len(exported.images)} {kind} images")
    suffix = f"a{exported.a_bit}" if exported.a_bit != FLOAT_BITS else ""
    packed_path, onnx_path = f"{stem}.safetensors", f"{stem}{suffix}.onnx"
    with replacing(packed_path) as packed, replacing(onnx_path) as graph:
        write_packed(exported, packed, packed_path)
        write_onnx(args, exported, graph)
        verdict = compare_onnx(args, exported, graph, onnx_path)
    for file, words in ((packed_path, "outputs equal the quantized network's, bit for bit"), (onnx_path, verdict)):
        size = Path(file).stat().st_size
        print(f"{file}: {size} bytes, {float_bytes / size:.1f} times smaller; {words}")
    if exported.labels is not None:
        with torch.no_grad():
            in_float = percent_right(exported.opened.model(exported.floats), exported.labels)
        quantized = percent_right(exported.expected, exported.labels)
        print(f"top-1 on these test images: {in_float:.2f} % in float, {quantized:.2f} % at {exported.kind}")
    if found := mismatches(exported.opened.checkpoint, exported.grid):
        warn(f"{path} does not match how it is exported: {'; '.join(found)}")


def write_packed(exported: Exported, packed: Path, name: str) -> None:
    """Writes the packed file to `packed`. Raises UserError, with its `name`, if its outputs are not the same."""
    from safetensors import SafetensorError

    facts = file_facts(exported)
    try:
        save_packed(packed, exported.opened.model, exported.grid, facts)
    except SafetensorError as error:  # such as a full disk
        raise UserError(f"{name} cannot be written ({first_line(error)}): nothing is written") from None
    again = load_packed(packed, build_model(facts["arch"], facts["num_classes"]))
    with torch.no_grad():
        if not torch.equal(again(exported.floats), exported.weights_only):
            raise UserError(f"{name} does not give the outputs of the quantized network: nothing is written")


def file_facts(exported: Exported) -> dict[str, Any]:
    """What the packed file holds beside the weights."""
    opened, path = exported.opened, Path(exported.opened.path)
    classes = opened.checkpoint.get("classes") or (opened.dataset.classes if opened.dataset else None)
    grid = {key: value for key, value in asdict(exported.grid).items() if key != "weight_range"}  # always absmax
    return {
        "arch": opened.arch, "num_classes": exported.expected.shape[1], "dataset": opened.dataset_name, "grid": grid,
        **({"classes": classes} if classes else {}),
        "source": path.name, "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip


def write_onnx(args: Namespace, exported: Exported, graph: Path) -> None:
    """Writes the ONNX file to `graph`. Raises UserError for a network that ONNX cannot express."""
    import onnx

    spec = exported.opened.spec
    constants = (torch.tensor(spec.mean), torch.tensor(spec.std)) if args.with_normalize else None
    try:
        integers = integer_weights(exported.opened.model, exported.grid)
        proto = to_onnx(exported.deployed, integers, exported.images.shape[1], constants, args.integer_kernels)
    except ValueError as error:
        raise UserError(f"{exported.opened.path}: {first_line(error)}") from None
    onnx.save(proto, graph)


def compare_onnx(args: Namespace, exported: Exported, graph: Path, name: str) -> str:
    """How close the outputs of the file `graph` are to the network's, in words. UserError, with its `name`, if they are
    not close enough."""
    inputs, expected = exported.images if args.with_normalize else exported.floats, exported.expected
    logits = run_onnx(graph, inputs, as_written=True)
    difference = (logits - expected).abs().max().item()
    agreement = percent_right(logits, expected.argmax(1))
    best, spread = expected.amax(1), expected.amax(1) - expected.amin(1)
    tied = best - expected.gather(1, logits.argmax(1, keepdim=True))[:, 0] <= TIE * spread
    quantized = exported.a_bit != FLOAT_BITS
    good = tied.float().mean() >= AGREEMENT if quantized else difference <= LOGIT_TOLERANCE
    if not good:
        raise UserError(
            f"{name} differs from the quantized network: largest logit difference {difference:.2g}, "
            f"top-1 agreement {agreement:.2f} %: nothing is written"
        )
    verdict = f"largest logit difference {difference:.1e}, top-1 agreement {agreement:.2f} %"
    if quantized:
        by_kernels = percent_right(run_onnx(graph, inputs, as_written=False), expected.argmax(1))
        verdict += f" ({by_kernels:.2f} % with the runtime's integer kernels, which round biases)"
    return verdict


def percent_right(logits: Tensor, labels: Tensor) -> float:
    """Percent of the images whose best class is their label."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def run_onnx(graph: Path | bytes, images: Tensor, as_written: bool) -> Tensor:
    """Logits of an ONNX file, or of its content, by onnxruntime on the CPU: node by node `as_written`, else
    optimized."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
