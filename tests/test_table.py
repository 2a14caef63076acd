"""tools.table: eval.py's results.csv as a table for people."""

import pytest

from tools.table import markdown
from utils.results import read_results

HEADER = "model,trained,seed,epoch,w_bit,a_bit,post,top1\n"


def test_seeds_are_one_cell_and_the_order_is_kept(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(
        HEADER
        + "a,SGD,1,150,32,32,none,69.5\na,SGD,1,150,4,32,none,50\n"
        + "b,PSGD W4,1,150,32,32,none,69\nb,PSGD W4,1,150,4,32,none,68\nb,PSGD W4,1,150,4,8,none,1\n"
        + "c,PSGD W4,2,150,4,32,none,69\nc,PSGD W4,2,150,4,32,bn_reestimate,70\n"
    )
    assert markdown(read_results([path])).splitlines() == [
        "| trained | epoch | after training | FP | W4 |",
        "| --- | --- | --- | --- | --- |",
        "| SGD | 150 | none | 69.50 | 50.00 |",
        "| PSGD W4 | 150 | none | 69.00 | 68.50 ± 0.71 (2) |",
        "| PSGD W4 | 150 | bn_reestimate |  | 70.00 |",
    ]


def test_two_networks_of_one_seed_are_no_seeds(rejected, tmp_path):
    (tmp_path / "x.csv").write_text(HEADER + "a,SGD,1,150,4,32,none,50\nb,SGD,1,150,4,32,none,60\n")
    assert "two networks are both SGD, seed 1: a and b; take them one by one" in rejected("tools.table", "x.csv")


def test_networks_that_differ_only_in_their_grids_are_told_apart(tmp_path):
    row = "a,SGD,1,150,4,32,none,{},{}\n".format
    header = HEADER.replace("top1", "granularity,top1")
    (tmp_path / "x.csv").write_text(header + row("tensor", 50) + row("channel", 60))
    (tmp_path / "y.csv").write_text(header + row("channel", 60))  # the same again
    assert markdown(read_results([tmp_path / "x.csv", tmp_path / "y.csv"])).splitlines() == [
        "| trained | epoch | after training | granularity | W4 |",
        "| --- | --- | --- | --- | --- |",
        "| SGD | 150 | none | tensor | 50.00 |",
        "| SGD | 150 | none | channel | 60.00 |",
    ]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x00\x01"])
def test_foreign_files(rejected, tmp_path, content):
    (tmp_path / "x.csv").write_text(content)
    assert "lacks the column trained: it is not a results.csv" in rejected("tools.table", "x.csv")


def test_missing_numbers(rejected, tmp_path):
    (tmp_path / "x.csv").write_text(HEADER + "a,SGD,1,150,4,32,none,50\nb,PSGD W4,1,150,4,32,none,\n")
    assert "x.csv, line 3: top1 is '' instead of a number" in rejected("tools.table", "x.csv")


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("w_bit", "4.5", "w_bit is 4.5 instead of a bit-width"),
        ("sparsity", "half", "line 2: sparsity is 'half' instead"),
    ],
)
def test_values_that_are_none(rejected, tmp_path, column, value, message):
    row = {"model": "a", "trained": "SGD", "seed": 1, "epoch": 150, "w_bit": 4, "a_bit": 32, "post": "none", "top1": 50}
    row |= {"sparsity": 0, column: value}
    (tmp_path / "x.csv").write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    assert message in rejected("tools.table", "x.csv")


def test_bit_widths_that_another_program_wrote_as_floats(tmp_path):
    (tmp_path / "x.csv").write_text(HEADER + "a,SGD,1,150,32.0,32.0,none,69\na,SGD,1,150,4.0,32.0,none,50\n")
    assert markdown(read_results([tmp_path / "x.csv"])).splitlines()[2] == "| SGD | 150 | none | 69.00 | 50.00 |"


def test_table_of_a_sweep(cli, digits_run):
    assert cli("eval.py", "--model_path", digits_run, "--w_bit", "8", "3", "--val_split", "16", "--out", "a").code == 0
    lines = cli("tools.table", "a/results.csv").out.splitlines()
    assert lines[0] == "| trained | epoch | after training | FP | W8 | W3 |" and lines[2].startswith(
        "| SGD | 3 | none |"
    )
