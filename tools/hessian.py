"""Curvature at the solutions of SGD and PSGD: the data of figure 4, as a folder of results.

    python -m tools.hessian --out results/studies/hessian

A small fully connected network on the embedded digits, trained once by SGD and once by PSGD from the same start, with
all eigenvalues of its exact Hessian (digits.csv: weights and eigenvalues); and trained checkpoints, whose Hessian is
too large to write down, with the density of its eigenvalues by stochastic Lanczos quadrature (spectrum.csv: Ritz values
and their shares, for each random start). The Hessian is that of the mean loss on training images without augmentation;
for checkpoints with respect to the weights of convolutions and linear layers, the network in eval mode.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from quant import PSGD, grid_share, psg_param_groups, quantize_weights
from quant.pruning import prunable_weights
from utils import flags
from utils.checkpoint import training_facts
from utils.cli import Default, Parser, UserError, count, run, seed
from utils.data.in_memory import CroppedBatches, InMemorySplit, normalize
from utils.data.load import load_dataset
from utils.device import select_device
from utils.files import command_line, git_commit, output_folder, write_csv, write_json
from utils.opening import Datasets, open_network
from utils.training.evaluation import evaluate

BITS, LAMBDA_S, LR, EPOCHS, DECAY, BATCH_SIZE = 4, 20.0, 0.1, 300, 250, 128  # of the small network

Product = Callable[[Tensor], Tensor]  # of a symmetric matrix [n, n] with a vector [n]
Row = dict[str, str | float]


class Problem(NamedTuple):
    """A trained network, in eval mode, and the images that its loss is the mean over."""

    path: str
    facts: dict[str, str]  # how it was trained
    model: nn.Module
    images: Tensor
    labels: Tensor


class GrayPixels(nn.Module):
    """Images [N, 3, 32, 32] averaged to 8 x 8 gray pixels [N, 64], which is what the digits were."""

    def forward(self, images: Tensor) -> Tensor:
        return adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)


def small_network() -> nn.Sequential:
    """64-16-10, on gray pixels."""
    return nn.Sequential(GrayPixels(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def hessian_product(loss: Tensor, weights: Sequence[Tensor]) -> Product:
    """The product of the Hessian of `loss` (0-d, its graph kept) with a vector [n], n the number of all weights."""
    flat = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights, create_graph=True)])

    def product(vector: Tensor) -> Tensor:
        parts = torch.autograd.grad(flat, weights, vector, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return product


@torch.no_grad()
def lanczos(product: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values [k] of a symmetric operator on vectors [n], ascending, and the weights [k] of each in `start`.

    k is `steps`, or less if the space of `start` is exhausted; the weights sum to 1. The largest Ritz values are close
    to the largest eigenvalues; all together, averaged over random starts, they approximate the eigenvalue density
    (Golub and Welsch 1969; Ghorbani et al. 2019). Vectors are orthogonalized against all earlier ones, in float64.
    """
    basis = [start.double() / start.double().norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(steps, len(start))):
        vector = product(basis[-1].to(start)).double()
        diagonal.append(vector @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once is not enough in floating point
            vector = vector - (known @ vector) @ known
        length = vector.norm()
        if length < 1e-6 * max(abs(d) for d in diagonal):
            break
        beside.append(length)
        basis.append(vector / length)
    k = len(diagonal)
    matrix = torch.diag(torch.stack(diagonal))
    if k > 1:
        off = torch.stack(beside[: k - 1])
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors[0].square()


def train_small(train: InMemorySplit, psg: bool, seed: int) -> nn.Sequential:
    """The small network after EPOCHS epochs on the digits `train`, without augmentation."""
    torch.manual_seed(seed)
    network = small_network()
    groups = psg_param_groups(network, BITS) if psg else network.parameters()
    optimizer: Optimizer = SGD(groups, lr=LR, momentum=0.9, weight_decay=1e-4)
    if psg:
        optimizer = PSGD(optimizer, lambda_s=LAMBDA_S)
    scheduler = MultiStepLR(optimizer, [DECAY])
    pixels, layers = network[0](normalize(train.images, train.spec)), network[1:]
    batches = CroppedBatches(train, BATCH_SIZE, seed)
    for epoch in range(EPOCHS):
        order, _, _ = batches.plan(epoch)
        for chosen in order.split(BATCH_SIZE):
            loss = cross_entropy(layers(pixels[chosen]), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network


def exact_eigenvalues(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """All eigenvalues, ascending, of the Hessian of the mean loss with respect to all parameters, in float64."""
    network = copy.deepcopy(network).double()
    parameters = [*network.parameters()]
    product = hessian_product(cross_entropy(network(images.double()), labels), parameters)
    unit_vectors = torch.eye(sum(parameter.numel() for parameter in parameters), dtype=torch.float64)
    return torch.linalg.eigvalsh(torch.stack([product(vector) for vector in unit_vectors]))


def digits_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """For the small network, by SGD and by PSGD: a row for each weight with an eigenvalue, and a row of facts."""
    digits = load_dataset("digits", "", torch.device("cpu"))
    train, test = digits.train, digits.test
    assert isinstance(train, InMemorySplit)  # as the digits always are
    rows: list[Row] = []
    facts: list[Row] = []
    for name in ("SGD", "PSGD"):
        network = train_small(train, name == "PSGD", seed)
        eigenvalues = exact_eigenvalues(network, normalize(train.images, train.spec), train.labels)
        weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
        rows += [
            {"network": name, "weight": w, "eigenvalue": e} for w, e in zip(weights.tolist(), eigenvalues.tolist())
        ]
        facts.append({
            "network": name, "parameters": len(weights),
            "train_loss": evaluate(network, train).loss,
            "fp_top1": evaluate(network, test).top1,
            f"w{BITS}_top1": evaluate(quantize_weights(network, BITS), test).top1,
            "grid_share": grid_share(network, BITS), "largest_eigenvalue": eigenvalues[-1].item(),
            "trace": eigenvalues.sum().item(),
        })  # fmt: skip
    return rows, facts


def open_problem(path: str, datasets: Datasets, args: Namespace) -> Problem:
    """The network of the checkpoint `path`, with --images of its training images. UserError if there are fewer."""
    opened = open_network(path, datasets)
    train = opened.data.train
    taken = train.count_for(args.images, "--images")
    ((images, labels),) = train.calibration(taken, args.seed, batch_size=taken)
    return Problem(path, training_facts(opened.checkpoint), opened.model, images, labels)


def spectrum_rows(problem: Problem, args: Namespace) -> tuple[list[Row], Row]:
    """For a checkpoint: a row for each Ritz value of each random start, and its facts."""
    path, facts, model, images, labels = problem
    weights = [*prunable_weights(model).values()]
    loss = cross_entropy(model(images), labels)
    if not loss.isfinite():
        raise UserError(f"{path}: the network's outputs are not finite (loss {loss.item()}): it has no curvature")
    product = hessian_product(loss, weights)
    generator = torch.Generator().manual_seed(args.seed)
    rows: list[Row] = []
    largest = []
    for probe in range(args.probes):
        start = torch.randn(sum(weight.numel() for weight in weights), generator=generator).to(images.device)
        values, shares = lanczos(product, start, args.steps)
        rows += [
            {"model": path, **facts, "probe": probe, "eigenvalue": value, "share": share}
            for value, share in zip(values.tolist(), shares.tolist())
        ]
        largest.append(values[-1].item())
        print(f"{path}: start {probe + 1} of {args.probes}, largest eigenvalue {largest[-1]:.4g}", flush=True)
    return rows, {"model": path, **facts, "train_loss": loss.item(), "largest_eigenvalue": max(largest)}


def parser() -> Parser:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--model_path", nargs="*", default=["models/ResNet150.pth", "models/W4_ResNet.pth"], metavar="FILE",
                   help="checkpoints for spectrum.csv")
    p.add_argument("--images", type=count, default=Default(512), metavar="N",
                   help="training images that the loss is the mean over; all if there are fewer and N is not given")
    p.add_argument("--steps", type=count, default=60, help="of Lanczos, for each start")
    p.add_argument("--probes", type=count, default=1, help="random starts")
    p.add_argument("--seed", type=seed, default=1, help="of the small network, the images and the starts")
    flags.add_data_dir(p)
    flags.add_device(p)
    p.add_argument("--out", default="results/studies/hessian", metavar="DIR", help="folder to write to")
    # fmt: on
    return p


def main() -> None:
    args = parser().parse_args()
    device = select_device(args.device, args.cu_num)[0] if args.model_path else torch.device("cpu")
    datasets = Datasets(args.data_dir, device)
    with output_folder("--out", args.out) as out:
        # First: a wrong path costs nothing.
        problems = [open_problem(path, datasets, args) for path in args.model_path]
        rows, facts = digits_rows(args.seed)
        write_csv(out / "digits.csv", rows)
        for fact in facts:
            print(f"digits, {fact['network']}: largest eigenvalue {fact['largest_eigenvalue']:.4g}", flush=True)
        spectra = [spectrum_rows(problem, args) for problem in problems]
        if spectra:
            write_csv(out / "spectrum.csv", [row for rows, _ in spectra for row in rows])
        else:
            (out / "spectrum.csv").unlink(missing_ok=True)  # of an earlier call
        origin = {"command": command_line(), "commit": git_commit(), "torch": torch.__version__}
        results = {"digits": facts, "checkpoints": [fact for _, fact in spectra]}
        write_json(out / "results.json", {**origin, **results})


if __name__ == "__main__":
    run(main)
