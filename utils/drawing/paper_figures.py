"""Draws the paper's figures 2, 3 and 4, and the lasso's path. See utils/drawing/figures.py."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy
import seaborn
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from quant import PSGD
from quant.warped_space import unwarp, warp
from utils.drawing.result_figures import color_of, log_scale, lone_points
from utils.drawing.text import add_legend, as_written

# Figure 2: a loss of two weights that is zero at three points, one of them on the grid (its step is 1).
MINIMA = ((0.0, 1.0), (0.62, 0.42), (-0.55, -0.6))
START = (-0.3, 0.2)
LAMBDA_S, EPS = 4.0, 0.02
LEARNING_RATE, STEPS = 1.6e-2, 750
GRID_HOLDER = 3.0  # a third weight that the loss does not depend on: at 3 bits it holds the grid's step at 1


def toy_loss(x, y):
    """Product of the squared distances from MINIMA; numpy arrays or tensors of one shape."""
    product = 1.0
    for a, b in MINIMA:
        product = product * ((x - a) ** 2 + (y - b) ** 2)
    return product


def toy_trajectories() -> dict[str, numpy.ndarray]:
    """Points [STEPS + 1, 2] from START by gradient descent, by PSGD, and by gradient descent in the warped space."""
    return {
        "gradient descent": _descend(lambda weight: torch.optim.SGD([weight], lr=LEARNING_RATE)),
        "PSGD": _descend(
            lambda weight: PSGD(
                torch.optim.SGD([{"params": [weight], "bits": 3}], lr=LEARNING_RATE), lambda_s=LAMBDA_S, eps=EPS
            )
        ),
        "gradient descent in the warped space": _descend_warped(),
    }


def _descend(build_optimizer) -> numpy.ndarray:
    weight = torch.nn.Parameter(torch.tensor([*START, GRID_HOLDER], dtype=torch.float64))
    optimizer = build_optimizer(weight)
    points = [weight.detach()[:2].clone()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        toy_loss(weight[0], weight[1]).backward()
        optimizer.step()
        points.append(weight.detach()[:2].clone())
    return torch.stack(points).numpy()


def _descend_warped() -> numpy.ndarray:
    warped = warp(torch.tensor(START, dtype=torch.float64), 1.0, LAMBDA_S, EPS).requires_grad_()
    points = [torch.tensor(START, dtype=torch.float64)]
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(toy_loss(*unwarp(warped, 1.0, LAMBDA_S, EPS)), warped)
        warped = (warped - LEARNING_RATE * gradient).detach().requires_grad_()
        points.append(unwarp(warped.detach(), 1.0, LAMBDA_S, EPS))
    return torch.stack(points).numpy()


@as_written
def warped_space():
    """Figure 2: the toy loss in the original and in the warped space, and where each method goes."""
    paths = toy_trajectories()
    figure, axes = pyplot.subplots(1, 2, figsize=(11.6, 5.6), layout="constrained")
    low, high = numpy.array([-1.25, -1.25]), numpy.array([1.25, 1.45])
    spaces: list[tuple[str, Callable[..., Any]]] = [("original space", numpy.asarray), ("warped space", _warped)]
    for axis, (title, through) in zip(axes, spaces):
        x, y = (numpy.linspace(a, b, 301) for a, b in zip(low, high))
        loss = toy_loss(*numpy.meshgrid(x, y))
        axis.contourf(through(x), through(y), numpy.log10(loss + 1e-4), levels=24, cmap="Greys_r", alpha=0.75)
        for point in (-1.0, 0.0, 1.0):
            axis.axvline(through(numpy.array(point)), color="white", linewidth=0.8)
            axis.axhline(through(numpy.array(point)), color="white", linewidth=0.8)
        for name, color, width in (("gradient descent", "SGD", 2.2), ("PSGD", "PSGD", 4.0)):
            axis.plot(*through(paths[name]).T, color=color_of(color, 0), linewidth=width, label=name)
        name = "gradient descent in the warped space"
        axis.plot(*through(paths[name]).T, ":", color="black", linewidth=1.8, label=name)
        for a, b in MINIMA:
            on_grid = (a, b) == (round(a), round(b))
            axis.plot(*through(numpy.array([a, b])), "o", markersize=9, markeredgecolor="black", zorder=4,
                      color="white" if on_grid else "black")  # fmt: skip
        axis.plot(*through(numpy.array(START)), "s", color="gold", markeredgecolor="black", markersize=8, zorder=5)
        axis.set(title=title, xlabel="weight 1", aspect="equal")
    axes[0].set_ylabel("weight 2")
    axes[0].plot([], [], "s", color="0.85", label="darker: lower loss; white lines: grid")
    axes[0].plot([], [], "o", color="white", markeredgecolor="black", label="minimum on the grid")
    axes[0].plot([], [], "o", color="black", label="minimum off the grid")
    axes[0].plot([], [], "s", color="gold", markeredgecolor="black", label="start")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _warped(x: numpy.ndarray) -> numpy.ndarray:
    return warp(torch.as_tensor(x, dtype=torch.float64), 1.0, LAMBDA_S, EPS).numpy()


@as_written
def sparse_histograms(weights: dict[str, torch.Tensor], sparsity: float):
    """Figure 3: the prunable weights of each network on a logarithmic count axis, and where pruning cuts.

    The axis covers 99 % of the widest network's weights, because PSGD's few largest weights are far out.
    """

    def magnitude(values: torch.Tensor, share: float) -> float:
        return values.abs().kthvalue(max(1, round(share * len(values)))).values.item()

    # If that is zero, the axis covers all weights; if all of them are zero, any number will do.
    ends = [magnitude(values, 0.99) for values in weights.values()]
    limit = 1.02 * (max(ends) or max(magnitude(values, 1) for values in weights.values()) or 1)
    figure, axes = pyplot.subplots(
        1, len(weights), figsize=(1 + 4.8 * len(weights), 3.8), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for position, (axis, (label, values)) in enumerate(zip(axes[0], weights.items())):
        axis.hist(values.numpy(), numpy.linspace(-limit, limit, 202), color=color_of(label, position), linewidth=0)
        cut = magnitude(values, sparsity)
        axis.axvspan(-cut, cut, color="0.5", alpha=0.25, linewidth=0, label=f"{100 * sparsity:g} % of the weights")
        axis.set_yscale("log")
        axis.set(title=f"{label}: {100 * sparsity:g} % are within ±{cut:.2g}")
        outside, largest = int((values.abs() > limit).sum()), values.abs().max().item()
        axis.set_xlabel(f"weight ({outside:,} of {len(values):,} lie outside, up to ±{largest:.2g})")
        axis.legend(loc="upper right", fontsize="small")
    axes[0][0].set_ylabel("weights in a bin")
    return figure


@as_written
def curvature(digits: dict[str, list[list[float]]], spectra: dict[str, list[list[float]]]):
    """Figure 4: weights and Hessian eigenvalues of the small network, and eigenvalue densities of large ones.

    `digits` holds weights and eigenvalues by method, `spectra` Ritz values and their shares (over all random starts) by
    network; without `spectra` there are two panels.
    """
    figure, axes = pyplot.subplots(1, 3 if spectra else 2, figsize=(15 if spectra else 10, 4.4), layout="constrained")
    limit = max(numpy.abs(weights).max() for weights, _ in digits.values())
    edges = numpy.linspace(-limit or -1, limit or 1, 102)
    handles: list[list] = [[] for _ in axes]
    for position, (label, (weights, eigenvalues)) in enumerate(digits.items()):
        color = color_of(label, position)
        handles[0].append(axes[0].hist(weights, bins=edges, alpha=0.6, color=color)[2])
        positive = sorted((value for value in eigenvalues if value > 1e-6), reverse=True)
        handles[1] += axes[1].plot(range(1, len(positive) + 1), positive, color=color, **lone_points(positive))
    axes[0].set(title="small network on the digits: weights", xlabel="weight", ylabel="weights in a bin")
    axes[1].set(title="the same: positive eigenvalues of the exact Hessian", xlabel="rank", ylabel="eigenvalue")
    log_scale(axes[1], chain(*(line.get_ydata() for line in axes[1].lines)))
    for position, (label, (values, shares)) in enumerate(spectra.items()):
        low, high = min(min(v) for v, _ in spectra.values()), max(max(v) for v, _ in spectra.values())
        width = (high - low) / 150 or abs(low) / 150 or 1.0
        around = 0 if high > low else 5 * width  # for a single eigenvalue
        at = numpy.linspace(low - around, high + around, 1200)
        bumps = numpy.exp(-(((at[:, None] - numpy.array(values)) / width) ** 2) / 2) / (width * (2 * numpy.pi) ** 0.5)
        density = bumps @ numpy.array(shares) / sum(shares)
        handles[2] += axes[2].plot(at, density, color=color_of(label.partition(" ")[0], position))
    if spectra:
        axes[2].set(title="ResNet-32: density of the Hessian's eigenvalues", xlabel="eigenvalue", ylabel="density",
                    yscale="log", ylim=(1e-7, 10))  # fmt: skip
    for axis, drawn, labels in zip(axes, handles, (digits, digits, spectra)):
        add_legend(axis, drawn, [*labels], fontsize="small")
    return figure


@as_written
def lasso_paths(rows: list[dict[str, float]]) -> Figure:
    """The weights over the penalty: a line for each of the lasso's, points for those of PSGD."""
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    weights = sorted({row["weight"] for row in rows})
    for color, weight in zip(seaborn.color_palette("husl", len(weights)), weights):
        own = [row for row in rows if row["weight"] == weight]
        penalties = [row["penalty"] for row in own]
        axis.plot(penalties, [row["lasso"] for row in own], color=color, linewidth=1)
        axis.plot(penalties, [row["psgd"] for row in own], "o", color=color, markersize=3)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.set_xlabel("L1 penalty, or weight decay / lambda_s")
    axis.set_ylabel("weight")
    labels = ["the lasso", "PSGD with target zero and weight decay"]
    add_legend(figure, axis.lines[:2], labels, loc="outside upper center", ncols=2, fontsize="small")
    return figure
