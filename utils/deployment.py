"""How eval.py deploys a network: pruned, with quantized weights and activations, after a post-training method."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quant import (
    adaround,
    bn_ranges,
    correct_bias,
    float_activations,
    mse_ranges,
    percentile_ranges,
    prune_weights,
    quantize_activations,
    quantize_weights,
    reestimate_batch_norm,
    relu_histograms,
)
from quant.grid import FLOAT_BITS
from utils.cli import UserError
from utils.engine import evaluate_batches, fold_batch_norm

BN_RANGES = ("bn", "bn_published")  # ranges of activations that need no images


def check_activations(model: nn.Module, path: str | Path) -> None:
    """Raises UserError if activations of the network, that of the file `path`, would stay float."""
    left = float_activations(model)
    if left:
        raise UserError(
            f"{path}: {len(left)} activations would stay float, such as {left[0]}: only nn.ReLU modules are quantized; "
            "leave the activations in float (--a_bit 32)"
        )


@dataclass(frozen=True)
class Setting:
    """What differs from row to row of a sweep; the default is the network as trained."""

    w_bit: int = FLOAT_BITS
    a_bit: int = FLOAT_BITS
    sparsity: float = 0.0
    post: str = "none"


@dataclass
class Deployment:
    """A trained network, in eval mode, and how it is deployed in every row; `images()` gives labelled batches of
    training images, unaugmented, of which all that is fitted is fitted to."""

    model: nn.Module
    images: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    first_last: bool = True
    prune: str = "global"
    weight_range: str = "absmax"
    per_channel: bool = False
    act_range: str = "minmax"
    percentile: float = 99.99
    iterations: int = 1000  # of adaround
    seed: int = 1

    @cached_property
    def histograms(self) -> Any:
        """Of the model's ReLUs on the training images."""
        return relu_histograms(self.model, (batch for batch, _ in self.images()))

    def weight_grid(self, w_bit: int) -> dict[str, Any]:
        """The grid of the weights, as keyword arguments of quant's functions."""
        return {
            "bits": w_bit, "first_last": self.first_last, "per_channel": self.per_channel,
            "weight_range": self.weight_range,
        }  # fmt: skip

    def activation_ranges(self, a_bit: int, n: float) -> dict[str, float]:
        """x_max of every ReLU by act_range; for the bn ranges `n` standard deviations up. Raises ValueError if the
        model has none to be had.
        """
        if self.act_range == "minmax":
            return {name: histogram.top for name, histogram in self.histograms.items()}
        if self.act_range == "percentile":
            return percentile_ranges(self.histograms, self.percentile)
        if self.act_range == "mse":
            return mse_ranges(self.histograms, a_bit)
        return bn_ranges(self.model, n, shortcut=self.act_range == "bn")

    def pruned(self, sparsity: float) -> nn.Module:
        """A copy of the model with the share `sparsity` of its weights at zero."""
        return prune_weights(self.model, sparsity, self.prune, self.first_last)

    def network(self, setting: Setting, n: float = 0.0) -> nn.Module:
        """A copy of the model as deployed; `n` for the bn ranges. Raises ValueError if the model has not what is asked
        for: no ReLU, no batch norm, ...
        """
        grid, pruned = self.weight_grid(setting.w_bit), self.pruned(setting.sparsity)
        network = quantize_weights(pruned, **grid, inplace=setting.post != "adaround")  # which rounds the float weights
        if setting.a_bit != FLOAT_BITS:
            ranges = self.activation_ranges(setting.a_bit, n)
            network = quantize_activations(network, setting.a_bit, ranges, inplace=True)
        batches = (images for images, _ in self.images())
        if setting.post == "bn_reestimate":
            return reestimate_batch_norm(network, batches)
        if setting.post == "bias_correct":
            return correct_bias(network, self.model, batches, self.first_last)
        if setting.post == "adaround":
            return adaround(network, pruned, batches, **grid, iterations=self.iterations, seed=self.seed)
        return network

    def clipping_losses(self, setting: Setting, candidates: Iterable[float], precision: str) -> dict[float, float]:
        """Loss on the training images by n of the bn ranges, for each n of `candidates`."""
        return {
            n: evaluate_batches(fold_batch_norm(self.network(setting, n)), self.images(), precision).loss
            for n in candidates
        }
