"""models/README.md is what the shipped checkpoints and results/ say."""

import shutil

import pytest
import torch

from tests.helpers import ROOT
from tools.model_table import page
from utils.checkpoint import load_checkpoint

PAGE = (ROOT / "models/README.md").read_text()
SHIPPED = sorted((ROOT / "models").glob("*.pth"))
HEADER = "model,granularity,w_bit,a_bit,post,top1,trained,epoch,seed,sparsity\n"


def rows():
    """The cells of each file's row, by the file's name."""
    table = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in PAGE.splitlines() if line[:3] == "| ["]
    assert all(len(cells) == 11 for cells in table)
    return {cells[0].partition("]")[0].strip("["): cells for cells in table}


def test_the_page_is_current():
    assert page(ROOT / "models", ROOT / "results") == PAGE, "run python -m tools.model_table"


def test_every_shipped_file_has_a_row_with_its_link_and_bytes():
    table = rows()
    sums = {line.split()[1] for line in (ROOT / "models/SHA256SUMS").read_text().splitlines()}
    assert table.keys() == {path.name for path in SHIPPED} == sums
    for path in SHIPPED:
        cells = table[path.name]
        assert cells[0] == f"[{path.name}]({path.name})"
        assert int(cells[-1].replace(",", "")) == path.stat().st_size


@pytest.mark.parametrize("name", ["W4_ResNet.pth", "W2_channel_ResNet.pth", "S90_ResNet.pth", "ResNet150.pth"])
def test_figures_are_those_that_the_training_logged(name):
    """Which evaluated some of them in bfloat16, hence a tenth of a point."""
    metrics = load_checkpoint(ROOT / "models" / name)["metrics"]
    _, _, goal, *_, full, low, renewed, _ = rows()[name]
    assert renewed == "no"
    assert float(full) == pytest.approx(metrics["fp_top1"], abs=0.1)
    logged = {"4 bits": "w4_top1", "2 bits": "w2_top1", "90 % zeros": "s90_top1", "": None}[goal]
    assert (float(low) == pytest.approx(metrics[logged], abs=0.1)) if logged else low == ""


@pytest.fixture
def small_project(tmp_path):
    """A 4-bit checkpoint on grids of channels, and rows of it."""
    args = {"psg": 1, "adam": 0, "w_bit": 4, "granularity": "channel", "lambda_s": 60.0, "load_pretrained": ""}
    (tmp_path / "models").mkdir()
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 7, "args": args}, tmp_path / "models/a.pth")
    (tmp_path / "results/weights/a").mkdir(parents=True)
    rows = ["channel,32,32,none,70", "tensor,4,32,none,1", "channel,4,32,none,69", "channel,4,8,none,2",
            "channel,4,32,bn_reestimate,3"]  # fmt: skip
    text = "".join(f"models/a.pth,{row},PSGD W4 channel,7,1,0\n" for row in rows)
    (tmp_path / "results/weights/a/results.csv").write_text(HEADER + text)
    return tmp_path


def test_a_row_has_the_figures_of_its_own_grid_as_trained(cli, small_project):
    assert cli("tools.model_table").code == 0
    row = (small_project / "models/README.md").read_text().splitlines()[-1]
    size = (small_project / "models/a.pth").stat().st_size
    start = "| [a.pth](a.pth) | PSGD | 4 bits | 60 | channel | scratch | 7 | 70.00 | 69.00 | no | "
    assert row == f"{start}{size:,} |"


def test_a_file_that_does_not_say_how_it_was_trained_is_refused(rejected, small_project):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, small_project / "models/b.pth")
    assert "models/b.pth does not say how it was trained" in rejected("tools.model_table")


def test_missing_and_contradictory_rows_are_refused(rejected, small_project):
    shutil.copytree(small_project / "results/weights/a", small_project / "results/sparse/b")
    other = small_project / "results/sparse/b/results.csv"
    other.write_text(other.read_text().replace("none,69", "none,68"))
    message = rejected("tools.model_table")
    assert "has 69 for models/a.pth, granularity channel, 4 bits, sparsity 0" in message and "68" in message
    shutil.rmtree(small_project / "results/sparse")
    only = small_project / "results/weights/a/results.csv"
    only.write_text(only.read_text().replace("channel,4,32,none", "channel,5,32,none"))
    message = rejected("tools.model_table")
    assert "no results.csv has models/a.pth, granularity channel, 4 bits, sparsity 0: evaluate it" in message
