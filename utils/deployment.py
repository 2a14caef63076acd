"""How eval.py deploys a network: pruned, with quantized weights and activations, after a post-training method."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from quant import (
    Grid,
    adaround,
    bn_ranges,
    correct_bias,
    float_activations,
    prune_weights,
    quantize_activations,
    quantize_weights,
    reestimate_batch_norm,
)
from quant.grid import FIRST_LAST_BITS, FLOAT_BITS
from quant.histograms import Histogram
from quant.inputs import InputHistogram, input_histograms, input_ranges
from quant.ranges import Ranges, mse_ranges, percentile_ranges, relu_histograms
from utils.cli import UserError
from utils.data.split import LabelledBatch
from utils.training.evaluation import evaluate_batches, fold_batch_norm

BN_RANGES = ("bn", "bn_published")  # ranges of activations that need no images


def check_activations(model: nn.Module, path: str | Path) -> None:
    """Raises UserError if activations of `model`, the network of the file `path`, would stay in float."""
    left = float_activations(model)
    if left:
        raise UserError(
            f"{path}: {len(left)} activations would stay float, such as {left[0]}: only nn.ReLU modules are quantized; "
            "quantize the inputs of layers instead (--act_at inputs), or leave the activations in float (--a_bit 32)"
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
    """A trained network, in eval mode, and what all its rows have in common. `images()` gives labeled, unaugmented
    batches of training images, on which all fitting is done."""

    model: nn.Module
    images: Callable[[], Iterable[LabelledBatch]]
    template: Grid  # of the weights; each row has its own bits
    prune: str = "global"
    act_at: str = "relu"
    act_range: str = "minmax"
    percentile: float = 99.99
    iterations: int = 1000  # of adaround
    seed: int = 1

    @cached_property
    def histograms(self) -> dict[str, Histogram]:
        """Histograms of the model's ReLUs on the training images."""
        return relu_histograms(self.model, self.images())

    @cached_property
    def input_histograms(self) -> dict[str, InputHistogram]:
        """Histograms of the inputs of the model's layers on the training images."""
        return input_histograms(self.model, self.images(), self.weight_grid(FIRST_LAST_BITS))

    def weight_grid(self, w_bit: int) -> Grid:
        """The grid of the weights at `w_bit` bits."""
        return replace(self.template, bits=w_bit)

    def activation_ranges(self, a_bit: int, n: float) -> Ranges:
        """Ranges of the ReLUs or inputs, as `act_at` says, by `act_range`; the bn ranges end `n` standard deviations
        above the mean. Raises ValueError if the model has no such ranges.
        """
        if self.act_at == "inputs":
            return input_ranges(self.input_histograms, self.act_range, a_bit, self.percentile)
        if self.act_range == "minmax":
            return {name: histogram.top for name, histogram in self.histograms.items()}
        if self.act_range == "percentile":
            return percentile_ranges(self.histograms, self.percentile)
        if self.act_range == "mse":
            return mse_ranges(self.histograms, a_bit)
        return bn_ranges(self.model, n, shortcut=self.act_range == "bn")

    def pruned(self, sparsity: float) -> nn.Module:
        """A copy of the model with the share `sparsity` of its weights at zero."""
        return prune_weights(self.model, sparsity, self.prune, self.template.first_last)

    def network(self, setting: Setting, n: float = 0.0) -> nn.Module:
        """A copy of the model as deployed, with `n` for the bn ranges. Raises ValueError if the model lacks what the
        setting needs: ReLUs, batch norm, ...
        """
        grid, pruned = self.weight_grid(setting.w_bit), self.pruned(setting.sparsity)
        network = quantize_weights(pruned, grid, inplace=setting.post != "adaround")  # it needs the float weights
        if setting.a_bit != FLOAT_BITS:
            ranges = self.activation_ranges(setting.a_bit, n)
            network = quantize_activations(network, setting.a_bit, ranges, inplace=True)
        if setting.post == "bn_reestimate":
            return reestimate_batch_norm(network, self.images())
        if setting.post == "bias_correct":
            return correct_bias(network, self.model, self.images(), self.template.first_last)
        if setting.post == "adaround":
            return adaround(network, pruned, self.images(), grid, iterations=self.iterations, seed=self.seed)
        return network

    def clipping_losses(self, setting: Setting, candidates: Iterable[float], precision: str) -> dict[float, float]:
        """Loss on the training images by n of the bn ranges, for each n of `candidates`."""
        return {
            n: evaluate_batches(fold_batch_norm(self.network(setting, n)), self.images(), precision).loss
            for n in candidates
        }
