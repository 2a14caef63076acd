"""Post-training methods: they improve a quantized network with training images, without training it.

All of them need training images without augmentation; never give them test images. They change the given quantized
network in place; a call that fails leaves it as it was. A batch is a tensor of images, or (images, labels) as a data
loader yields it.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from .grid import Grid, weight_scale
from .hooks import Batch, images_of, restored_on_error, watch
from .kinds import CONV1D, LINEAR, PLAIN, kind_of, layer_of, parameter_of
from .layers import layer_grids

# AdaRound (Nagel et al. 2020) learns each rounding as a stretched sigmoid with a regularizer that sharpens over time.
STRETCH = (-0.1, 1.1)  # range of the sigmoid before it is clamped to 0 ... 1
BETA = (20.0, 2.0)  # first and last exponent of the regularizer
REGULARIZER = 0.01  # weight of the regularizer in the loss
WARM_UP = 0.2  # share of the iterations without the regularizer
SAMPLES = 32  # images per iteration


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
    """Replaces the batch-norm statistics of `model` by their averages over `batches`. Returns `model` in eval mode
    (ours).

    Quantized weights shift the inputs of batch norm. Statistics taken with the quantized weights undo the shift. Each
    batch holds images [N, C, H, W], and all batches should have about the same N. All other modules are in eval mode
    meanwhile; with torch's update_bn, dropout and stochastic depth would be active. A batch norm that is not called,
    such as that of an auxiliary head, keeps its statistics.

    Raises ValueError for a network without batch-norm statistics, if `batches` is empty, and for statistics that are
    not finite.
    """
    kind = nn.modules.batchnorm._BatchNorm
    names = {m: name for name, m in model.named_modules() if isinstance(m, kind) and m.track_running_stats}
    norms = [*names]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch-norm statistics to re-estimate")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("re-estimating batch norm needs at least one batch of images")
    before = {norm: {key: value.clone() for key, value in norm.named_buffers()} for norm in norms}
    momenta = [norm.momentum for norm in norms]
    with restored_on_error(model):
        model.eval()
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            for batch in chain([first], batches):
                model(images_of(batch))
            for norm, buffers in before.items():
                if not norm.get_buffer("num_batches_tracked"):
                    norm.load_state_dict(buffers, strict=False)
                moments = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
                _check_finite(*moments, of=f"the inputs of {names[norm]}")
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    return model.eval()


@torch.no_grad()
def correct_bias(
    quantized: nn.Module, model: nn.Module, batches: Iterable[Batch], first_last: bool = True
) -> nn.Module:
    """Corrects the bias of every quantized layer so that the layer's mean output equals that in the float network
    `model`. Returns `quantized` in eval mode.

    The layers are corrected in the order in which they run, each after those before it. The mean is that of each output
    channel over `batches`. A convolution without a bias gets one. Corrected biases of linear layers are not on their
    grid, where a later export would round them: keep biases in float with Grid(4, exclude="*.bias"). Source: bias
    correction (Nagel et al. 2019), but with images instead of batch-norm statistics. Raises ValueError if `batches` is
    empty, for outputs that are not finite, for a layer that only the float network calls, and for a bias that is
    computed, as by pruning.
    """
    batches = list(batches)
    with restored_on_error(quantized):
        for name in layers_in_order(model, batches, layer_grids(model, Grid(8, first_last))):
            layer = quantized.get_submodule(name)
            calls = [capture(network, name, batches) for network in (model, quantized)]
            if not calls[1]:
                raise ValueError(f"{name} is not called in the quantized network, as it is in the float one")
            wanted, found = (_mean_output(layer, own) for own in calls)
            shift = wanted - found
            _check_finite(shift, of=f"the outputs of {name}")
            bias = cast(Tensor | None, layer.bias)
            if bias is None:
                layer.bias = nn.Parameter(shift, requires_grad=layer.get_parameter("weight").requires_grad)
            elif isinstance(bias, nn.Parameter):
                bias.add_(shift)
            else:
                raise ValueError(f"{name}.bias is computed from other parameters, and cannot be corrected")
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
    """Rounds each weight of `quantized` up or down so that its layer's outputs change least from those in the float
    network `model`. Returns `quantized` in eval mode.

    Adam learns the roundings layer by layer, in the order in which the layers run: `iterations` steps for each layer,
    on SAMPLES images each, with learning rate `lr`. `seed` determines the choice of images. The loss is the squared
    difference between the layer's outputs in `model` and those in `quantized`, where its inputs are quantized already.
    Source: AdaRound (Nagel et al. 2020).

    Biases stay rounded to the nearest grid point, and so do computed weights, as by spectral_norm. Weights that are
    zero in `model`, such as pruned ones, stay zero. A weight that several layers share is learned in the first of them.
    Raises ValueError for full precision, if `batches` is empty, and for inputs and outputs of a layer that are not
    finite, or that differ in shape between the two networks.
    """
    batches = list(batches)
    grids = layer_grids(model, grid)
    generator = torch.Generator().manual_seed(seed)
    with restored_on_error(quantized):
        for name in layers_in_order(model, batches, grids):
            own = grids.get(parameter_of(name, "weight"))
            if own is None:
                continue
            layer, weight = quantized.get_submodule(name), model.get_submodule(name).get_parameter("weight").detach()
            calls, float_calls = (capture(network, name, batches) for network in (quantized, model))
            if [x.shape for x, _ in calls] != [x.shape for x, _ in float_calls]:
                raise ValueError(f"{name} has other inputs in the quantized network than in the float one")
            inputs, targets = torch.cat([x for x, _ in calls]), torch.cat([output for _, output in float_calls])
            _check_finite(inputs, targets, of=f"the inputs or outputs of {name}")
            rounding = _Rounding(weight, own)
            learned = rounding.learn(layer, inputs, targets, iterations, lr, generator)
            with torch.no_grad():
                layer.get_parameter("weight").copy_(learned)
    return quantized.eval()


class _Rounding:
    """The roundings of one weight tensor: a stretched sigmoid of logits that start at the float weights."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.quant_max, self.kept = grid.quant_max, weight != 0
        self.scale = weight_scale(weight, grid)
        self.floor = (weight / self.scale).floor()
        low, high = STRETCH
        share = ((weight / self.scale - self.floor).clamp(0.01, 0.99) - low) / (high - low)
        self.logits = torch.logit(share).requires_grad_()
        # The largest weight sets the scale, which would change with it.
        self.fixed = weight.abs() >= self.scale * self.quant_max * (1 - 1e-6)

    def up(self) -> Tensor:
        """How far each weight is rounded up, from 0 (down) to 1 (up)."""
        low, high = STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1)

    def on_grid(self, up: Tensor) -> Tensor:
        integers = torch.where(self.fixed, self.quant_max * self.floor.sign(), self.floor + up)
        return integers.clamp(-self.quant_max, self.quant_max) * self.scale * self.kept

    @torch.enable_grad()
    def learn(
        self, layer: nn.Module, inputs: Tensor, targets: Tensor, iterations: int, lr: float, generator: torch.Generator
    ) -> Tensor:
        """Learns the roundings that bring the outputs of `layer` closest to `targets`. Returns the rounded weights."""
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


def _check_finite(*tensors: Tensor, of: str) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{of} are not finite on these images: nothing can be fitted to them")


def capture(model: nn.Module, name: str, batches: Iterable[Batch]) -> list[tuple[Tensor, Tensor]]:
    """The input and output of every call of the layer `name` while `model` runs `batches` in eval mode."""
    held: list[tuple[Tensor, Tensor]] = []
    watch(model, [name], batches, lambda _, layer_input, output: held.append((layer_input.clone(), output.clone())))
    return held


def _mean_output(layer: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of each output channel over the `calls` of a layer like `layer`, shape [C]."""
    channel = -1 if kind_of(layer) in (LINEAR, CONV1D) else 1
    outputs = [output.movedim(channel, 0).flatten(1) for _, output in calls]
    sums = reduce(torch.add, [part.cpu().double().sum(1) for part in outputs])
    return (sums / sum(part.shape[1] for part in outputs)).to(outputs[0])


def layers_in_order(model: nn.Module, batches: Sequence[Batch], parameters: Iterable[str]) -> list[str]:
    """Names of the layers that own `parameters` (state_dict names), in the order in which they run in eval mode.

    These are layers that take one tensor and return one (`quant.kinds.PLAIN`), so neither nn.MultiheadAttention itself
    nor a stack of experts. One warning names the layers that are not called, such as an auxiliary head or a layer whose
    weights are used without calling it. Raises ValueError if `batches` is empty.
    """
    if not batches:
        raise ValueError("the layers of a network are found by running it, which needs at least one batch of images")
    owners = dict.fromkeys(map(layer_of, parameters))
    names = [name for name in owners if kind_of(model.get_submodule(name)) in PLAIN]
    order: dict[str, None] = {}
    watch(model, names, batches, lambda name, *_: order.setdefault(name))
    silent = [name for name in names if name not in order]
    if silent:
        warnings.warn(f"not called in eval mode, and so left out: {', '.join(silent)}", stacklevel=3)
    return list(order)
