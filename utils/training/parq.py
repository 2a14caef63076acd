"""PARQ and BinaryRelax, of torchao.prototype.parq, as an optimizer of a training run. Needs the package torchao."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.prototype.parq.optim import ProxBinaryRelax, ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import MaxUnifQuantizer

from quant import Grid, layer_grids
from utils.cli import UserError
from utils.training.qat import Change, straight_through

MAPS = {"parq": ProxPARQ, "binaryrelax": ProxBinaryRelax}


class Relaxed(QuantOptimizer):
    """torchao's optimizer around `base`, whose groups must be one group of all parameters.

    torchao leaves the relaxed weights in the parameters. Here the parameters are the float weights, which torchao calls
    latent, and `relaxed` holds the relaxed ones by name, for the forward pass of the next step. The relaxation ends
    with hard quantization from step `end` on. Raises UserError for a weight whose channels are not dim 0.
    """

    def __init__(self, base: Optimizer, model: nn.Module, grid: Grid, method: str, end: int) -> None:
        grids = layer_grids(model, grid)
        if odd := next((name for name, own in grids.items() if own.scale_dims is not None), None):
            raise UserError(f"--method {method} has no grid for {odd}, whose channels are not its first dimension")
        self.float_weights = {name: model.get_parameter(name) for name in grids}
        self.relaxed = {name: weight.detach().clone() for name, weight in self.float_weights.items()}
        for weight in self.float_weights.values():
            weight.data = weight.data.contiguous()  # torchao relaxes only a copy of a channels_last weight
        _regroup(base, self.float_weights, grids)
        relaxation = MAPS[method](anneal_start=0, anneal_end=end)
        super().__init__(base, MaxUnifQuantizer(), relaxation, quant_period=1, quant_per_channel=grid.per_channel)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        for name, weight in self.float_weights.items():
            self.relaxed[name].copy_(weight)
        self.restore_latent_params()
        return loss

    def changes(self) -> dict[str, Change]:
        """What makes the relaxed weight of each, with the straight-through gradient."""
        return {name: partial(straight_through, other=weight) for name, weight in self.relaxed.items()}


def _regroup(base: Optimizer, weights: Mapping[str, Tensor], grids: dict[str, Grid]) -> None:
    """Moves `weights` from the only group of `base` to groups of their own, one for each bit-width."""
    (group,) = base.param_groups
    moved = {id(weight) for weight in weights.values()}
    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    by_bits: dict[int, list[Tensor]] = defaultdict(list)
    for name, weight in weights.items():
        by_bits[grids[name].bits].append(weight)
    for bits, own in by_bits.items():
        base.add_param_group({"params": own, "quant_bits": bits})
