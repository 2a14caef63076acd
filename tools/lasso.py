"""The lasso's path beside that of PSGD with target zero and weight decay, on a random least-squares problem.

    python -m tools.lasso --out results/studies/lasso
    python visualize.py --figure lasso --results results/studies/lasso/lasso.csv --out fig

Weight decay, which PSG does not scale, is an L1 penalty of weight_decay / lambda_s there (docs/pruning.md). The lasso
is scikit-learn's. PSGD starts from the least-squares solution, in float64.
"""

import torch
from sklearn.linear_model import Lasso
from torch import Tensor, nn

from quant import PSGD, sparse_param_groups
from utils.cli import Parser, run
from utils.files import command_line, git_commit, output_folder, write_csv, write_json

ROWS, WEIGHTS, NOISE = 200, 20, 0.5
PENALTIES = [0.01 * 2 ** (step / 2) for step in range(15)]  # the last leaves two weights
LAMBDA_S = 4.0


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [200, 20] and outputs [200], float64, of a linear model with about 12 zeros in 20 weights, and noise."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(shape, generator=generator).double() for shape in ((ROWS, WEIGHTS), (ROWS,)))
    weight = torch.randn(WEIGHTS, generator=generator) * (torch.rand(WEIGHTS, generator=generator) < 0.4)
    return x, x @ weight.double() + NOISE * noise


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The weights [20] without a penalty."""
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


def lasso(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """The weights [20] that minimize half the mean square error plus penalty * sum of |w|."""
    found = Lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
    return torch.tensor(found.coef_)


def psgd(x: Tensor, y: Tensor, penalty: float, momentum: float = 0.9, steps: int = 1200) -> Tensor:
    """The weights [20] after steps of PSGD(SGD) on half the mean square error, whose decay is penalty * lambda_s."""
    model = nn.Linear(WEIGHTS, 1, bias=False, dtype=x.dtype)
    model.load_state_dict({"weight": least_squares(x, y)[None]})  # no sign can change, so the start has to be good
    groups = sparse_param_groups(model, weight_decay=penalty * LAMBDA_S)
    optimizer = PSGD(torch.optim.SGD(groups, lr=0.02 * (1 - momentum), momentum=momentum), LAMBDA_S)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x)[:, 0] - y).square().mean() / 2).backward()
        optimizer.step()
    return model.weight.detach()[0]


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--out", default="results/studies/lasso", metavar="DIR", help="folder for lasso.csv and lasso.json")
    return p


def main() -> None:
    args = parser().parse_args()
    with output_folder("--out", args.out) as out:
        x, y = problem(seed=0)
        rows = []
        for penalty in PENALTIES:
            exact, found = lasso(x, y, penalty), psgd(x, y, penalty)
            apart = (exact - found).abs().max().item()
            print(f"penalty {penalty:.4f}: {(exact != 0).sum()} weights, largest difference {apart:.1e}")
            for weight, values in enumerate(zip(exact.tolist(), found.tolist())):
                rows.append({"penalty": penalty, "weight": weight, "lasso": values[0], "psgd": values[1]})
        write_csv(out / "lasso.csv", rows)
        write_json(out / "lasso.json", {"command": command_line(), "commit": git_commit(), "seed": 0})


if __name__ == "__main__":
    run(main)
