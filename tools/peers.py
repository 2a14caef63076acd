"""Quantization-aware training and other peers of PSGD, on the same network, data, batches and schedule.

    python -m tools.peers --method lsq --load_pretrained models/ResNet82.pth --w_bit 3 --granularity channel \\
                          --epoch 86 --decay_epoch 86 --exp_name peers/lsq_w3

All other flags are those of train.py. Every method quantizes the parameters that PSGD scales, at the bits of its rule:
below 4 bits the first and the last layer have 8.

ste          the forward pass takes Q(w); the gradient is straight-through
lsq          the same with learned steps (Esser et al., ICLR 2020)
parq         torchao.prototype.parq; hard quantization from the last fall of the rate on
binaryrelax  the same with its other relaxation
msqe         a penalty of --penalty times the sum over tensors of mean (w - Q(w))^2, which rises a thousandfold
psgd         train.py with --lambda_s auto

Writes a run folder like train.py's. The weights of last.pth are the float ones. quantized.pth holds the quantized
network, which `eval.py --w_bit 32` evaluates as it is.
"""

import importlib.util
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import train
from quant import Grid, layer_grids
from utils.checkpoint import RUN_STATE, load_checkpoint, save_checkpoint
from utils.cli import Parser, UserError, positive, run
from utils.runs import RunFolder
from utils.training.goals import Goal, GridGoal
from utils.training.qat import LearnedGoal, QuantizationPenalty, Substitution, first_step, ste_changes
from utils.training.run import Run, decays
from utils.training.run import train as train_run
from utils.training.setup import build_optimizer

METHODS = {
    "ste": "straight-through estimator",
    "lsq": "learned step size quantization",
    "parq": "PARQ",
    "binaryrelax": "BinaryRelax",
    "msqe": "penalty on the quantization error",
    "psgd": "PSGD",
}
OF_TORCHAO = ("parq", "binaryrelax")
INSTALL = "pip install --no-deps torchao"


def add_flags(p: Parser) -> None:
    p.add_argument("--method", choices=list(METHODS), default=None, help="what trains (default: that of a resumed run)")
    p.add_argument("--penalty", type=positive, default=10.0, help="strength of msqe's penalty at the start")


def parser() -> Parser:
    p = Parser(__doc__)
    add_flags(p)
    return p


def whole_parser(method: str | None) -> Parser:
    """The flags of train.py too, with the defaults of a method."""
    p = train.parser()
    add_flags(p)
    if method:
        p.set_defaults(exp_name=f"peers/{method}", **({"lambda_s": "auto"} if method == "psgd" else {"w_decay": 1e-4}))
    return p


def parse() -> tuple[Namespace, RunFolder | None]:
    """As train.parse. Raises UserError for what does not go together."""
    known, _ = parser().parse_known_args()
    args, folder = train.parse(partial(whole_parser, known.method))
    if folder and not args.method:
        raise UserError(f"{folder.path} was not started by tools.peers: the command that started it continues it")
    if not args.method:
        raise UserError(f"no method: choose --method {', '.join(METHODS)}")
    if args.method != "msqe" and args.penalty != parser().get_default("penalty"):
        raise UserError(f"--penalty {args.penalty:g} is for --method msqe: leave it out")
    if args.target == "zero" or args.grad_l1:
        raise UserError(f"--method {args.method} trains for a grid: leave --target zero and --grad_l1 out")
    if not (args.psg or folder):
        raise UserError("--psg follows from --method: leave it out")
    if args.compile and args.method not in ("msqe", "psgd"):
        raise UserError(f"--compile 1 does not go with --method {args.method}, which exchanges weights: leave it out")
    if args.method in OF_TORCHAO and not importlib.util.find_spec("torchao"):
        raise UserError(f"--method {args.method} needs torchao: {INSTALL}")
    args.psg = int(args.method == "psgd")
    if not (args.psg or folder):
        train.check_no_psg_flags(args, f"--method {args.method}")
    args.cuda_graph *= args.method not in OF_TORCHAO  # their steps count in Python
    return args, folder


class Peer:
    """A run by the method that its settings name."""

    def __init__(self) -> None:
        self.steps = 0  # of the stage
        self.run: Run | None = None

    def build(self, args: Namespace, model: nn.Module, goal: Goal, device: torch.device, steps: int) -> Optimizer:
        """train.py's optimizer, with the learned steps of lsq or inside that of torchao."""
        self.steps = steps
        optimizer, grid = build_optimizer(args, model, goal, device, steps), grid_of(goal)
        if args.method == "lsq":
            learned = [first_step(model.get_parameter(name), own) for name, own in layer_grids(model, grid).items()]
            optimizer.add_param_group({"params": learned, "weight_decay": 0.0})
        if args.method in OF_TORCHAO:
            from utils.training.parq import Relaxed

            optimizer = Relaxed(optimizer, model, grid, args.method, steps)
        return optimizer

    def extend(self, run: Run) -> None:
        """Makes a prepared run follow its method."""
        self.run, run.command = run, "python -m tools.peers"
        method, model, grid = run.args.method, run.model, grid_of(run.goal)
        if run.world.size > 1 and method != "psgd":
            raise UserError(f"--method {method} needs a single process")
        if method == "ste":
            Substitution(model, ste_changes(model, grid))
        elif method == "lsq":
            steps = dict(zip(layer_grids(model, grid), run.optimizer.param_groups[-1]["params"], strict=True))
            keep(run, "steps", {name: step.detach() for name, step in steps.items()})
            run.goal = LearnedGoal(grid, steps)
            Substitution(model, run.goal.changes(model))
        elif method == "msqe":
            done = (run.done - run.first_epoch + 1) * len(run.batches)
            QuantizationPenalty(run.optimizer, model, grid, run.args.penalty, self.steps, done)
        elif method in OF_TORCHAO:
            relax(run, run.optimizer)
        print(f"{method}: {METHODS[method]}, a grid for each {run.args.granularity}")

    def save_quantized(self) -> None:
        """Writes quantized.pth beside last.pth: the same, with the weights as they are deployed."""
        assert self.run  # after the training
        if not self.run.world.is_main:
            return
        path, left_out = Path(self.run.last_good), (*RUN_STATE, *self.run.extras)
        checkpoint = {key: value for key, value in load_checkpoint(path).items() if key not in left_out}
        quantized = self.run.goal.deployed(self.run.model).state_dict()
        save_checkpoint(path.with_name("quantized.pth"), checkpoint | {"state_dict": quantized})


def grid_of(goal: Goal) -> Grid:
    assert isinstance(goal, GridGoal)  # `parse` allows no other
    return goal.grid


def relax(run: Run, optimizer: Any) -> None:
    """Makes the network of `run` compute with the weights that `optimizer` relaxes, up to the last fall of the rate."""
    ends = [(fall - run.first_epoch) * len(run.batches) for fall in decays(run.args)]
    stage = optimizer.prox_map.anneal_end
    # At the latest the last step is hard.
    optimizer.prox_map.anneal_end = max((end for end in ends if end < stage), default=stage - 1)
    keep(run, "relaxed", optimizer.relaxed)
    Substitution(run.model, optimizer.changes())


@torch.no_grad()
def keep(run: Run, key: str, tensors: dict[str, Tensor]) -> None:
    """Adds `tensors` to the checkpoints of `run`. A resumed run restores them."""
    run.extras[key] = tensors
    if run.done >= run.first_epoch:
        saved = load_checkpoint(run.last_good)[key]
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])


def main() -> None:
    args, folder = parse()
    peer = Peer()
    train_run(args, folder, peer.extend, peer.build)
    peer.save_quantized()


if __name__ == "__main__":
    run(main)
