"""The pace of a run with PSG: columns of the log, and what is said when the weights will not reach their grid."""

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from quant import PSGD, expected_share
from quant.lambda_s import ENOUGH
from quant.settings import AUTO


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
        has_pace = any("steps" in group for group in groups)
        self.psgd = self.optimizer if isinstance(self.optimizer, PSGD) and has_pace else None
        self.auto = next((group for group in groups if group.get("lambda_s") == AUTO), None)
        self.tau = self.psgd.pace().tau if self.psgd else 0.0

    def after_epoch(self, epoch: int, loss: float) -> tuple[dict[str, float], list[str]]:
        """Columns for the log after `epoch`, whose mean training loss was `loss`, and lines to print."""
        if not self.psgd:
            return {}, []
        pace, lines = self.psgd.pace(), []
        columns = {"tau": pace.tau, "expected_share": pace.expected_share}
        if self.auto:
            columns["lambda_s"] = pace.lambda_s
        if self.psgd.watch_loss(loss):
            lines.append(f"the loss rose to {loss:.4g}: lambda_s auto goes on at half the pace")
            pace = self.psgd.pace()  # whose plan has changed
        if epoch == (self.first + self.last) // 2 and epoch < self.last:
            end = pace.planned_tau if self.auto else pace.tau + (pace.tau - self.tau) * self._epochs_left(epoch)
            lines += self._outlook(end)
        self.tau = pace.tau
        return columns, lines

    def _outlook(self, tau: float) -> list[str]:
        """One line if a stage that ends at `tau` leaves too few weights near the grid, else none."""
        share = expected_share(tau)
        if share >= ENOUGH:
            return []
        return [f"about {100 * share:.0f} % of the weights will be near the grid at the end: {self._advice(tau)}"]

    def _epochs_left(self, epoch: int) -> float:
        """Epochs at the present learning rate in which tau grows as much as in all that are left."""

        def falls(number: int) -> int:
            return sum(decay <= number for decay in self.decays)

        return sum(0.01 ** (falls(number) - falls(epoch)) for number in range(epoch + 1, self.last + 1))

    def _advice(self, tau: float) -> str:
        if not self.auto:
            return "use --lambda_s auto, a larger --lambda_s, or more epochs before the learning rate falls"
        epochs = math.ceil((self.last - self.first + 1) * self.auto["tau_end"] / max(tau, 0.01))
        return f"train for {epochs} epochs or more"
