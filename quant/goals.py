"""What a network is trained for: a low-bit grid, or pruning. One interface for training, logging and deployment."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .layers import psg_param_groups
from .network import grid_share, quantize_weights, weight_mse
from .sparsity import prune_weights, pruning_mse, sparse_param_groups


@dataclass(frozen=True)
class GridGoal:
    """Weights of `bits` bits, as `quantize_weights` makes them."""

    bits: int
    first_last: bool = True
    per_channel: bool = False

    @property
    def name(self) -> str:
        return f"W{self.bits}"

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for PSGD towards this goal."""
        return psg_param_groups(model, self.bits, self.first_last, self.per_channel)

    def deployed(self, model: nn.Module) -> nn.Module:
        """A copy of `model` as it is deployed."""
        return quantize_weights(model, self.bits, self.first_last, self.per_channel)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far the weights of `model` are from those of the deployed copy, by name of the measure."""
        grid = (self.bits, self.first_last, self.per_channel)
        return {f"{self.name.lower()}_mse": weight_mse(model, *grid), "grid_share": grid_share(model, *grid)}


@dataclass(frozen=True)
class SparseGoal:
    """A share `sparsity` of zero weights, as `prune_weights` makes them over all layers together."""

    sparsity: float
    first_last: bool = True

    @property
    def name(self) -> str:
        return f"S{100 * self.sparsity:g}"

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for PSGD towards this goal."""
        return sparse_param_groups(model, self.first_last)

    def deployed(self, model: nn.Module) -> nn.Module:
        """A copy of `model` as it is deployed."""
        return prune_weights(model, self.sparsity, first_last=self.first_last)

    def distances(self, model: nn.Module) -> dict[str, float]:
        """How far the weights of `model` are from those of the deployed copy, by name of the measure."""
        return {f"{self.name.lower()}_mse": pruning_mse(model, self.sparsity, first_last=self.first_last)}
