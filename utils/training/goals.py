"""What a network is trained for: a low-bit grid, or pruning. One interface for training, logging and deployment."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from quant import Grid, grid_share, prune_weights, psg_param_groups, quantize_weights, sparse_param_groups, weight_mse
from quant.pruning import pruning_mse

WHOLE_ENDS = " --first_last_quant 0"  # eval.py's flag for a first and last layer as trained


@dataclass(frozen=True)
class GridGoal:
    """Weights on a grid, as `quantize_weights` makes them."""

    grid: Grid

    @property
    def name(self) -> str:
        return f"W{self.grid.bits}"

    @property
    def flags(self) -> str:
        """Those of eval.py for the deployed network."""
        return f"--w_bit {self.grid.bits}{'' if self.grid.first_last else WHOLE_ENDS}"

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for PSGD towards this goal."""
        return psg_param_groups(model, self.grid)

    def deployed(self, model: nn.Module) -> nn.Module:
        """A copy of `model` as it is deployed."""
        return quantize_weights(model, self.grid)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far the weights of `model` are from those of the deployed copy, by name of the measure."""
        return {f"{self.name.lower()}_mse": weight_mse(model, self.grid), "grid_share": grid_share(model, self.grid)}


@dataclass(frozen=True)
class SparseGoal:
    """A share `sparsity` of zero weights, as `prune_weights` makes them over all layers together."""

    sparsity: float
    first_last: bool = True
    w_decay: float | None = None  # of the weights that may become zero, where it is not that of all

    @property
    def name(self) -> str:
        return f"S{100 * self.sparsity:g}"

    @property
    def flags(self) -> str:
        """Those of eval.py for the deployed network."""
        return f"--sparsity {self.sparsity:g}{'' if self.first_last else WHOLE_ENDS}"

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for PSGD towards this goal."""
        return sparse_param_groups(model, self.first_last, self.w_decay)

    def deployed(self, model: nn.Module) -> nn.Module:
        """A copy of `model` as it is deployed."""
        return prune_weights(model, self.sparsity, first_last=self.first_last)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far the weights of `model` are from those of the deployed copy, by name of the measure."""
        return {f"{self.name.lower()}_mse": pruning_mse(model, self.sparsity, first_last=self.first_last)}


Goal = GridGoal | SparseGoal
