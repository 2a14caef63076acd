"""The pace of a run with PSG: columns of the log, and what is said when the weights will not reach their grid."""

from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from quant import PSGD, expected_share
from quant.lambda_s import PLAN_END
from quant.settings import AUTO

ENOUGH = 0.9  # a stage that ends with a smaller share of weights near the grid is announced at its middle


@dataclass
class PaceWatch:
    """Follows the pace of `optimizer` from epoch `first` to `last`, whose learning rate falls to a tenth at `decays`.

    Without a pace, as of plain SGD or sparse training, nothing is logged or said.
    """

    optimizer: Optimizer
    first: int
    last: int
    decays: list[int]

    def __post_init__(self) -> None:
        groups = self.optimizer.param_groups
        self.has_pace = isinstance(self.optimizer, PSGD) and any("steps" in group for group in groups)
        self.is_auto = any(group.get("lambda_s") == AUTO for group in groups)
        self.tau = self._columns()["tau"] if self.has_pace else 0.0

    def _columns(self) -> dict[str, float]:
        assert isinstance(self.optimizer, PSGD)
        pace = self.optimizer.pace()
        columns = {"tau": pace.tau, "expected_share": pace.expected_share}
        return columns | ({"lambda_s": pace.lambda_s} if self.is_auto else {})

    def after_epoch(self, epoch: int, loss: float) -> tuple[dict[str, float], list[str]]:
        """Columns for the log after `epoch`, whose mean training loss was `loss`, and lines to print."""
        if not self.has_pace:
            return {}, []
        assert isinstance(self.optimizer, PSGD)
        columns, lines = self._columns(), []
        if self.optimizer.watch_loss(loss):
            lines.append(f"the loss rose to {loss:.4g}: lambda_s auto goes on at half the pace")
        if epoch == (self.first + self.last) // 2 and epoch < self.last:
            lines += self._outlook(epoch, columns["tau"])
        self.tau = columns["tau"]
        return columns, lines

    def _outlook(self, epoch: int, tau: float) -> list[str]:
        """One line if too few weights will be near the grid at the end, else none."""
        assert isinstance(self.optimizer, PSGD)
        end = self.optimizer.pace().planned_tau if self.is_auto else tau + (tau - self.tau) * self._epochs_left(epoch)
        share = expected_share(end)
        if share >= ENOUGH:
            return []
        return [
            f"about {100 * share:.0f} % of the weights will be near the grid at the end: {self._advice(epoch, end)}"
        ]

    def _epochs_left(self, epoch: int) -> float:
        """Epochs at the present learning rate in which tau grows as much as in all that are left."""

        def falls(number: int) -> int:
            return sum(decay <= number for decay in self.decays)

        return sum(0.01 ** (falls(number) - falls(epoch)) for number in range(epoch + 1, self.last + 1))

    def _advice(self, epoch: int, end: float) -> str:
        if not self.is_auto:
            return "use --lambda_s auto, a larger --lambda_s, or more epochs before the learning rate falls"
        group: dict[str, Any] = next(group for group in self.optimizer.param_groups if group.get("lambda_s") == AUTO)
        needed = group["tau_end"] / group["noise_limit"] ** 2 / PLAN_END
        epochs = -(-needed * (self.last - self.first + 1) // group["steps"])
        return f"train for {epochs:.0f} epochs or more"
