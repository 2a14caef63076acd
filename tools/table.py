"""A results table for people: a row for each trained network, a column for each bit-width and sparsity, and in the
cells top-1 in percent.

    python -m tools.table results/weights/w4/results.csv results/weights/w3/results.csv

Rows of eval.py's results.csv that differ only in the seed are one cell: their mean, with the standard deviation
(n - 1) and n where there are several. Rows with quantized activations are left out. Networks with the same name get
another column, for what differs.
"""

import statistics
from collections import defaultdict

from utils.cli import Parser, run
from utils.files import markdown_table
from utils.results import NAMED, SAME, column_of, distinct, network_of, read_results

Column = tuple[float, bool, int]  # pruned share, whether layer by layer, and minus the bit-width


def cell(values: list[float]) -> str:
    """The mean to two decimals; of several values also their standard deviation and number."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f} ({len(values)})"


def column_name(sparsity: float, by_layer: bool, minus_width: int) -> str:
    """FP, W4, "90 %", "90 % by layer W4", ..."""
    pruned = f"{100 * sparsity:g} %" + (" by layer" if by_layer else "") if sparsity else ""
    width = "" if minus_width == -32 else f"W{-minus_width}"
    return f"{pruned} {width}".strip() or "FP"


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of `rows` in Markdown, networks in the order of their first row."""
    cells: dict[tuple[str, ...], dict[Column, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in distinct(row for row in rows if row["a_bit"] == "32"):
        cells[network_of(row)][column_of(row)].append(float(row["top1"]))
    columns = sorted({column for by_column in cells.values() for column in by_column})
    names = [column_name(*column) for column in columns]
    own_names = len({key[: len(NAMED)] for key in cells}) == len(cells)
    told = [n for n in range(len(NAMED), len(SAME)) if not own_names and len({key[n] for key in cells}) > 1]
    heads = ["trained", "epoch", "after training", *(SAME[n] for n in told), *names]
    lines = []
    for key, by_column in cells.items():
        figures = [cell(by_column[column]) if column in by_column else "" for column in columns]
        lines.append([*key[: len(NAMED)], *(key[n] for n in told), *figures])
    return markdown_table(heads, lines).rstrip("\n")


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", metavar="FILE", help="results.csv of eval.py")
    return p


def main() -> None:
    print(markdown(read_results(parser().parse_args().files)))


if __name__ == "__main__":
    run(main)
