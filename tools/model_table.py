"""models/README.md: a row for each shipped checkpoint, from the checkpoints and from the rows of eval.py in results/.

python -m tools.model_table
"""

from pathlib import Path
from typing import Any

from utils.checkpoint import grid_of, load_checkpoint, training_facts
from utils.cli import Parser, UserError, as_typed, run
from utils.files import markdown_table, write_page
from utils.results import read_results

KINDS = ("weights", "sparse")  # folders of results/ that have the rows of the shipped files
Setting = tuple[str, str, int, float]  # path of the file, granularity, bit-width (32: float), share of zeros
HEADS = ["file", "trained by", "for", "lambda_s", "a grid for each", "from", "epoch", "float", "at the target",
         "batch norm re-estimated", "bytes"]  # fmt: skip
INTRODUCTION = """# Shipped networks

ResNet-32 for CIFAR-100. Top-1 is in percent, on the test set, as trained (n = 1); its rows are in
[results](../results/README.md). The settings are those of a file's last stage, and "from" is the checkpoint that the
stage started from. `python -m tools.average` re-estimates batch norm on training images, with the weights quantized or
pruned to the target.

`sha256sum -c SHA256SUMS` in this folder checks the files. This page is made by `python -m tools.model_table`.
"""


def figures(results: Path) -> dict[Setting, float]:
    """Top-1 by file and setting, of the rows without a post-training method in `results`/weights and `results`/sparse.

    Raises UserError if two rows differ.
    """
    found: dict[Setting, float] = {}
    for path in sorted(path for kind in KINDS for path in (results / kind).rglob("results.csv")):
        for row in read_results([path]):
            if row["post"] == "none" and row.get("prune") != "layer" and row["a_bit"] == "32":
                setting = (row["model"], row["granularity"], int(row["w_bit"]), float(row.get("sparsity") or 0))
                known = found.setdefault(setting, float(row["top1"]))
                if known != float(row["top1"]):
                    raise UserError(f"{path} has {row['top1']} for {told(*setting)}, another file has {known:g}")
    return found


def told(model: str, granularity: str, bits: int, zeros: float) -> str:
    """A setting in words."""
    return f"{model}, granularity {granularity}, {bits} bits, sparsity {zeros:g}"


def goal_of(args: dict[str, Any]) -> tuple[str, int, float]:
    """What a network was trained for: in words, its bit-width (32: float), and its share of zeros."""
    if args.get("target") == "zero":
        return f"{100 * args['sparsity']:g} % zeros", 32, args["sparsity"]
    return (f"{args['w_bit']} bits", args["w_bit"], 0.0) if args["psg"] else ("", 32, 0.0)


def row_of(path: Path, known: dict[Setting, float]) -> tuple[tuple[float, int, str], list[str]]:
    """What the row of the checkpoint `path` is sorted by, and its cells. Raises UserError if `known` lacks a figure."""
    checkpoint = load_checkpoint(path)
    args, facts = checkpoint.get("args", {}), training_facts(checkpoint)
    if not facts["trained"]:
        raise UserError(f"{path} does not say how it was trained: move it out of {path.parent}")
    goal, bits, zeros = goal_of(args)
    granularity = "channel" if grid_of(checkpoint, 4).per_channel else "tensor"

    def top1(bits: int, zeros: float) -> str:
        setting = (f"models/{path.name}", granularity, bits, zeros)
        if setting not in known:
            raise UserError(f"no results.csv has {told(*setting)}: evaluate it with eval.py --out")
        return f"{known[setting]:.2f}"

    on_grid = bits < 32
    cells = [
        f"[{path.name}]({path.name})",
        facts["trained"].partition(" ")[0] + (" with L1" if args.get("l1") else ""),
        goal,
        as_typed(args["lambda_s"]) if args["psg"] else "",
        granularity if on_grid else "",
        (args["load_pretrained"] or "scratch").removeprefix("models/"),
        facts["epoch"],
        top1(32, 0.0),
        top1(bits, zeros) if goal else "",
        "yes" if checkpoint.get("averaged_epochs") else "no",
        f"{path.stat().st_size:,}",
    ]
    return (zeros, -bits, path.name), cells


def page(models: Path, results: Path) -> str:
    """The whole of models/README.md, for the .pth files in `models`."""
    known = figures(results)
    rows = sorted(row_of(path, known) for path in models.glob("*.pth"))
    return INTRODUCTION + "\n" + markdown_table(HEADS, [cells for _, cells in rows])


def parser() -> Parser:
    p = Parser(__doc__ or "")
    p.add_argument("--models", default="models", metavar="DIR", help="folder of the checkpoints")
    p.add_argument("--results", default="results", metavar="DIR", help="folder of the results")
    p.add_argument("--out", default="models/README.md", metavar="FILE", help="file to write")
    return p


def main() -> None:
    args = parser().parse_args()
    write_page(args.out, lambda: page(Path(args.models), Path(args.results)))


if __name__ == "__main__":
    run(main)
