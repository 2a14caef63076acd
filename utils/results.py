"""Reads the CSV files of eval.py, and tells which rows are of one network."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.cli import UserError, first_line

NAMED = ("trained", "epoch", "post")
SAME = (*NAMED, "arch", "dataset", "split", "weight_range", "granularity")  # the rows of one table cell agree in these
NEEDED = ("trained", "epoch", "post", "seed", "w_bit", "a_bit", "top1")
BIT_WIDTHS = ("w_bit", "a_bit")


def read_rows(path: str | Path, columns: Sequence[str], kind: str, numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file of `kind`. Raises UserError if it has no rows, lacks one of `columns`, or has a value that
    is not a number in the columns `numbers`, which it may lack."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); it should be a {kind}") from None
    missing = [name for name in columns if not rows or rows[0].get(name) is None]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]}: it is not a {kind}")
    check_numbers(path, rows, [name for name in numbers if name in rows[0]])
    return rows


def check_numbers(path: str | Path, rows: Sequence[dict[str, str]], names: Iterable[str]) -> None:
    """Raises UserError if one of the columns `names` has a value in `rows` of the file `path` that is not a number."""
    for name in names:
        for line, row in enumerate(rows, 2):
            try:
                float(row[name])
            except (TypeError, ValueError):
                raise UserError(f"{path}, line {line}: {name} is {row[name]!r} instead of a number") from None


def read_results(paths: Sequence[str | Path], numbers: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of results.csv files of eval.py, with bit-widths as whole numbers, whatever program wrote the file.

    `numbers` are columns that are needed beside those of a table. Raises UserError for another kind of file, and for a
    missing number.
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


def column_of(row: dict[str, str]) -> tuple[float, bool, int]:
    """Pruned share, whether layer by layer, and minus the bit-width: full precision sorts first."""
    return float(row.get("sparsity") or 0), row.get("prune") == "layer", -int(row["w_bit"])


def network_of(row: dict[str, str]) -> tuple[str, ...]:
    """What rows that differ only in the seed have in common."""
    return tuple(row.get(name, "") for name in SAME)


def distinct(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """`rows` without duplicates, such as from a second file; UserError if two networks look alike."""
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
