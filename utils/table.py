"""A results table for people: trained networks down, bit-widths and sparsities across, top-1 in percent, mean and sd
over seeds.

    python -m utils.table results/cifar100/results.csv results/w3/results.csv

Rows of eval.py's results.csv that differ in the seed alone are one cell: their mean, with the standard deviation
(n - 1) and n where there are several. Rows with quantized activations are left out. Networks that are alike by name
get a column more, for what differs.
"""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.cli import Parser, UserError, first_line, run

NAMED = ("trained", "epoch", "post")
SAME = (*NAMED, "arch", "dataset", "split", "weight_range", "granularity")  # of one cell's rows
NEEDED = ("trained", "epoch", "post", "seed", "w_bit", "a_bit", "top1")
BIT_WIDTHS = ("w_bit", "a_bit")


def read_rows(path: str | Path, columns: Sequence[str], kind: str, numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file of `kind` that has `columns` and at least one row; else UserError, and also if a value in
    the columns `numbers`, where the file has them, is no number."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); it should be a {kind}") from None
    missing = [name for name in columns if not rows or rows[0].get(name) is None]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}: it is no {kind}")
    check_numbers(path, rows, [name for name in numbers if name in rows[0]])
    return rows


def check_numbers(path: str | Path, rows: Sequence[dict[str, str]], names: Iterable[str]) -> None:
    """Raises UserError if one of the columns `names` has a value in `rows` of the file `path` that is no number."""
    for name in names:
        for line, row in enumerate(rows, 2):
            try:
                float(row[name])
            except (TypeError, ValueError):
                raise UserError(f"{path}, line {line}: {name} is {row[name]!r} instead of a number") from None


def read_results(paths: Sequence[str | Path], numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of results.csv files of eval.py, bit-widths as whole numbers whatever program has written the file.

    `numbers` are columns that are needed beside those of a table. Raises UserError if a file is none, or a number is
    missing.
    """
    rows = []
    kind = "results.csv of eval.py --out DIR"
    for path in paths:
        for row in read_rows(path, (*NEEDED, *numbers), kind, (*BIT_WIDTHS, "top1", "sparsity", *numbers)):
            for name in BIT_WIDTHS:
                if not float(row[name]).is_integer():
                    raise UserError(f"{path}: {name} is {row[name]} instead of a bit-width")
                row[name] = str(int(float(row[name])))
            rows.append(row)
    return rows


def cell(values: list[float]) -> str:
    """Mean in two decimals; for several values with their standard deviation and number."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f} ({len(values)})"


def column_name(sparsity: float, by_layer: bool, minus_width: int) -> str:
    """FP, W4, "90 %", "90 % by layer W4", ..."""
    pruned = f"{100 * sparsity:g} %" + (" by layer" if by_layer else "") if sparsity else ""
    width = "" if minus_width == -32 else f"W{-minus_width}"
    return f"{pruned} {width}".strip() or "FP"


def column_of(row: dict[str, str]) -> tuple[float, bool, int]:
    """Pruned share, whether layer by layer, and minus the bit-width: sorted, full precision is the first."""
    return float(row.get("sparsity") or 0), row.get("prune") == "layer", -int(row["w_bit"])


def network_of(row: dict[str, str]) -> tuple[str, ...]:
    """What is the same in rows that differ in the seed alone."""
    return tuple(row.get(name, "") for name in SAME)


def distinct(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """`rows` without those that say again, in another file, what one has said; UserError if two networks look alike."""
    seen: dict[tuple, dict[str, str]] = {}
    for row in rows:
        known = seen.setdefault((network_of(row), row["seed"], row["a_bit"], column_of(row)), row)
        if known is not row:
            if (known.get("model"), known["top1"]) == (row.get("model"), row["top1"]):
                continue
            name = row["trained"] or "unnamed"
            raise UserError(
                f"two networks are both {name}, seed {row['seed']}: {known.get('model')} and {row.get('model')}; "
                "take them one by one"
            )
    return [*seen.values()]


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of `rows` in Markdown, networks in the order of their first row."""
    cells: dict[tuple[str, ...], dict[tuple, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in distinct(row for row in rows if row["a_bit"] == "32"):
        cells[network_of(row)][column_of(row)].append(float(row["top1"]))
    columns = sorted({column for by_column in cells.values() for column in by_column})
    names = [column_name(*column) for column in columns]
    own_names = len({key[: len(NAMED)] for key in cells}) == len(cells)
    told = [n for n in range(len(NAMED), len(SAME)) if not own_names and len({key[n] for key in cells}) > 1]
    heads = ["trained", "epoch", "after training", *(SAME[n] for n in told), *names]
    lines = [heads, ["---"] * len(heads)]
    for key, by_column in cells.items():
        figures = [cell(by_column[column]) if column in by_column else "" for column in columns]
        lines.append([*key[: len(NAMED)], *(key[n] for n in told), *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="results.csv of eval.py")
    print(markdown(read_results(p.parse_args().files)))


if __name__ == "__main__":
    run(main)
