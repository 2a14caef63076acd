"""A character GPT with AdamW and PSG on its update: nanoGPT's network on Shakespeare, cut to 4, 3 and 2 bits.

    pip install .
    python examples/character_gpt.py --data input.txt                  # AdamW, and PSG on its update for 4 bits
    python examples/character_gpt.py --data input.txt --size large     # on a GPU
    python examples/character_gpt.py --data input.txt --arm adamw gradient update ste --bits 4 3 2 --seed 1 2 3

90 % of the text is trained on, the rest validates. All arms have the first 60 % of the steps in common, AdamW's, whose
end the folder --out keeps for each seed. Beside it is results.csv, to which each arm adds a row. The arms of the rest:

    adamw           goes on
    gradient        PSG on the gradient, whose size AdamW divides out; lambda_s is 150 in place of "auto"
    update          PSG on AdamW's update, weight decay included
    update_outside  the same with the weight decay outside of the scaling
    ste             goes on with quantized weights in the forward pass and the straight-through gradient

AdamW's state goes on. PSG on the update has beta1 = 0 in the scaled groups, where momentum would repeat scaled steps,
and psg_eps = 1, which adds AdamW's own step to the scaled one: the network has yet to learn. PSG on the gradient
changes its size, so the state starts empty. Embedding and head share a table, scaled as the last layer, at 8 bits if
the others have fewer than 4. A row, a character's vector and an output channel, has one scale. Positions stay float.
"""

import argparse
import csv
import itertools
import json
import math
import time
import zlib
from pathlib import Path

import torch
from psgd import PSGD, Grid, describe, fake_quantize_weight, grid_share, layer_grids, psg_param_groups, quantize_weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu, pad, scaled_dot_product_attention

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SETTINGS = ["layers", "heads", "width", "context", "batch", "steps", "warmup", "dropout"]
SIZES = {"small": (4, 4, 128, 64, 12, 2000, 100, 0.0), "large": (6, 6, 384, 256, 64, 5000, 100, 0.2)}
ARMS = ["adamw", "gradient", "update", "update_outside", "ste"]
GRIDS = {bits: Grid(bits, per_channel=True, exclude="positions.weight") for bits in range(2, 9)}
MAX_LR, MIN_LR, BETAS, DECAY, CLIP = 1e-3, 1e-4, (0.9, 0.99), 0.1, 1.0

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--data", type=Path, required=True, metavar="FILE", help=f"the text: {SOURCE}")
p.add_argument("--arm", nargs="+", choices=ARMS, default=["adamw", "update"])
p.add_argument("--bits", nargs="+", type=int, choices=GRIDS, default=[4], help="targets; adamw has none, and one row")
p.add_argument("--seed", nargs="+", type=int, default=[1])
p.add_argument("--lambda_s", type=lambda word: word if word == "auto" else float(word), default="auto")
p.add_argument("--psg", type=json.loads, default={"psg_eps": 1.0}, metavar="JSON", help="of update's scaled groups")
p.add_argument("--psg_from", type=float, default=0.6, help="share of the steps that the arms have in common")
p.add_argument("--drop", type=float, default=1.0, help="factor of the learning rate in the arms' last quarter")
p.add_argument("--holdout", action="store_true", help="for choices: hold out 5 %% of the training text, validate on it")
p.add_argument("--out", type=Path, default=Path("runs/character_gpt"), metavar="DIR", help="for starts and rows")
p.add_argument("--device", default="cpu")
p.add_argument("--size", choices=SIZES, default="small", help="the defaults of the flags that follow")
for key, value in zip(SETTINGS, SIZES["small"]):
    p.add_argument(f"--{key}", type=type(value))
p.set_defaults(**dict(zip(SETTINGS, SIZES[p.parse_known_args()[0].size])))
args = p.parse_args()
first = round(args.psg_from * args.steps)  # step of the arms
if not args.data.is_file():
    p.exit(2, f"error: there is no file --data {args.data}: get {SOURCE}\n")
args.text = zlib.crc32(args.data.read_bytes())
codes = torch.tensor([*map(ord, args.data.read_text("utf-8"))], device=args.device)
characters, text = codes.unique(return_inverse=True)
cuts = (0.855, 0.9) if args.holdout else (0.9, 1)
train_text, held_text, _ = text.tensor_split([int(cut * len(text)) for cut in cuts])
if min(len(train_text), len(held_text)) <= args.context:
    p.exit(2, f"error: --data {args.data} has only {len(text)} characters, too few for a --context of {args.context}\n")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(args.width, bias=False) for _ in range(2))
        self.qkv, self.project, self.up, self.down = (
            nn.Linear(ins * args.width, outs * args.width, bias=False) for ins, outs in ((1, 3), (1, 1), (1, 4), (4, 1))
        )
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, args.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, None, args.dropout * self.training, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.down(gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(len(characters), args.width), nn.Embedding(args.context, args.width)
        self.dropout, self.blocks = nn.Dropout(args.dropout), nn.Sequential(*(Block() for _ in range(args.layers)))
        self.norm, self.head = nn.LayerNorm(args.width, bias=False), nn.Linear(args.width, len(characters), bias=False)
        self.head.weight = self.embed.weight
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                branch_end = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * args.layers if branch_end else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.embed(x) + self.positions.weight[: x.shape[1]])
        return self.head(self.norm(self.blocks(x)))


def adamw_of(model: nn.Module) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, MAX_LR, BETAS, weight_decay=DECAY)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, seed: int, ste: dict[str, Grid]) -> None:
    """Makes `steps`. The weights in `ste` are rounded to their grids in the forward pass."""
    places = torch.randint(len(train_text) - args.context, (args.steps, args.batch), generator=torch.manual_seed(seed))
    torch.manual_seed(seed + steps.start)  # of the dropout
    model.train()
    for step in steps:
        way = max(step - args.warmup, 0) / max(args.steps - args.warmup, 1)
        rate = MIN_LR + 0.5 * (1 + math.cos(math.pi * way)) * (MAX_LR - MIN_LR)
        rate *= args.drop if step >= first + 0.75 * (args.steps - first) else min((step + 1) / (args.warmup + 1), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
            for weight in group["params"] if "decay_outside" in group else ():
                weight.data.mul_(1 - group["lr"] * group["decay_outside"])
        windows = torch.stack([train_text[at : at + args.context + 1] for at in places[step].tolist()])
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
def validate(model: nn.Module) -> str:
    """Nats per character over all of the validation text, in windows side by side, of which the last may be short."""
    model.eval()
    rest = -(len(held_text) - 1) % args.context
    x = pad(held_text[:-1], (0, rest)).view(-1, args.context).split(32)
    y = pad(held_text[1:], (0, rest), value=-100).view(-1, args.context).split(32)  # -100 does not count
    total = sum(cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item() for a, b in zip(x, y))
    return f"{total / (len(held_text) - 1):.4f}"


def start_of(seed: int) -> dict:
    """The network and AdamW's state after the first part: from a file, or trained."""
    path, part = args.out / f"seed{seed}.pth", args.out / f"seed{seed}.tmp"
    settings = {key: getattr(args, key) for key in (*SETTINGS, "psg_from", "holdout", "text")}
    if not path.exists():
        torch.manual_seed(seed)
        optimizer = adamw_of(model := GPT().to(args.device))
        train(model, optimizer, range(first), seed, {})
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save({"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
        part.replace(path)
    start = torch.load(path, map_location=args.device, weights_only=True)
    if start["settings"] != settings:
        p.exit(2, f"error: {path} was made with {start['settings']}: name another --out\n")
    return start


def psgd_of(arm: str, model: nn.Module, before: torch.optim.AdamW, grid: Grid, lambda_s: float | str) -> PSGD:
    """PSGD around an AdamW that goes on where `before` is."""
    groups = psg_param_groups(before.param_groups, grid, model=model)
    if arm == "gradient":
        return PSGD(torch.optim.AdamW(groups), lambda_s)
    for group in [group for group in groups if "bits" in group]:
        group |= {"betas": (0.0, BETAS[1])} | args.psg
        if arm == "update_outside":
            group |= {"weight_decay": 0.0, "decay_outside": group["weight_decay"]}
    base = torch.optim.AdamW(groups)
    base.state.update(before.state)
    return PSGD(base, lambda_s, acts_on="update", steps=args.steps - first)


torch.set_flush_denormal(True)
for seed, bits, arm in itertools.product(args.seed, args.bits, args.arm):
    if arm == "adamw" and bits != args.bits[0]:
        continue  # it has no target
    grid, model, start, began = GRIDS[bits], GPT().to(args.device), start_of(seed), time.perf_counter()
    print(describe(model, grid))
    model.load_state_dict(start["model"])
    optimizer = adamw_of(model)
    optimizer.load_state_dict(start["optimizer"])
    row = {"arm": arm, "seed": seed, "bits": bits, "lambda_s": "", "psg": json.dumps(args.psg) * ("update" in arm)}
    if arm not in ("adamw", "ste"):
        row["lambda_s"] = 150.0 if arm == "gradient" and args.lambda_s == "auto" else args.lambda_s
        optimizer = psgd_of(arm, model, optimizer, grid, row["lambda_s"])
    train(model, optimizer, range(first, args.steps), seed, layer_grids(model, grid) if arm == "ste" else {})
    row |= {"drop": args.drop, "seconds": round(time.perf_counter() - began), "share": f"{grid_share(model, grid):.4f}"}
    row |= {"tau": f"{optimizer.pace().tau:.3f}" if "update" in arm else "", "float": validate(model)}
    row |= {f"w{width}": validate(quantize_weights(model, GRIDS[width])) for width in (8, 4, 3, 2)}
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    with open(args.out / "results.csv", "a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([row] * (file.tell() == 0) + [row.values()])
