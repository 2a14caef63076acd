"""A character GPT with AdamW and PSG on its update: nanoGPT's network on Shakespeare, cut to 4, 3 and 2 bits.

    pip install .
    python examples/character_gpt.py --data input.txt                      # AdamW, then PSG on the update for 4 bits
    python examples/character_gpt.py --data input.txt --size large         # nanoGPT's GPU settings
    python examples/character_gpt.py --data input.txt --arm adamw gradient update update_outside ste \
        --bits 4 3 2 --seed 1 2 3 --start runs/gpt --out runs/gpt/results.csv

The text is karpathy's char-rnn/data/tinyshakespeare/input.txt: 90 % to train on, then 10 % to validate on. The first
60 % of the steps are AdamW's in all arms and are computed once for each seed; --start DIR keeps them. Then

    adamw           goes on
    gradient        PSG on the gradient, which AdamW normalizes (lambda_s a number: 150 in place of "auto")
    update          PSG on AdamW's update, weight decay included
    update_outside  the same, with the weight decay outside of the scaling
    ste             AdamW through the quantized weights, with the straight-through gradient

AdamW's state goes on too, with two exceptions. PSG on the update sets beta1 to 0 in the scaled groups, where momentum
would repeat scaled steps. PSG on the gradient changes the size of the gradients and starts with an empty state.
Embedding and head share their table. A row of it is a character's vector and an output channel of the head, so it has
one scale, and PSG scales it as the last layer (8 bits below 4). The positions are only added: they stay float.
"""

import argparse
import csv
import itertools
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from psgd import PSGD, Grid, fake_quantize_weight, grid_share, layer_grids, psg_param_groups, quantize_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

SIZES = {
    "small": {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "steps": 2000, "dropout": 0.0},
    "large": {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 64, "steps": 5000, "dropout": 0.2},
}
ARMS = ["adamw", "gradient", "update", "update_outside", "ste"]
MAX_LR, MIN_LR, DECAY, BETAS, CLIP = 1e-3, 1e-4, 0.1, (0.9, 0.99), 1.0
WIDTHS = (8, 4, 3, 2)
SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward, without biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.dropout.p if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, dropout_p=dropped, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self, characters: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, args.width)
        self.positions = nn.Embedding(args.context, args.width)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.Sequential(*[Block(args.width, args.heads, args.dropout) for _ in range(args.layers)])
        self.norm = nn.LayerNorm(args.width, bias=False)
        self.head = nn.Linear(args.width, characters, bias=False)
        self.head.weight = self.characters.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                ends_branch = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * args.layers if ends_branch else 1))

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(self.dropout(x))))


def grid_at(bits: int) -> Grid:
    return Grid(bits, per_channel=True, exclude="positions.weight")


class Data(NamedTuple):
    train: Tensor
    held: Tensor
    characters: int


def stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read(args: argparse.Namespace) -> Data:
    """The text as indices of its characters: 90 % and 10 %. With --holdout the last 5 % of the 90 % are held out."""
    if not args.data.is_file():
        stop(f"--data {args.data} is no file: get {SOURCE}")
    text = args.data.read_text(encoding="utf-8")
    index = {character: number for number, character in enumerate(sorted(set(text)))}
    indices = torch.tensor([index[character] for character in text])
    ends = [int(0.9 * len(text)), len(text)]
    if args.holdout:
        ends = [int(0.95 * ends[0]), ends[0]]
    if min(ends[0], ends[1] - ends[0]) <= args.context:
        stop(f"--data {args.data} has only {len(text)} characters: windows of {args.context} need more")
    return Data(indices[: ends[0]], indices[ends[0] : ends[1]], len(index))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1]}
    vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], MAX_LR, BETAS, weight_decay=DECAY)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    if step < args.warmup:
        return MAX_LR * (step + 1) / (args.warmup + 1)
    way = (step - args.warmup) / (args.steps - args.warmup)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * way)) * (MAX_LR - MIN_LR)


def train(model, optimizer, text: Tensor, steps: range, seed: int, args, ste: dict[str, Grid]) -> None:
    """Makes `steps`. The weights in `ste` are on their grids in the forward pass."""
    places = torch.randint(
        len(text) - args.context, (args.steps, args.batch), generator=torch.Generator().manual_seed(seed)
    )
    torch.manual_seed(seed + steps.start)  # of dropout: the same after a start from a file
    model.train()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        windows = torch.stack([text[place : place + args.context + 1] for place in places[step]]).to(args.device)
        rounded = {name: fake_quantize_weight(model.get_parameter(name), own) for name, own in ste.items()}
        scores = functional_call(model, rounded, windows[:, :-1])
        loss = cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def nats(model: nn.Module, text: Tensor, args: argparse.Namespace) -> float:
    """Mean loss over all characters of `text` except the first, in windows side by side; the last one may be short."""
    model.eval()
    inputs, targets, total = text[:-1].to(args.device), text[1:].to(args.device), 0.0
    whole = len(inputs) // args.context * args.context
    batches = zip(*(part[:whole].view(-1, args.context).split(128) for part in (inputs, targets)))
    for x, y in [*batches, (inputs[None, whole:], targets[None, whole:])]:
        if x.numel():
            total += cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / len(inputs)


def start_of(seed: int, data: Data, args: argparse.Namespace) -> dict:
    """The network and AdamW's state after the first part, from --start or trained."""
    settings = {name: getattr(args, name) for name in (*SIZES["small"], "warmup", "psg_from")}
    settings |= {"seed": seed, "characters": len(data.train)}
    path = args.start / f"seed{seed}.pth" if args.start else None
    if path and path.exists():
        start = torch.load(path, map_location=args.device, weights_only=True)
        if start["settings"] != settings:
            stop(f"{path} was made with {start['settings']}: name another --start")
        return start
    torch.manual_seed(seed)
    model = GPT(data.characters, args).to(args.device)
    optimizer = adamw(model)
    train(model, optimizer, data.train, range(args.first), seed, args, {})
    start = {"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(start, path)
    return start


def psg(arm: str, model: nn.Module, before: torch.optim.AdamW, grid: Grid, lambda_s: float | str, args) -> PSGD:
    """PSGD around an AdamW that goes on where `before` is, as the head of this file says."""
    update = arm != "gradient"
    groups = psg_param_groups(before.param_groups, grid, model=model)
    for group in groups:
        if "bits" in group and update:
            group |= {"betas": (args.beta1, BETAS[1]), "tau_end": args.tau_end, "noise_limit": args.noise_limit}
    base = torch.optim.AdamW(groups)
    if not update:
        return PSGD(base, lambda_s)
    base.state.update(before.state)
    optimizer = PSGD(base, lambda_s, acts_on="update", steps=args.steps - args.first)
    if arm == "update_outside":
        scaled = [group for group in base.param_groups if "bits" in group]
        decays = [group["weight_decay"] for group in scaled]
        for group in scaled:
            group["weight_decay"] = 0.0

        def shrink(*_) -> None:
            for group, decay in zip(scaled, decays):
                torch._foreach_mul_(group["params"], 1 - group["lr"] * decay)

        optimizer.register_step_pre_hook(torch.no_grad()(shrink))
    return optimizer


def stage(arm: str, bits: int, seed: int, data: Data, args: argparse.Namespace) -> dict:
    """Trains one arm from its start. Returns its row."""
    start, began, grid = start_of(seed, data, args), time.perf_counter(), grid_at(bits)
    model = GPT(data.characters, args).to(args.device)
    model.load_state_dict(start["model"])
    optimizer = adamw(model)
    optimizer.load_state_dict(start["optimizer"])
    lambda_s, told = "", dict.fromkeys(("beta1", "tau_end", "noise_limit", "tau"), "")
    if arm not in ("adamw", "ste"):
        lambda_s = 150.0 if (arm, args.lambda_s) == ("gradient", "auto") else args.lambda_s
        optimizer = psg(arm, model, optimizer, grid, lambda_s, args)
    grids = layer_grids(model, grid)
    scaled = {id(model.get_parameter(name)) for name in grids}
    left = [name for name, weight in model.named_parameters() if id(weight) not in scaled]
    print(f"{arm}, {bits} bits, seed {seed}; the shared table has {grids['head.weight'].bits} bits; "
          f"left alone: {', '.join(left)}")  # fmt: skip
    train(model, optimizer, data.train, range(args.first, args.steps), seed, args, grids if arm == "ste" else {})
    if "update" in arm:
        told = {name: getattr(args, name) for name in ("beta1", "tau_end", "noise_limit")}
        told["tau"] = f"{optimizer.pace().tau:.3f}"
    losses = {"float": nats(model, data.held, args)}
    losses |= {f"w{width}": nats(quantize_weights(model, grid_at(width)), data.held, args) for width in WIDTHS}
    return {
        "arm": arm, "seed": seed, "bits": "" if arm == "adamw" else bits, "lambda_s": lambda_s,
        **{name: f"{loss:.4f}" for name, loss in losses.items()},
        "grid_share": f"{grid_share(model, grid):.4f}", **told, "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, metavar="FILE", help="the text")
    p.add_argument("--arm", nargs="+", choices=ARMS, default=["adamw", "update"])
    p.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), default=[4], help="targets; adamw has none")
    p.add_argument("--seed", nargs="+", type=int, default=[1])
    p.add_argument("--lambda_s", type=lambda word: word if word == "auto" else float(word), default="auto")
    p.add_argument("--psg_from", type=float, default=0.6, help="share of the steps that all arms have in common")
    p.add_argument("--beta1", type=float, default=0.0, help="of the scaled groups, with PSG on the update")
    p.add_argument("--tau_end", type=float, default=10.0)
    p.add_argument("--noise_limit", type=float, default=0.1)
    p.add_argument("--holdout", action="store_true", help="hold out the end of the training text, for choices")
    p.add_argument("--start", type=Path, metavar="DIR", help="keeps the shared first part of each seed")
    p.add_argument("--out", type=Path, metavar="CSV", help="rows are appended to it")
    p.add_argument("--device", default="cpu")
    p.add_argument("--size", choices=SIZES, default="small", help="sets the defaults of the flags that follow")
    p.add_argument("--warmup", type=int, default=100, help="steps")
    for name, value in SIZES["small"].items():
        p.add_argument(f"--{name}", type=type(value))
    p.set_defaults(**SIZES[p.parse_known_args()[0].size])
    args = p.parse_args()
    args.first = round(args.psg_from * args.steps)
    return args


def main() -> None:
    args = parse()
    torch.set_flush_denormal(True)
    data = read(args)
    for seed, bits, arm in itertools.product(args.seed, args.bits, args.arm):
        if arm == "adamw" and bits != args.bits[0]:
            continue
        row = stage(arm, bits, seed, data, args)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if args.out:
            new = not args.out.exists()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([row] * new + [row.values()])


if __name__ == "__main__":
    main()
