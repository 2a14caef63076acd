"""Exports networks: the files are read back, run and compared before they get their names."""

import copy
import importlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import build_model
from quant import Grid, calibrate, quantize_activations, quantize_sums, quantize_weights, reestimate_batch_norm
from quant.deploy import integer_weights, load_packed, save_packed, to_onnx
from quant.grid import FLOAT_BITS
from utils.checkpoint import grid_of
from utils.cli import UserError, first_line, warn
from utils.data.in_memory import normalize
from utils.deployment import check_activations
from utils.export_notes import add_metadata, file_facts, page
from utils.files import output_folder, replacing
from utils.opening import Datasets, OpenedNetwork, listed, open_network

# Images on which the files are compared with the network: fewer of those above SMALL pixels per side, for speed.
CHECKED, CHECKED_LARGE, SMALL = 512, 64, 32
AT_ONCE = 64  # images
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
    reference: nn.Module  # with quantized weights
    deployed: nn.Module  # with quantized weights and, below 32 bits, activations
    images: Tensor  # uint8 [N, S, S, 3]
    labels: Tensor | None  # None for noise
    images_kind: str  # "test images", ...
    floats: Tensor  # the same images, normalized [N, 3, S, S]
    weights_only: Tensor  # logits of `reference` [N, classes]
    expected: Tensor  # logits of `deployed`
    facts: dict[str, Any]  # what the files hold beside the weights

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


def export_checked(args: Namespace) -> None:
    """Writes the files that export.py's `args` ask for.

    Raises UserError if a package is missing or a file does not give the network's outputs; then no file is left.
    """
    check_packages()
    with output_folder("--out", args.out) as out:
        exported = prepare(args)
        write(args, exported, out)


def prepare(args: Namespace) -> Exported:
    """The network with quantizers, and its outputs."""
    datasets = Datasets(args.data_dir, torch.device("cpu"), args.workers, args.image_size)
    opened = open_network(args.model_path, datasets, args.dataset, args.arch, data="at hand")
    grid = grid_of(opened.checkpoint, args.w_bit, bool(args.first_last_quant), args.granularity)
    reference = quantize_weights(opened.model, grid)
    deployed, batches = reference, training_images(args, opened)
    if args.a_bit != FLOAT_BITS:
        deployed = with_activations(args, opened, grid, reference, batches)
    if args.post == "bn_reestimate":
        renew_batch_norm(opened, {reference, deployed}, batches)
    images, labels, kind = images_to_check(opened)
    floats = normalize(images, opened.spec).contiguous()
    weights_only = logits_of(reference, floats)
    expected = weights_only if deployed is reference else logits_of(deployed, floats)
    if not (weights_only.isfinite().all() and expected.isfinite().all()):
        bits = f"W{grid.bits}A{args.a_bit}"
        raise UserError(f"{opened.path}: the network's outputs are not finite at {bits}: nothing is written")
    facts = file_facts(opened, grid, expected.shape[1], args.post)
    networks = reference, deployed
    return Exported(opened, grid, args.a_bit, *networks, images, labels, kind, floats, weights_only, expected, facts)


def images_to_check(opened: OpenedNetwork) -> tuple[Tensor, Tensor | None, str]:
    """Images uint8 [N, S, S, 3] of all classes, their labels and of which kind they are: test images if they are at
    hand, else training images, else noise without labels."""
    size = opened.spec.size
    count = CHECKED if size <= SMALL else CHECKED_LARGE
    if opened.dataset is None:
        noise = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)
        return noise, None, f"random images, as there is no {opened.dataset_name} in {opened.folder}"
    split, kind = opened.dataset.train, "training"
    if len(opened.dataset.test) or opened.val_split:
        _, split, kind = opened.dataset.splits(opened.val_split)
    count = min(count, len(split))
    return *split.pixels(torch.arange(count) * len(split) // count), f"{kind} images"


def training_images(args: Namespace, opened: OpenedNetwork) -> list[Tensor]:
    """The batches [N, 3, H, W] that `args` need, without augmentation. Raises UserError for a network whose activations
    cannot be quantized, and, naming the flag that needs images, if the data set is not at hand."""
    quantizes, renews = args.a_bit != FLOAT_BITS, args.post == "bn_reestimate"
    if not (quantizes or renews):
        return []
    if opened.dataset is None:
        flag = f"--a_bit {args.a_bit}" if quantizes else f"--post {args.post}"
        missing = f"there is no {opened.dataset_name} in {opened.folder}"
        raise UserError(f"{flag} needs training images, and {missing}")
    train = opened.dataset.splits(opened.val_split)[0] if opened.val_split else opened.dataset.train
    count = train.count_for(args.calib_images)
    if quantizes and args.act_at == "relu":
        check_activations(opened.model, opened.path)
    return [images for images, _ in train.calibration(count, args.seed)]


def renew_batch_norm(opened: OpenedNetwork, networks: set[nn.Module], batches: list[Tensor]) -> None:
    """Re-estimates the batch norm of each of `networks`, in place. Raises UserError for one without."""
    try:
        for network in networks:
            reestimate_batch_norm(network, batches)
    except ValueError as error:
        raise UserError(f"{opened.path}: {first_line(error)}") from None


@torch.no_grad()
def logits_of(network: nn.Module, floats: Tensor) -> Tensor:
    """Outputs [N, classes] for normalized images [N, 3, S, S], a part of them at a time."""
    return torch.cat([network(part) for part in floats.split(AT_ONCE)])


def with_activations(
    args: Namespace, opened: OpenedNetwork, grid: Grid, reference: nn.Module, batches: list[Tensor]
) -> nn.Module:
    """`reference`, whose weights are on `grid`, with activation quantizers, their ranges from `batches`."""
    try:
        ranges = calibrate(opened.model, batches, args.a_bit, at=args.act_at, grid=grid)
        deployed = quantize_activations(reference, args.a_bit, ranges)
        return quantize_sums(deployed, batches) if args.integer_kernels else deployed
    except ValueError as error:
        raise UserError(f"{opened.path}: {first_line(error)}") from None


def write(args: Namespace, exported: Exported, out: Path) -> None:
    """Writes both files and the page about them to `out`, checks them and prints what they are."""
    path, classes = Path(exported.opened.path), exported.opened.classes
    stem = out / f"{path.stem}_w{exported.grid.bits}"
    float_bytes = 4 * sum(parameter.numel() for parameter in exported.opened.model.parameters())
    named = f", {listed(classes)}" if classes else ""
    print(f"{path}: {exported.opened.arch} for {exported.opened.dataset_name}{named}")
    print(f"{float_bytes} bytes of float32 parameters; checked on {len(exported.images)} {exported.images_kind}")
    suffix = f"a{exported.a_bit}" if exported.a_bit != FLOAT_BITS else ""
    packed_path, onnx_path, page_path = f"{stem}.safetensors", f"{stem}{suffix}.onnx", f"{stem}{suffix}.md"
    with replacing(packed_path) as packed, replacing(onnx_path) as graph, replacing(page_path) as about:
        write_packed(exported, packed, packed_path)
        write_onnx(args, exported, graph)
        verdict = compare_onnx(args, exported, graph, onnx_path)
        names = Path(packed_path).name, Path(onnx_path).name
        about.write_text(page(exported.facts, *names, exported.a_bit, args.with_normalize))
    for file, words in ((packed_path, "outputs equal the quantized network's, bit for bit"), (onnx_path, verdict)):
        size = Path(file).stat().st_size
        print(f"{file}: {size} bytes, {float_bytes / size:.1f} times smaller; {words}")
    print(f"{page_path}: what they take, and how to load them")
    if exported.labels is not None:
        in_float = percent_right(logits_of(exported.opened.model, exported.floats), exported.labels)
        quantized = percent_right(exported.expected, exported.labels)
        print(f"top-1 on these {exported.images_kind}: {in_float:.2f} % in float, {quantized:.2f} % at {exported.kind}")
    if found := exported.facts["notes"]:
        warn(f"{path} does not match how it is exported: {'; '.join(found)}")


def write_packed(exported: Exported, packed: Path, name: str) -> None:
    """Writes the packed file to `packed`. Raises UserError, with its `name`, if its outputs are not the same."""
    from safetensors import SafetensorError

    facts, model = exported.facts, copy.deepcopy(exported.opened.model)
    model.load_state_dict(exported.reference.state_dict() | dict(model.named_parameters(remove_duplicate=False)))
    try:
        save_packed(packed, model, exported.grid, facts)
    except SafetensorError as error:  # such as a full disk
        raise UserError(f"{name} cannot be written ({first_line(error)}): nothing is written") from None
    again = load_packed(packed, build_model(facts["arch"], facts["num_classes"]))
    if not torch.equal(logits_of(again, exported.floats), exported.weights_only):
        raise UserError(f"{name} does not give the outputs of the quantized network: nothing is written")


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
    add_metadata(proto, exported.facts, exported.a_bit, args.with_normalize)
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
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in images.split(AT_ONCE)])
