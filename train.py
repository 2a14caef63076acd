"""Train a network with SGD or Adam, with PSG (--psg 1, the default) or without (--psg 0).

The paper's 4-bit ResNet-32: PSGD from the vanilla network after its first learning-rate decay
  python train.py --arch ResNet32 --load_pretrained models/ResNet82.pth --lr 0.01 --epoch 150 --decay_epoch 123 \\
                  --adam 0 --w_bit 4 --lambda_s 150 --first_last_quant 1 --seed 1 --cu_num 0

The vanilla network itself
  python train.py --psg 0 --lr 0.1 --decay_epoch 82 123 --epoch 150 --save_epochs 82 150 --exp_name vanilla

Sparse training: PSGD with target zero, for pruning without fine-tuning
  python train.py --target zero --sparsity 0.9 --exp_name sparse

PSGD from scratch, on the embedded digits
  python train.py --dataset digits --lr 0.05 --epoch 10 --decay_epoch 8 --exp_name digits

ImageNet on all GPUs of a machine, from torchvision's weights
  torchrun --nproc_per_node 8 train.py --dataset imagefolder --data_dir imagenet --arch resnet18 --weights DEFAULT \\
                                       --batch_size 256 --lr 0.001 --epoch 30 --decay_epoch 20 --w_bit 4

Resume an interrupted run; its settings come from its folder
  python train.py --exp_name vanilla --resume

Writes runs/<exp_name>/: args.json, metrics.csv, TensorBoard events, last.pth and the epochs of --save_epochs.
"""

from argparse import Namespace
from collections.abc import Callable
from shlex import quote

from utils import cli, flags
from utils.cli import Parser, UserError, run
from utils.data.specs import DATASETS
from utils.runs import RunFolder, default_exp_name

PRETRAINED = "models/ResNet82.pth"
DEFAULT_GOALS = {"w_bit": 4, "sparsity": 0.9}
# Settings that have no meaning with --target zero.
GRID_ONLY = {"lambda_s": "auto", "granularity": "channel", "clip_weights": 1}
PSG_ONLY = ("lambda_s", "eps", "psg_acts_on")  # settings that have no effect without PSG
# Settings that a resumed run may change: where, how long and in which precision it runs, but not what it computes.
STARTERS = {"method": "tools.peers", "snip_batches": "tools.snip"}  # by a setting that only theirs have
FREE_ON_RESUME = {"exp_name", "resume", "device", "cu_num", "data_dir", "workers", "epoch", "save_epochs"}
FREE_ON_RESUME |= {"precision", "cuda_graph", "compile"}


def parser() -> Parser:
    p = Parser(__doc__)
    add_goal(p)
    add_training(p)
    return p


def add_goal(p: Parser) -> None:
    """Network, data and the goal of training."""
    # fmt: off
    p.add_argument("--arch", default="ResNet32",
                   help="ResNet32, vgg16_bn, vit_tiny, or a classification network of torchvision, such as resnet18")
    p.add_argument("--weights", default="", metavar="NAME", help="torchvision weights to start from, such as DEFAULT")
    p.add_argument("--dataset", default="cifar100", choices=list(DATASETS), help="data set")
    flags.add_data_dir(p, "data")
    flags.add_image_size(p, "that of --load_pretrained, else 224")
    flags.add_workers(p)
    p.add_argument("--val_split", type=cli.index, default=0, metavar="N",
                   help="hold N training images out and evaluate on them, not on the test set or val/")
    p.add_argument("--seed", type=cli.seed, default=1, help="seed for initial weights, data order and augmentation")
    p.add_argument("--psg", type=int, choices=[0, 1], default=1, help="1: position-scaled gradients; 0: vanilla")
    p.add_argument("--target", choices=["grid", "zero"], default="grid",
                   help="what to train for and evaluate at; grid: --w_bit bits; zero: pruning to --sparsity")
    p.add_argument("--w_bit", type=cli.bits, default=None, help="target bit-width of the weights, 2 to 8 (default: 4)")
    p.add_argument("--sparsity", type=cli.sparsity, default=None, metavar="S",
                   help="share of weights pruned with --target zero, by magnitude over all layers (default: 0.9)")
    p.add_argument("--lambda_s", type=cli.positive_or("auto"), default=150.0,
                   help="strength of the scaling; auto: each tensor's own, such that about 96 percent of the weights "
                   "are near the grid after three quarters of the run (docs/optimizer.md)")
    p.add_argument("--psg_acts_on", choices=["gradient", "update"], default="gradient",
                   help="what PSG scales: the gradient, as published, or the optimizer's whole update, for --adam 1")
    p.add_argument("--eps", type=cli.non_negative, default=0.0, help="added to the gradient multiplier (published: 0)")
    flags.add_first_last_quant(p)
    flags.add_granularity(p, "tensor")
    p.add_argument("--clip_weights", type=int, choices=[0, 1], default=0,
                   help="1: begin by clipping the weights to the range whose grid has the smallest squared error, and "
                   "with PSG keep them in it; 2 bits gain most from it")
    p.add_argument("--a_bit", type=cli.bits, default=4, help="target bit-width of activations; no effect in training")
    # fmt: on


def add_training(p: Parser) -> None:
    """Schedule, optimizer, run folder and device."""
    # fmt: off
    p.add_argument("--load_pretrained", default=None, metavar="FILE",
                   help='checkpoint to start from, or "" for scratch; its classes must match in number, not in name '
                   f"(default: {PRETRAINED} for PSG on ResNet32 and cifar100, else scratch)")
    p.add_argument("--resume_epoch", type=cli.count, metavar="N", help="first epoch (default: the checkpoint's + 1)")
    p.add_argument("--epoch", type=cli.count, default=150, help="number of the last epoch")
    p.add_argument("--lr", type=cli.positive, default=0.01, help="initial learning rate; use 1e-4 with --adam 1")
    p.add_argument("--decay_epoch", type=cli.count, nargs="*", default=[123], metavar="N",
                   help="epochs at which the learning rate is divided by 10; ignored up to the run's first epoch")
    p.add_argument("--adam", type=int, choices=[0, 1], default=0,
                   help="1: Adam; without momentum if PSG scales its update; if PSG scales the gradient, "
                   "--lr is multiplied by 0.01 * lambda_s, as published")
    p.add_argument("--decoupled_decay", type=int, choices=[0, 1], default=0,
                   help="1: with --adam 1, the weight decay apart from the gradient, which makes it AdamW")
    p.add_argument("--w_decay", type=cli.non_negative, default=None, help="L2 (default: 1e-4, or 0 with PSG at 2 bits)")
    p.add_argument("--w_decay_target", type=cli.non_negative, default=None, metavar="W",
                   help="for pruning: L2 of the weights that may be pruned; beside PSG it acts as an L1 penalty of "
                   "W / lambda_s, see docs/pruning.md (default: --w_decay)")
    p.add_argument("--l1", type=cli.non_negative, default=0.0, metavar="W",
                   help="for pruning: adds W times the sum of the weights' magnitudes to the loss; PSG scales it only "
                   "with --psg_acts_on update")
    p.add_argument("--grad_l1", type=cli.non_negative, default=0.0, metavar="W",
                   help="adds W times the sum of the magnitudes of the weights' gradients to the loss, a baseline for "
                   "quantization (Alizadeh et al. 2020); a step takes several times as long")
    p.add_argument("--teacher", default="", metavar="FILE",
                   help="checkpoint of a network for the same images and classes, whose outputs take half of the loss "
                   "from the labels (distillation, at temperature 1)")
    p.add_argument("--batch_size", type=cli.count, default=128, help="images per step, over all processes")
    p.add_argument("--exp_name", default=None,
                   help="run folder, under runs/ (default: data set and goal, such as cifar100/4bits, digits/sparse90, "
                   "or cifar10/vanilla with --psg 0)")
    p.add_argument("--resume", action="store_true", help="resume the run in runs/<exp_name>")
    p.add_argument("--save_epochs", type=cli.epochs, action=cli.EpochSet, nargs="*", default=[], metavar="N",
                   help="epochs whose checkpoints are kept, such as 82 or 103-150")
    flags.add_device(p)
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="precision of the forward and backward pass; auto: bf16 where it is fast, else fp32; master "
                   "weights, PSG and evaluation are float32; a resumed run keeps its own unless it is given")
    p.add_argument("--cuda_graph", type=int, choices=[0, 1], default=1,
                   help="1: a step is one CUDA graph, on a GPU with one process and the data set on it; "
                   "0: the plain loop")
    p.add_argument("--compile", type=int, choices=[0, 1], default=0,
                   help="1: torch.compile the network for training, which takes a minute or two at the start")
    p.add_argument("--deterministic", action="store_true",
                   help="use deterministic algorithms only, in the plain loop")
    # fmt: on


def parse(make: Callable[[], Parser] = parser) -> tuple[Namespace, RunFolder | None]:
    """The settings, and the folder of the run to resume, if any; a resumed run keeps its own settings. A tool's parser,
    which `make` makes, may have more flags."""
    args = make().parse_args()
    if args.exp_name is None:
        resolve_target(args)
        args.exp_name = default_exp_name(args)
    if not args.resume:
        if args.load_pretrained is None:
            as_published = args.psg and args.arch == "ResNet32" and args.dataset == "cifar100"
            args.load_pretrained = PRETRAINED if as_published else ""
        resolve_target(args)
        if not args.psg:
            check_no_psg_flags(args, "--psg 0")
        if args.lambda_s == "auto" and args.adam and args.psg and args.psg_acts_on == "gradient":
            raise UserError("--lambda_s auto with --adam 1 needs --psg_acts_on update: Adam cancels it on gradients")
        if args.decoupled_decay and not args.adam:
            raise UserError("--decoupled_decay 1 needs --adam 1")
        if args.w_decay_target is not None and not (args.psg and args.target == "zero"):
            raise UserError(f"--w_decay_target {args.w_decay_target:g} needs --target zero and --psg 1")
        if args.weights and args.load_pretrained:
            raise UserError(f"--weights {args.weights} and --load_pretrained {args.load_pretrained}: choose one")
        if args.w_decay is None:
            args.w_decay = 0.0 if args.psg and args.w_bit == 2 else 1e-4
        return args, None
    folder, exp_name = RunFolder.reopen(args.exp_name), args.exp_name
    again = make()
    saved = vars(again.parse_args([])) | folder.latest_args()  # a flag added since then has its default
    again.set_defaults(**saved)
    args = again.parse_args()
    args.exp_name = exp_name
    if args.precision == "auto":  # as it was resolved when the run started
        args.precision = saved["precision"]
    changed = [key for key, value in saved.items() if key not in FREE_ON_RESUME and getattr(args, key) != value]
    if changed:
        told = ", ".join(f"--{key} {getattr(args, key)} (was {saved[key]})" for key in changed)
        raise UserError(f"{folder.path} was started with other settings: {told}; leave them out or start a new run")
    return args, folder


def resolve_target(args: Namespace) -> None:
    """Fills in --w_bit or --sparsity; UserError if a flag of the other target is given."""
    used, other = ("sparsity", "w_bit") if args.target == "zero" else ("w_bit", "sparsity")
    foreign = [f"--{other} {getattr(args, other)}"] if getattr(args, other) is not None else []
    if args.target == "zero":
        foreign += [f"--{key} {word}" for key, word in GRID_ONLY.items() if getattr(args, key) == word]
    if foreign:
        raise UserError(f"{foreign[0]} does not go with --target {args.target}: leave one of them out")
    if getattr(args, used) is None:
        setattr(args, used, DEFAULT_GOALS[used])


def check_no_psg_flags(args: Namespace, without: str) -> None:
    """UserError if a flag of PSG is set, which `without`, another flag, leaves without effect."""
    default = parser().get_default
    given = [f"--{key} {getattr(args, key)}" for key in PSG_ONLY if getattr(args, key) != default(key)]
    if given:
        raise UserError(f"{given[0]} does not go with {without}: leave one of them out")


def main() -> None:
    args, folder = parse()
    if folder and "rule" in args:
        raise UserError(f"{folder.path} was started by tools.trials, whose rules cannot be resumed: start a new run")
    if folder and (tool := next((tool for key, tool in STARTERS.items() if key in args), None)):
        command = f"python -m {tool} --exp_name {quote(args.exp_name)} --resume"
        raise UserError(f"{folder.path} was started by {tool}: {command} continues it")

    from utils.training.run import train

    train(args, folder)


if __name__ == "__main__":
    run(main)
