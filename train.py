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

Go on with a run that was cut off; its settings come from its folder
  python train.py --exp_name vanilla --resume

Writes runs/<exp_name>/: args.json, metrics.csv, TensorBoard events, last.pth and the epochs of --save_epochs.
"""

import time
from argparse import Namespace

from utils import cli
from utils.cli import Parser, UserError, run
from utils.files import command_line, git_commit
from utils.runs import KEPT_BY_RESUMES, RunFolder, default_exp_name

PRETRAINED = "models/ResNet82.pth"
DEFAULT_GOALS = {"w_bit": 4, "sparsity": 0.9}
GRID_ONLY = {"lambda_s": "auto", "granularity": "channel"}  # settings that have no meaning with --target zero
# Settings that a resumed run may change: where it runs, in which precision and how long, but not what it computes.
FREE_ON_RESUME = {"exp_name", "resume", "device", "cu_num", "data_dir", "workers", "epoch", "save_epochs"}
FREE_ON_RESUME |= {"precision", "cuda_graph", "compile"}


def parser() -> Parser:
    p = Parser(__doc__)
    # fmt: off
    p.add_argument("--arch", default="ResNet32", help="ResNet32, vgg16_bn, or a classification network of torchvision")
    p.add_argument("--weights", default="", metavar="NAME", help="torchvision's weights to start from, as DEFAULT")
    p.add_argument("--dataset", default="cifar100", choices=cli.DATASET_NAMES, help="data set")
    p.add_argument("--data_dir", default="data", help="folder of <dataset>.npz, of its archive, or of train/ and val/")
    p.add_argument("--workers", type=cli.index, default=4,
                   help="processes that read images of an imagefolder, one a core at most")
    p.add_argument("--val_split", type=cli.index, default=0, metavar="N", help="evaluate on N held-out training images")
    p.add_argument("--seed", type=cli.seed, default=1, help="of initial weights, data order and augmentation")
    p.add_argument("--psg", type=int, choices=[0, 1], default=1, help="1: position-scaled gradients; 0: vanilla")
    p.add_argument("--target", choices=["grid", "zero"], default="grid",
                   help="what the weights are trained for and evaluated at: --w_bit bits, or pruning to --sparsity")
    p.add_argument("--w_bit", type=cli.bits, default=None, help="target bit-width of the weights, 2 to 8 (default: 4)")
    p.add_argument("--sparsity", type=cli.sparsity, default=None, metavar="S",
                   help="share of zero weights with --target zero, by magnitude over all layers (default: 0.9)")
    p.add_argument("--lambda_s", type=cli.positive_or("auto"), default=150.0,
                   help="strength of the scaling; auto: from the weights, rising if few are near the grid")
    p.add_argument("--psg_acts_on", choices=["gradient", "update"], default="gradient",
                   help="what PSG scales: gradients, as published, or the optimizer's whole step, meant for --adam 1")
    p.add_argument("--eps", type=cli.non_negative, default=0.0, help="added to the gradient multiplier (published: 0)")
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1,
                   help="1: first and last layer too, at 8 bits if --w_bit < 4; 0: leave them out, also of pruning")
    p.add_argument("--granularity", choices=["tensor", "channel"], default="tensor", help="what has a grid of its own")
    p.add_argument("--a_bit", type=cli.bits, default=4, help="target bit-width of activations; no effect in training")
    p.add_argument("--load_pretrained", default=None, metavar="FILE",
                   help='checkpoint to start from, or "" for scratch; as many classes of other names will do '
                   f"(default: {PRETRAINED} for PSG on ResNet32 and cifar100, else scratch)")
    p.add_argument("--resume_epoch", type=cli.count, metavar="N", help="first epoch (default: the checkpoint's + 1)")
    p.add_argument("--epoch", type=cli.count, default=150, help="number of the last epoch")
    p.add_argument("--lr", type=cli.positive, default=0.01, help="initial learning rate; use 1e-4 with --adam 1")
    p.add_argument("--decay_epoch", type=cli.count, nargs="*", default=[123], metavar="N",
                   help="epochs, after the first of the run, from which the learning rate is a tenth of before")
    p.add_argument("--adam", type=int, choices=[0, 1], default=0,
                   help="1: Adam; with PSG on its gradients the rate is multiplied by 0.01 * lambda_s, as published")
    p.add_argument("--w_decay", type=cli.non_negative, default=None, help="L2 (default: 1e-4, or 0 with PSG at 2 bits)")
    p.add_argument("--l1", type=cli.non_negative, default=0.0, metavar="W",
                   help="adds W times the sum of the weights' magnitudes to the loss; scaled with the update alone")
    p.add_argument("--grad_l1", type=cli.non_negative, default=0.0, metavar="W",
                   help="adds W times the sum of the magnitudes of the weights' gradients to the loss")
    p.add_argument("--batch_size", type=cli.count, default=128, help="images a step, of all processes together")
    p.add_argument("--exp_name", default=None,
                   help="run folder, under runs/ (default: data set and goal, as cifar100/4bits, digits/sparse90, or "
                   "cifar10/vanilla with --psg 0)")
    p.add_argument("--resume", action="store_true", help="go on with the run in runs/<exp_name>")
    p.add_argument("--save_epochs", type=cli.epochs, action=cli.EpochSet, nargs="*", default=[], metavar="N",
                   help="epochs to keep a file of, as 82 or 103-150")
    p.add_argument("--cu_num", type=cli.index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of the forward and backward pass; auto: bf16 where the device is fast at it")
    p.add_argument("--cuda_graph", type=int, choices=[0, 1], default=1, help="1: on a GPU, a step is one CUDA graph")
    p.add_argument("--compile", type=int, choices=[0, 1], default=0, help="1: torch.compile the network for training")
    p.add_argument("--deterministic", action="store_true", help="deterministic algorithms alone")
    # fmt: on
    return p


def parse() -> tuple[Namespace, RunFolder | None]:
    """The settings, and the folder to go on in; a resumed run's settings are its own."""
    args = parser().parse_args()
    if args.exp_name is None:
        resolve_target(args)
        args.exp_name = default_exp_name(args)
    if not args.resume:
        if args.load_pretrained is None:
            as_published = args.psg and args.arch == "ResNet32" and args.dataset == "cifar100"
            args.load_pretrained = PRETRAINED if as_published else ""
        resolve_target(args)
        if args.weights and args.load_pretrained:
            raise UserError(f"--weights {args.weights} and --load_pretrained {args.load_pretrained}: choose one")
        if args.w_decay is None:
            args.w_decay = 0.0 if args.psg and args.w_bit == 2 else 1e-4
        return args, None
    folder, exp_name = RunFolder.reopen(args.exp_name), args.exp_name
    again = parser()
    saved = vars(again.parse_args([])) | folder.latest_args()  # a flag that came later is at its default
    again.set_defaults(**saved)
    args = again.parse_args()
    args.exp_name = exp_name
    if args.precision == "auto":  # what it was resolved to when the run began
        args.precision = saved["precision"]
    changed = [key for key, value in saved.items() if key not in FREE_ON_RESUME and getattr(args, key) != value]
    if changed:
        told = ", ".join(f"--{key} {getattr(args, key)} (was {saved[key]})" for key in changed)
        raise UserError(f"{folder.path} was begun with other settings: {told}; leave them out or start a new run")
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


def build_goal(args: Namespace):
    """What the weights are trained for."""
    from quant import GridGoal, SparseGoal

    if args.target == "zero":
        return SparseGoal(args.sparsity, bool(args.first_last_quant))
    return GridGoal(args.w_bit, bool(args.first_last_quant), per_channel=args.granularity == "channel")


def build_optimizer(args: Namespace, model, goal, device):
    """SGD with momentum or Adam, inside PSGD with --psg 1."""
    import torch

    from quant import PSGD, auto_lambda_s, penalise_l1

    groups = goal.param_groups(model) if args.psg else model.parameters()
    try:
        lambda_s = auto_lambda_s(groups) if args.lambda_s == "auto" and args.psg else args.lambda_s
    except ValueError as error:
        raise UserError(f"--lambda_s auto: {error}") from None
    lr = args.lr * (0.01 * lambda_s if args.adam and args.psg and args.psg_acts_on == "gradient" else 1)
    common = {"lr": lr, "weight_decay": args.w_decay, "fused": device.type in ("cpu", "cuda")}
    base = torch.optim.Adam(groups, **common) if args.adam else torch.optim.SGD(groups, momentum=0.9, **common)
    penalise_l1(base, model, args.l1, bool(args.first_last_quant))
    return PSGD(base, lambda_s, args.eps, args.psg_acts_on) if args.psg else base


def described(args: Namespace, goal, optimizer) -> str:
    """From where, for what and how: for the log."""
    start = f"torchvision's weights {args.weights}" if args.weights else args.load_pretrained or "scratch"
    auto = "auto, now " if args.lambda_s == "auto" else ""
    method = f"PSG for {goal.name}, lambda_s {auto}{optimizer.param_groups[0]['lambda_s']:g}" if args.psg else "no PSG"
    method += f" on the {args.psg_acts_on}" if args.psg else ""
    method += "".join(f", {flag} {getattr(args, flag):g}" for flag in ("l1", "grad_l1") if getattr(args, flag))
    why = " (as published at 2 bits; --w_decay overrides)" if args.psg and args.w_bit == 2 and not args.w_decay else ""
    return f"from {start}, {method}, weight decay {args.w_decay:g}{why}"


def main() -> None:
    args, folder = parse()

    import torch

    from quant import gradient_penalty, steer_lambda_s
    from utils import checkpoint as checkpoints
    from utils.data import check_files, load_dataset, train_batches
    from utils.device import machine, resolve_precision, select_device, set_deterministic
    from utils.distributed import join, leave, own_device
    from utils.engine import NonFiniteError, check_moves, check_takes, evaluate_goal
    from utils.pairing import matched
    from utils.signals import StopRequest
    from utils.training import Training

    device, device_line = select_device(*own_device(args.device, args.cu_num))
    world = join(device)
    if folder and world.is_main:
        folder.lock()
    args.precision = resolve_precision(args.precision, device)
    if args.deterministic:
        set_deterministic()
    torch.manual_seed(args.seed)

    # Everything that can be wrong is looked at before the run folder is made, files before downloads.
    checkpoints.known_arch(args.arch)
    start = folder.last_checkpoint if folder else args.load_pretrained
    source = checkpoints.load_checkpoint(start) if start else {}
    pretrained = None if folder else source
    with world.main_first():
        dataset = load_dataset(args.dataset, args.data_dir, device, args.workers)
    dataset = matched(dataset, source, start, transfer=not folder)
    train_split, eval_split, eval_name = dataset.splits(args.val_split)
    num_classes = len(dataset.classes)
    first_epoch = args.resume_epoch = args.resume_epoch or (pretrained or {}).get("epoch", 0) + 1
    if pretrained:
        model = checkpoints.model_from_checkpoint(pretrained, args.load_pretrained, args.arch, num_classes)
    else:
        with world.main_first():
            model = checkpoints.new_model(args.arch, num_classes, args.weights if not folder else None)
    if args.epoch < first_epoch:
        raise UserError(f"--epoch {args.epoch} is before the first epoch, {first_epoch}: nothing to train")
    batches = train_batches(train_split, dataset.spec, args.batch_size, args.seed, world)
    if min(batches.sizes[-1], len(eval_split)) < world.size:
        raise UserError(f"{world.size} processes: a step or the evaluation has fewer images")
    if args.grad_l1 and (world.size > 1 or args.compile):
        raise UserError("--grad_l1 differentiates twice: it needs a single process, and --compile 0")
    model.to(device, memory_format=torch.channels_last)
    check_takes(model, args.arch, dataset.spec.size, batches.sizes[-1] // world.size)
    if args.psg and not args.eps and not folder:
        check_moves(model, bool(args.first_last_quant))
    goal = build_goal(args)
    optimizer = build_optimizer(args, model, goal, device)
    decays = [epoch for epoch in args.decay_epoch if epoch > first_epoch]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epoch - first_epoch for epoch in decays], gamma=0.1)
    begun = folder.settings()["args"] if folder else vars(args)
    steer_epochs = min([*decays, begun["epoch"] + 1]) - first_epoch  # not by the --epoch of a resume

    done, last_good = first_epoch - 1, args.load_pretrained or "none"
    if folder:
        done = checkpoints.load_run(source, folder.last_checkpoint, model, optimizer, scheduler)
        if done >= args.epoch:
            print(f"{folder.path} has all {done} epochs: nothing left to do (a larger --epoch goes on)")
            return leave(world)
        last_good = folder.last_checkpoint
    check_files(train_split, eval_split, world)
    facts = {"torch": torch.__version__, "device": str(device), "machine": machine(device), "processes": world.size}
    if world.is_main:
        if folder:
            folder.note_resume(done, **{key: getattr(args, key) for key in KEPT_BY_RESUMES}, **facts)
        else:
            folder = RunFolder.create(args.exp_name)
            args.exp_name = folder.exp_name
            folder.write_settings({"args": vars(args), "command": command_line(), "commit": git_commit(), **facts})
        folder.start_logging(after_epoch=done)
        shared = f" on {world.size} processes" if world.size > 1 else ""
        print(f"{device_line}{shared}, precision: {args.precision}, run folder: {folder.path}")
    print(f"{args.arch} on {args.dataset} {described(args, goal, optimizer)}")
    print(f"epochs {done + 1} to {args.epoch}; accuracy is on the {len(eval_split)} {eval_name} images", flush=True)

    penalty = gradient_penalty(model, args.grad_l1, bool(args.first_last_quant))
    use_graph, stop = bool(args.cuda_graph) and not args.deterministic, StopRequest()
    training = Training(model, optimizer, batches, args.precision, penalty, world, use_graph, stop, bool(args.compile))
    stop.advice = "no epoch is whole yet: the same command begins anew"
    for epoch in range(done + 1, args.epoch + 1):
        started = time.perf_counter()
        if epoch > first_epoch:
            stop.advice = f"python train.py --exp_name {args.exp_name} --resume goes on after its last whole epoch"
        # Dropout of an epoch, like its batches, comes from (seed, epoch) alone, and differs between processes.
        torch.manual_seed(args.seed * 2**20 + epoch + world.rank * 2**52)
        lr, loop = optimizer.param_groups[0]["lr"], training.loop
        try:
            trained = training.epoch(epoch, f"epoch {epoch}/{args.epoch}")
            trained_at = time.perf_counter()
            row = {"epoch": epoch, "lr": lr, "train_loss": trained.loss, "train_top1": trained.top1}
            row |= evaluate_goal(model, goal, eval_split, dataset.spec, world)
        except NonFiniteError as error:
            raise UserError(
                f"{error} of epoch {epoch}; last good checkpoint: {last_good}; try a smaller --lr or --lambda_s"
            ) from None
        if epoch == done + 1 or training.loop != loop:
            print(f"step: {training.loop}", flush=True)
        scheduler.step()
        if args.lambda_s == "auto" and args.psg:
            row["lambda_s"] = optimizer.param_groups[0]["lambda_s"]
            steer_lambda_s(optimizer, row["grid_share"], (epoch - first_epoch + 1) / steer_epochs, row["train_loss"])
        row |= {"train_seconds": trained_at - started, "eval_seconds": time.perf_counter() - trained_at}
        if not world.is_main:
            continue
        folder.log(row)
        checkpoint = {
            "epoch": epoch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(), "arch": args.arch, "num_classes": num_classes,
            "classes": dataset.classes, "args": vars(args), "metrics": row,
        }  # fmt: skip
        if epoch in args.save_epochs:
            checkpoints.save_checkpoint(folder.path / f"epoch_{epoch}.pth", checkpoint)
        checkpoints.save_checkpoint(folder.last_checkpoint, checkpoint)
        last_good = folder.last_checkpoint
        near = f"on grid {100 * row['grid_share']:.1f} %  " if "grid_share" in row else ""
        print(
            f"epoch {epoch:3d}  lr {lr:.4g}  loss {trained.loss:.4f}  train {trained.top1:.2f}  "
            f"FP {row['fp_top1']:.2f}  {goal.name} {row[f'{goal.name.lower()}_top1']:.2f}  {near}"
            f"{row['train_seconds']:.1f} + {row['eval_seconds']:.1f} s",
            flush=True,
        )
    leave(world)


if __name__ == "__main__":
    run(main)
