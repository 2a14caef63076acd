"""Post-training methods: what can be done to a quantized network with training images, layer by layer or at once.

All take unaugmented training images, never test images, and change the quantized network that they are given; a call
that fails leaves it as it was. A batch is a tensor of images, or (images, labels) as a data loader gives it.
"""

import warnings
from collections.abc import Iterable
from functools import reduce
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from .grid import Grid, weight_scale
from .hooks import Batch, images_of, restored_on_error, watch
from .layers import layer_grids

# AdaRound (Nagel et al. 2020): a rounding is a stretched sigmoid, and its regularizer sharpens from BETA[0] to BETA[1].
STRETCH = (-0.1, 1.1)
BETA = (20.0, 2.0)
REGULARIZER = 0.01
WARM_UP = 0.2  # share of the iterations without the regularizer
SAMPLES = 32  # images a step


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """`model` itself, in eval mode, with batch-norm statistics that are the averages over `batches`. Source: ours.

    Quantized weights shift what batch norm sees; statistics taken with the weights as deployed undo the shift.
    `batches` hold images [N, C, H, W], equally or nearly equally many. All but batch norm is in eval mode while
    the statistics are taken: torch's update_bn would let dropout and stochastic depth draw.

    Raises ValueError for a network without batch-norm statistics, and if `batches` is empty.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch-norm statistics to re-estimate")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("re-estimating batch norm needs at least one batch of images")
    momenta = [norm.momentum for norm in norms]
    with restored_on_error(model):
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the average over batches
                norm.train()
            for batch in chain([first], batches):
                model(images_of(batch))
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def correct_bias(
    quantized: nn.Module, model: nn.Module, batches: Iterable[Batch], first_last: bool = True
) -> nn.Module:
    """`quantized` itself, in eval mode, with a bias in every quantized layer that restores its mean output in `model`.

    Layer by layer, in the order in which they run, the mean of each output channel over `batches` is brought back to
    that of the float network, the layers before being corrected already (bias correction, Nagel et al. 2019, with
    images instead of batch-norm statistics). A convolution without a bias gets one.
    """
    batches = list(batches)
    with restored_on_error(quantized):
        for name in layers_in_order(model, batches[0], layer_grids(model, Grid(8, first_last))):
            layer = quantized.get_submodule(name)
            shift = _mean_output(model, name, batches) - _mean_output(quantized, name, batches)
            bias = cast(Tensor | None, layer.bias)
            layer.bias = nn.Parameter(shift if bias is None else bias + shift)
    return quantized.eval()


def adaround(
    quantized: nn.Module,
    model: nn.Module,
    batches: Iterable[Batch],
    grid: Grid | int,
    iterations: int = 1000,
    lr: float = 0.01,
    seed: int = 0,
) -> nn.Module:
    """`quantized` itself with each weight rounded up or down, as suits its layer's output best, not to the nearest.

    Layer by layer, in the order in which they run, the roundings are learned by Adam: `iterations` steps on SAMPLES
    images each, on the squared difference between the output of the float network's layer and that of the quantized
    layer on its own, already quantized input (AdaRound, Nagel et al. 2020). Biases stay rounded to the nearest, as do
    the weights of spectral_norm and its kin, and weights that are zero in `model`, as pruned ones are, stay zero. A
    weight that layers share is learned in the first of them.
    """
    batches = list(batches)
    grids = layer_grids(model, grid)
    generator = torch.Generator().manual_seed(seed)
    with restored_on_error(quantized):
        for name in layers_in_order(model, batches[0], grids):
            if f"{name}.weight" not in grids:
                continue
            layer, weight = quantized.get_submodule(name), model.get_parameter(f"{name}.weight").detach()
            inputs = torch.cat([layer_input for layer_input, _ in capture(quantized, name, batches)])
            targets = torch.cat([output for _, output in capture(model, name, batches)])
            rounding = _Rounding(weight, grids[f"{name}.weight"])
            learned = rounding.learn(layer, inputs, targets, iterations, lr, generator)
            with torch.no_grad():
                layer.get_parameter("weight").copy_(learned)
    return quantized.eval()


class _Rounding:
    """The roundings of one weight, down or up, as a stretched sigmoid of logits that start at the float weight."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.quant_max, self.kept = grid.quant_max, weight != 0
        self.scale = weight_scale(weight, grid)
        self.floor = (weight / self.scale).floor()
        low, high = STRETCH
        share = ((weight / self.scale - self.floor).clamp(0.01, 0.99) - low) / (high - low)
        self.logits = torch.logit(share).requires_grad_()

    def up(self) -> Tensor:
        """How far each weight is rounded up, 0 to 1."""
        low, high = STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1)

    def on_grid(self, up: Tensor) -> Tensor:
        return (self.floor + up).clamp(-self.quant_max, self.quant_max) * self.scale * self.kept

    def learn(
        self, layer: nn.Module, inputs: Tensor, targets: Tensor, iterations: int, lr: float, generator: torch.Generator
    ) -> Tensor:
        """The weight on its grid, each element rounded as brings the outputs of `layer` nearest to `targets`."""
        optimizer = torch.optim.Adam([self.logits], lr=lr)
        for step in range(iterations):
            chosen = torch.randint(len(inputs), (SAMPLES,), generator=generator).to(inputs.device)
            up = self.up()
            output = torch.func.functional_call(layer, {"weight": self.on_grid(up)}, (inputs[chosen],))
            loss = (output - targets[chosen]).square().sum(1).mean()
            progress = (step / iterations - WARM_UP) / (1 - WARM_UP)
            if progress > 0:
                beta = BETA[0] + (BETA[1] - BETA[0]) * progress
                loss = loss + REGULARIZER * (1 - (2 * up - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return self.on_grid((self.up() >= 0.5).to(self.floor.dtype))


def capture(model: nn.Module, name: str, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the layer `name` for each time that it is called on `batches`, in eval mode."""
    held: list[tuple[Tensor, Tensor]] = []
    watch(model, [name], batches, lambda _, layer_input, output: held.append((layer_input.clone(), output.clone())))
    return held


def _mean_output(model: nn.Module, name: str, batches: list[Batch]) -> Tensor:
    """Mean of each output channel of the layer `name` over `batches` [C]."""
    channel = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
    outputs = [output.movedim(channel, 0).flatten(1) for _, output in capture(model, name, batches)]
    sums = reduce(torch.add, [part.cpu().double().sum(1) for part in outputs])
    return (sums / sum(part.shape[1] for part in outputs)).to(outputs[0])


def layers_in_order(model: nn.Module, batch: Batch, parameters: Iterable[str]) -> list[str]:
    """Names of the layers that have `parameters` (state_dict names), in the order in which they run in eval mode.

    One warning names those that do not run, such as an auxiliary head, or a layer whose weights are used without a
    call of it.
    """
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in parameters))
    order: dict[str, None] = {}
    watch(model, names, [images_of(batch)[:1]], lambda name, *_: order.setdefault(name))
    silent = [name for name in names if name not in order]
    if silent:
        warnings.warn(f"not called in eval mode, and so left out: {', '.join(silent)}", stacklevel=3)
    return list(order)
