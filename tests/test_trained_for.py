"""The warning about a file that is evaluated at bits that it was not trained for."""

import pytest

from quant import Grid
from tests.helpers import copy_with_args
from utils.trained_for import evaluation_mismatches

PSGD4 = {"psg": 1, "w_bit": 4, "target": "grid", "granularity": "tensor", "first_last_quant": 1}
PSGD2 = PSGD4 | {"w_bit": 2}
RENEWED = {"averaged_epochs": [3, 3]}


@pytest.mark.parametrize("checkpoint, grids, message", [
    ({"args": PSGD4}, [Grid(4)], None),
    ({"args": PSGD4}, [Grid(32)], None),
    ({"args": PSGD4}, [Grid(8), Grid(4), Grid(3)], "it was trained for W4; at W8, W3 its weights are off their grid"),
    ({"args": PSGD4 | {"psg": 0}}, [Grid(2)], None),  # a baseline
    ({"args": PSGD4 | {"target": "zero", "w_bit": None}}, [Grid(4)], None),
    ({}, [Grid(2)], None),
    ({"args": PSGD4}, [Grid(4, per_channel=True)], "it was trained with a grid for each tensor"),
    ({"args": PSGD4}, [Grid(4, first_last=False)], "it was trained with --first_last_quant 1"),
    ({"args": PSGD2} | RENEWED, [Grid(2)], "its batch norm was re-estimated at W2; in float it may fail"),
    ({"args": PSGD2} | RENEWED | {"deployed": {"w_bit": 32}}, [Grid(2)], None),
    ({"args": PSGD4} | RENEWED, [Grid(4)], None),
    ({"args": PSGD2} | RENEWED, [Grid(4)],
     "it was trained for W2; at W4 its weights are off their grid; its batch norm was re-estimated at W2"),
    ({"args": PSGD4 | {"psg": 0, "method": "lsq"}}, [Grid(4)], "grids of learned steps, which these grids are not"),
    ({"args": PSGD4 | {"psg": 0, "method": "lsq"}}, [Grid(32)], None),
    ({"args": PSGD4 | {"psg": 0, "method": "ste"}}, [Grid(4)], None),
])  # fmt: skip
def test_what_a_file_is_not_for(checkpoint, grids, message):
    found = evaluation_mismatches(checkpoint, grids)
    assert (message in "; ".join(found)) if message else found == []


def test_eval_warns_once_for_each_file(cli, tmp_path, digits_run):
    for name, args in (("a", {}), ("b", PSGD2), ("c", PSGD4)):
        copy_with_args(digits_run, tmp_path / f"{name}.pth", **args)
    outcome = cli("eval.py", "--model_path", "a.pth", "b.pth", "c.pth", "c.pth", "--w_bit", "4", "3")
    assert outcome.code == 0
    assert outcome.err.splitlines() == [
        "warning: b.pth: it was trained for W2; at W4, W3 its weights are off their grid",
        "warning: c.pth: it was trained for W4; at W3 its weights are off their grid",
    ]
