"""tools.benchmark_distributed as a user runs it, on a network that is small enough for a test."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import read_csv


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(torch.__version__ < "2.7", reason="2.6's FSDP2 needs a GPU")
def test_processes_train_as_one(tmp_path):
    flags = ["--layers", "1", "--width", "16", "--rounds", "1", "--csv", str(tmp_path / "rows.csv")]
    command = [sys.executable, "-m", "tools.benchmark_distributed", *flags]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
    rows = read_csv(tmp_path / "rows.csv")
    kinds = itertools.product(("DDP", "FSDP2"), ("SGD", "AdamW"), ("", "tensor", "channel"))
    assert [(row["wrap"], row["optimizer"], row["grid"]) for row in rows] == [*kinds]
    for row in rows:  # Adam divides by gradients, of which some are little more than rounding
        assert float(row["difference"]) < {"SGD": 1e-3, "AdamW": 0.3}[row["optimizer"]], row
        assert float(row["step_ms"]) > 0
    assert json.loads((tmp_path / "rows.json").read_text())["rounds"] == 1
