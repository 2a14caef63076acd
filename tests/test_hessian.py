"""tools.hessian against torch's own Hessian and eigenvalues, and its command."""

import csv
import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import vector_to_parameters

import tools.hessian
from quant import grid_share, quantize_weights
from tools.hessian import exact_eigenvalues, hessian_product, lanczos, small_network
from utils.data.in_memory import normalize
from utils.data.load import load_dataset
from utils.training.evaluation import evaluate


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))

    def loss(*parameters):
        names = [name for name, _ in model.named_parameters()]
        outputs = torch.func.functional_call(model, dict(zip(names, parameters)), (images,))
        return cross_entropy(outputs, labels)

    parameters = tuple(model.parameters())
    blocks = torch.autograd.functional.hessian(loss, parameters)
    sizes = [parameter.numel() for parameter in parameters]
    matrix = torch.cat(
        [torch.cat([block.reshape(n, m) for block, m in zip(row, sizes)], 1) for row, n in zip(blocks, sizes)]
    )
    return model, images, labels, matrix


def test_hessian_product(problem):
    model, images, labels, matrix = problem
    product = hessian_product(cross_entropy(model(images), labels), [*model.parameters()])
    vector = torch.randn(len(matrix), dtype=torch.float64)
    assert torch.allclose(product(vector), matrix @ vector, atol=1e-12)


def test_exact_eigenvalues(problem):
    model, images, labels, matrix = problem
    assert torch.allclose(exact_eigenvalues(model, images, labels), torch.linalg.eigvalsh(matrix), atol=1e-12)


def test_lanczos_run_to_the_end_is_exact(problem):
    *_, matrix = problem
    start = torch.randn(len(matrix), dtype=torch.float64)
    values, shares = lanczos(lambda vector: matrix @ vector, start, 1000)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    # Of equal eigenvalues the start shows only one, so compare what each method integrates: moments of the density.
    parts = (vectors.T @ start / start.norm()).square()
    assert shares.sum().item() == pytest.approx(1)
    for power in range(1, 6):
        assert (shares * values**power).sum().item() == pytest.approx((parts * eigenvalues**power).sum().item(), 1e-6)
    assert values[-1].item() == pytest.approx(eigenvalues[-1].item(), rel=1e-9)


def test_lanczos_finds_the_largest_eigenvalues_early():
    torch.manual_seed(0)
    matrix = torch.randn(300, 300)
    matrix = matrix @ matrix.T / 300 + torch.diag(torch.tensor([50.0, 30.0] + [0.0] * 298))
    values, _ = lanczos(lambda vector: matrix @ vector, torch.randn(300), 30)
    assert torch.allclose(values[-2:].float(), torch.linalg.eigvalsh(matrix)[-2:], rtol=1e-4)


def test_lanczos_stops_where_the_space_is_exhausted():
    values, shares = lanczos(lambda vector: 3 * vector, torch.randn(8), 5)
    assert values.tolist() == pytest.approx([3]) and shares.tolist() == pytest.approx([1])


def check_facts(facts, rows):
    """`facts` of a network of the digits are those of the weights that its `rows` hold, eigenvalues by Lanczos."""
    digits, network = load_dataset("digits", "", torch.device("cpu")), small_network()
    vector_to_parameters(torch.tensor([float(row["weight"]) for row in rows]), network.parameters())
    assert facts["grid_share"] == pytest.approx(grid_share(network, 4))
    for name, model in (("fp", network), ("w4", quantize_weights(network, 4))):
        assert facts[f"{name}_top1"] == pytest.approx(evaluate(model, digits.test).top1), name
    eigenvalues = [float(row["eigenvalue"]) for row in rows]
    assert eigenvalues == sorted(eigenvalues) and facts["largest_eigenvalue"] == eigenvalues[-1]
    assert facts["parameters"] == len(rows) == 64 * 16 + 16 + 16 * 10 + 10
    assert facts["trace"] == pytest.approx(sum(eigenvalues))
    images = normalize(digits.train.images, digits.spec).double()
    loss = cross_entropy(network.double()(images), digits.train.labels)
    start = torch.randn(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = lanczos(hessian_product(loss, [*network.parameters()]), start, 40)
    assert found[-1].item() == pytest.approx(eigenvalues[-1], rel=1e-3)


def test_command_and_figure(cli, tmp_path, digits_run, monkeypatch):
    """The facts are those of the networks in digits.csv, of which PSGD's is the one near its grid; the figure is drawn
    from it."""
    monkeypatch.setattr(tools.hessian, "EPOCHS", 20)
    flags = ["--model_path", digits_run, "--images", "32", "--steps", "4", "--probes", "2", "--out", "h"]
    outcome = cli("tools.hessian", *flags)
    assert outcome.code == 0, outcome.err
    with open(tmp_path / "h/digits.csv", newline="") as file:
        digits = list(csv.DictReader(file))
    sgd, psgd = json.loads((tmp_path / "h/results.json").read_text())["digits"]
    for facts in (sgd, psgd):
        check_facts(facts, [row for row in digits if row["network"] == facts["network"]])
    assert psgd["grid_share"] > 0.4 > sgd["grid_share"]  # they are 0.55 to 0.73, and 0.18 to 0.20
    with open(tmp_path / "h/spectrum.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["probe"] for row in rows} == {"0", "1"}
    assert cli("visualize.py", "--figure", "4", "--results", "h", "--out", "pictures").code == 0
    assert (tmp_path / "pictures/figure4.png").stat().st_size > 20_000
    flags = ["--model_path", digits_run, "--images", "9999"]
    assert "--images 9999 is more than the 1437 training images" in cli("tools.hessian", *flags).err
    monkeypatch.setattr(tools.hessian, "digits_rows", lambda seed: (digits, []))
    assert cli("tools.hessian", "--model_path", "--out", "h").code == 0  # none: the earlier spectra do not stay
    assert not (tmp_path / "h/spectrum.csv").exists()
    assert cli("visualize.py", "--figure", "4", "--results", "h", "--out", "two").code == 0
    assert "digits.csv cannot be read" in cli("visualize.py", "--figure", "4", "--results", "no").err
