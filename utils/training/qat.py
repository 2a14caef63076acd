"""Quantization-aware training: a network that computes with other weights than its parameters while it is trained.

The parameters stay the float weights, under their own names: for the optimizer, for checkpoints and for evaluation.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from quant import Grid, layer_grids
from quant.grid import dims_with_scales, fake_quantize_weight, nonzero_scale, snap
from quant.layers import copy_network
from quant.sharded import other_dims
from utils.training.goals import GridGoal

Change = Callable[[Tensor], Tensor]  # from a weight to what the network computes with, in its shape
RISE = 1000.0  # of the strength of MSQE's penalty over a stage


class Substitution:
    """Makes `model` compute with changes[name](w) in place of each parameter w, in training mode only.

    Deep copies of `model` do so with the parameters of their own.
    """

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        places: dict[int, list[tuple[nn.Module, str]]] = {id(model.get_parameter(name)): [] for name in changes}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in places:
                    places[id(parameter)].append((module, key))
        self.places = [*zip(changes.values(), places.values())]
        self.parameters: list[Tensor] = []  # during a forward pass
        model.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, model: nn.Module, *_: Any) -> None:
        if not model.training:
            return
        self.parameters = [module._parameters[key] for _, ((module, key), *_) in self.places]  # type: ignore[misc]
        self.put([change(parameter) for (change, _), parameter in zip(self.places, self.parameters)])

    def leave(self, *_: Any) -> None:
        if self.parameters:
            self.put(self.parameters)
            self.parameters = []

    def put(self, tensors: list[Tensor]) -> None:
        for (_, places), tensor in zip(self.places, tensors, strict=True):
            for module, key in places:
                module._parameters[key] = tensor  # type: ignore[assignment]  # torch.func.functional_call does so too


class _Replace(torch.autograd.Function):
    """The second tensor, with its gradient passed to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, other: Tensor) -> Tensor:
        return other.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Lsq(torch.autograd.Function):
    """See `lsq`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
        ratio = weight / step
        ctx.save_for_backward(ratio, step)
        ctx.quant_max = quant_max
        return ratio.clamp(-quant_max, quant_max).round_().mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ratio, step), (gradient,) = ctx.saved_tensors, grads
        inside = ratio.abs() < ctx.quant_max
        slope = torch.where(inside, ratio.round() - ratio, ratio.sign() * ctx.quant_max)
        per_step = ratio.numel() // step.numel()
        return gradient * inside, (gradient * slope).sum_to_size(step.shape) / math.sqrt(per_step * ctx.quant_max), None


def straight_through(weight: Tensor, other: Tensor) -> Tensor:
    """`other`, in the shape of `weight`. Its gradient is that of `weight`."""
    replaced: Tensor = _Replace.apply(weight, other)
    return replaced


def lsq(weight: Tensor, step: Tensor, quant_max: int) -> Tensor:
    """step * round(clamp(weight / step, -Q, Q)), where Q is quant_max: learned step size quantization.

    `step` is 0-d or broadcasts against `weight`. The gradient of a weight is straight-through inside of the range and 0
    outside. That of a step is round(w / s) - w / s inside and -Q or Q outside, summed over its N weights and divided by
    sqrt(N Q). Source: Esser et al., ICLR 2020, section 2; the range is narrow, as of all grids here.
    """
    quantized: Tensor = _Lsq.apply(weight, step, quant_max)
    return quantized


def first_step(weight: Tensor, grid: Grid) -> nn.Parameter:
    """The step that LSQ starts from, 2 mean|w| / sqrt(Q), in the shape of `weight_scale` (Esser et al. 2020)."""
    own = dims_with_scales(weight, grid.per_channel, grid.scale_dims)
    mean = weight.detach().abs().mean(other_dims(weight, own), keepdim=bool(own))
    return nn.Parameter(nonzero_scale(2 * mean / math.sqrt(grid.quant_max)))


def ste_changes(model: nn.Module, grid: Grid) -> dict[str, Change]:
    """Q(w) of every quantized parameter of `model`, with the straight-through gradient."""
    return {name: partial(fake_quantize_weight, grid=own) for name, own in layer_grids(model, grid).items()}


@dataclass(frozen=True)
class LearnedGoal(GridGoal):
    """Weights on the grids of learned steps, by name of the parameter."""

    steps: dict[str, nn.Parameter]

    def changes(self, model: nn.Module) -> dict[str, Change]:
        """What makes the quantized parameter of each."""
        return {
            name: partial(lsq, step=self.steps[name], quant_max=own.quant_max)
            for name, own in layer_grids(model, self.grid).items()
        }

    @torch.no_grad()
    def deployed(self, model: nn.Module) -> nn.Module:
        """A copy of `model` whose weights are on their grids."""
        quantized = copy_network(model)
        for name, change in self.changes(model).items():
            quantized.get_parameter(name).copy_(change(model.get_parameter(name)))
        return quantized

    @torch.no_grad()
    def distances(self, model: nn.Module) -> dict[str, float]:
        """As of a GridGoal, from the grids of the learned steps."""
        near = squares = count = 0.0
        for name, change in self.changes(model).items():
            weight = model.get_parameter(name)
            apart = (weight - change(weight)).abs()
            near += (apart <= 0.1 * self.steps[name].abs()).sum().item()
            squares += apart.double().square().sum().item()
            count += weight.numel()
        return {f"{self.name.lower()}_mse": squares / count, "grid_share": near / count}


class QuantizationPenalty:
    """Adds strength * sum over tensors of mean (w - Q(w))^2 to what each step of `optimizer` minimizes (MSQE).

    Q(w) is constant in the gradient. The strength rises from `start` to RISE times as much, evenly in its logarithm,
    in `steps` steps, of which `done` are done, and then stays. As a hook on `optimizer`, it is not part of the loss.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, grid: Grid, start: float, steps: int, done: int = 0
    ) -> None:
        self.weights = [(model.get_parameter(name), own) for name, own in layer_grids(model, grid).items()]
        self.start, self.steps = start, steps
        # A tensor on the device, so that it also counts the replays of a CUDA graph.
        self.done = torch.tensor(float(done), device=self.weights[0][0].device)
        optimizer.register_step_pre_hook(self)

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        strength = self.start * RISE ** (self.done / self.steps).clamp(max=1)
        for weight, grid in self.weights:
            if weight.grad is not None:
                weight.grad += (weight - snap(weight, grid)[0]) * (2 / weight.numel() * strength)
        self.done += 1
