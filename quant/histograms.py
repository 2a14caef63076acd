"""Histograms of activations, and the parts of their range that a rule keeps."""

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import activation_quant_max

BINS = 2048
CANDIDATES = 100  # number of ranges that the rule mse tries: 1%, 2%, ..., 100% of the whole one


class Histogram(NamedTuple):
    """Values of an activation: float64 counts [BINS] in equal bins from `low`, 0 after a ReLU, to `top`, the largest
    value."""

    counts: Tensor
    top: float
    low: float = 0.0

    @property
    def mirrored(self) -> "Histogram":
        """The histogram of the same values with the opposite sign."""
        return Histogram(self.counts.flip(0), -self.low, -self.top)


def count(values: Tensor, low: float, top: float) -> Tensor:
    """Float64 counts [BINS], on the CPU, of `values` in equal bins from `low` to `top`."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    for part in torch.split(values.float().flatten(), 2**24):  # histc counts in float32, exact up to there
        counts += torch.histc(part, BINS, low, top if top > low else low + 1).cpu().double()
    return counts


def upper_edge(histogram: Histogram, percentile: float) -> float:
    """Upper edge of the bin that holds the `percentile` (0 to 100) of the values."""
    share = histogram.counts.cumsum(0) / histogram.counts.sum()
    bins = int((share < percentile / 100).sum()) + 1
    return histogram.low + (histogram.top - histogram.low) * bins / BINS


def mse_part(histogram: Histogram, bits: int) -> float:
    """The part of the range, both ends cut alike, with the smallest mean squared error at `bits` bits.

    The candidates are k / CANDIDATES, for k = 1 ... CANDIDATES. Every value is taken to lie at the center of its bin.
    Raises ValueError for bits outside 2..8.
    """
    quant_max = activation_quant_max(bits)
    start = histogram.low / ((histogram.top - histogram.low) or 1.0)
    centers = start + (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    parts = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    scales = (parts / quant_max)[:, None]
    zero_point = round(-start * quant_max)
    integers = (centers / scales).round().clamp(-zero_point, quant_max - zero_point)
    errors = (integers * scales - centers).square()
    return parts[(errors @ histogram.counts).argmin()].item()
