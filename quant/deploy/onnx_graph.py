"""A network with integer weights as an ONNX graph: each quantized weight an INT8, INT4 or INT2 initializer behind a
DequantizeLinear, each activation quantizer a QuantizeLinear and DequantizeLinear pair.

Built from the torch.fx trace, node for node, but for batch norm behind a convolution with integer weights: it becomes
that convolution's bias and one scale for each output channel, the integers staying as they are. Between a convolution
and a QuantizeLinear it would keep runtimes from their integer kernels. Needs the package onnx.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..grid import nonzero_scale
from ..hooks import eval_mode
from ..quantizers import Quantizer
from ..tracing import check_same, conv_norm_pairs, is_sum, trace
from .packed_file import IntegerWeight
from .packing import pack_bits

OPSET, OPSET_INT2 = 21, 25  # INT4 came with the first, INT2 with the second
IR_VERSION, IR_VERSION_INT2 = 10, 13


def to_onnx(
    model: nn.Module,
    integers: dict[str, IntegerWeight],
    image_size: int = 32,
    normalize: tuple[Tensor, Tensor] | None = None,
    int8: bool = False,
) -> Any:
    """The onnx.ModelProto of `model` in eval mode, with `integers`, as `integer_weights` gives them, for its weights.

    Input "images": float32 [batch, C, S, S], already normalized, C being what the first convolution takes; with
    `normalize`, mean and std [C] in units of 0..255, uint8 [batch, S, S, C] as a file holds them. Output "logits":
    float32 [batch, classes]. A bit-width without an ONNX type goes into the next wider one: 3 into INT4, 5 to 7 into
    INT8. With `int8` all go into INT8: a larger file of the same numbers, which runtimes without 4-bit kernels
    (onnxruntime on a CPU) can convolve as integers.

    Raises ValueError naming the layer or operation that has no counterpart here, for a network that does not take one
    batch of images and give one tensor, and for parameters that are not float32.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.dtype != torch.float32 and (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"{name} is {value.dtype}: ONNX files are of float32 networks (model.float())")
    with eval_mode(model):
        return _Builder(model, integers, 8 if int8 else 2).build(image_size, normalize)


class _Builder:
    def __init__(self, model: nn.Module, integers: dict[str, IntegerWeight], narrowest: int) -> None:
        self.model, self.integers = model, dict(integers)
        self.narrowest = narrowest  # bits of the narrowest integer type to use
        self.biases: dict[str, str] = {}  # of convolutions, from batch norm
        self.dequantized: dict[str, str] = {}
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def build(self, image_size: int, normalize: tuple[Tensor, Tensor] | None) -> Any:
        from onnx import TensorProto, checker, helper, shape_inference

        name = type(self.model).__name__
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        if not convolutions:
            raise ValueError(f"{name} has no Conv2d, so that it takes no images: it cannot be exported to ONNX")
        channels = convolutions[0].in_channels
        image = [image_size, image_size, channels] if normalize else [channels, image_size, image_size]
        kind = TensorProto.UINT8 if normalize else TensorProto.FLOAT
        names: dict[fx.Node, str] = {}
        result = None
        traced = trace(self.model)
        if [node.op for node in traced.nodes].count("placeholder") == 1:  # more are refused below, by name
            check_same(self.model, fx.GraphModule(self.model, traced), [self.sample(channels, image_size)])
        folded = self.fold_batch_norm(traced)
        for node in traced.nodes:
            if node in folded:
                names[node] = names[node.args[0]]
            elif node.op == "placeholder" and names:
                raise ValueError(f"{name} has a second input, {node.name}: it cannot be exported to ONNX")
            elif node.op == "placeholder":
                names[node] = self.normalized("images", *normalize) if normalize else "images"
            elif node.op == "output" and not isinstance(node.args[0], fx.Node):
                raise ValueError(f"{name} gives more than one tensor: it cannot be exported to ONNX")
            elif node.op == "output":
                result = names[node.args[0]]
            else:
                names[node] = self.translate(node, [names[a] for a in node.args if isinstance(a, fx.Node)])
        self.nodes.append(helper.make_node("Identity", [result], ["logits"]))
        graph = helper.make_graph(
            self.nodes, name,
            [helper.make_tensor_value_info("images", kind, ["batch", *image])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            self.initializers,
        )  # fmt: skip
        has_int2 = any(tensor.data_type == TensorProto.INT2 for tensor in self.initializers)
        opset = helper.make_opsetid("", OPSET_INT2 if has_int2 else OPSET)
        version = IR_VERSION_INT2 if has_int2 else IR_VERSION
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="psgd")
        try:
            checker.check_model(proto, full_check=True)
        except shape_inference.InferenceError as error:
            raise ValueError(f"{name} cannot be exported to ONNX: {' '.join(str(error).split())}") from None
        return proto

    def sample(self, channels: int, image_size: int) -> Tensor:
        """Two images of noise, on the model's device."""
        images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
        return images.to(next(self.model.parameters()).device)

    def fold_batch_norm(self, graph: fx.Graph) -> set[fx.Node]:
        """Takes the batch norms that alone follow a convolution with integer weights into its scale and bias.

        gamma / sigma * s and beta + gamma / sigma * (bias - mean); the sign of gamma goes to the integers.
        """
        folded = set()
        for call, following in conv_norm_pairs(self.model, graph):
            conv, norm = self.model.get_submodule(call.target), self.model.get_submodule(following.target)
            name = f"{call.target}.weight"
            if name in self.integers and norm.affine:
                values, scale, bits = self.integers[name]
                factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
                column = factor.view(-1, 1, 1, 1)
                signed = values * column.sign().to(values.dtype)
                self.integers[name] = IntegerWeight(signed, nonzero_scale(scale * column.abs()), bits)
                before = conv.bias if conv.bias is not None else 0
                bias = norm.bias + (before - norm.running_mean) * factor
                self.biases[call.target] = self.constant(f"{following.target}.bias", bias)
                folded.add(following)
        return folded

    def emit(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        from onnx import helper

        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Tensor) -> str:
        """Adds a float initializer, once, and returns its name."""
        from onnx import numpy_helper

        if all(tensor.name != name for tensor in self.initializers):
            array = value.detach().cpu().contiguous().numpy()
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def parameter(self, name: str) -> str:
        """The parameter `name`: dequantized if it has integers, else in float."""
        from onnx import TensorProto, helper

        layer, _, key = name.rpartition(".")
        if key not in self.model.get_submodule(layer)._parameters:
            raise ValueError(
                f"{name} is computed by its layer, as by weight_norm, spectral_norm or a pruning mask: it cannot be "
                "exported to ONNX; make it a parameter first (remove_weight_norm, prune.remove, ...)"
            )
        if name not in self.integers:
            return self.constant(name, self.model.get_parameter(name))
        if name in self.dequantized:  # by a layer that is called more than once
            return self.dequantized[name]
        values, scale, bits = self.integers[name]
        bits = max(bits, self.narrowest)
        kind, width = (
            (TensorProto.INT8, 8) if bits > 4 else (TensorProto.INT4, 4) if bits > 2 else (TensorProto.INT2, 2)
        )
        packed = pack_bits(values.contiguous(), width).cpu().numpy().tobytes()  # ONNX packs in the same order
        self.initializers.append(helper.make_tensor(f"{name}.integers", kind, list(values.shape), packed, raw=True))
        scale_name = self.constant(f"{name}.scale", scale.flatten() if scale.dim() else scale)
        axis = {"axis": 0} if scale.dim() else {}
        self.dequantized[name] = self.emit("DequantizeLinear", [f"{name}.integers", scale_name], **axis)
        return self.dequantized[name]

    def normalized(self, images: str, mean: Tensor, std: Tensor) -> str:
        from onnx import TensorProto

        values = self.emit("Cast", [images], to=TensorProto.FLOAT)
        centred = self.emit("Sub", [values, self.constant("mean", mean.float())])
        scaled = self.emit("Div", [centred, self.constant("std", std.float())])
        return self.emit("Transpose", [scaled], perm=[0, 3, 1, 2])

    def translate(self, node: fx.Node, inputs: list[str]) -> str:
        if node.op == "call_module":
            return self.layer(node.target, self.model.get_submodule(node.target), inputs)
        if is_sum(node):
            return self.emit("Add", inputs)
        operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if operation == "flatten" and (node.args[1:], dict(node.kwargs)) in (((1,), {}), ((), {"start_dim": 1})):
            return self.emit("Flatten", inputs, axis=1)
        raise ValueError(f"the operation {operation} ({node.name}) cannot be exported to ONNX")

    def layer(self, name: str, module: nn.Module, inputs: list[str]) -> str:
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and module.padding_mode == "zeros":
            weights = [self.parameter(f"{name}.weight")]
            if name in self.biases:
                weights.append(self.biases[name])
            elif module.bias is not None:
                weights.append(self.parameter(f"{name}.bias"))
            return self.emit(
                "Conv", inputs + weights, strides=list(module.stride), pads=list(module.padding) * 2,
                dilations=list(module.dilation), group=module.groups,
            )  # fmt: skip
        if isinstance(module, nn.Linear):
            keys = ["weight"] if module.bias is None else ["weight", "bias"]
            return self.emit("Gemm", inputs + [self.parameter(f"{name}.{key}") for key in keys], transB=1)
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            keys = ("weight", "bias", "running_mean", "running_var")
            moments = [self.constant(f"{name}.{key}", getattr(module, key)) for key in keys]
            return self.emit("BatchNormalization", inputs + moments, epsilon=module.eps)
        if isinstance(module, nn.ReLU):
            return self.emit("Relu", inputs)
        if isinstance(module, Quantizer):
            return self.quantizer(name, module, inputs)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return self.emit("GlobalAveragePool", inputs)
        if isinstance(module, nn.MaxPool2d) and module.dilation in (1, (1, 1)) and not module.ceil_mode:
            kernel, strides, pads = ([value] * 2 if isinstance(value, int) else list(value)
                                     for value in (module.kernel_size, module.stride, module.padding))  # fmt: skip
            return self.emit("MaxPool", inputs, kernel_shape=kernel, strides=strides, pads=pads * 2)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self.emit("Flatten", inputs, axis=1)
        if isinstance(module, (nn.Dropout, nn.Identity)):
            return inputs[0]
        raise ValueError(f"{name}, a {type(module).__name__}, cannot be exported to ONNX")

    def quantizer(self, name: str, module: Quantizer, inputs: list[str]) -> str:
        """A uint8 pair. A signed quantizer has its zero at 128: runtimes have no kernels that take both kinds."""
        offset = -module.quant_min
        zero = self.constant(f"zero_point_{offset}", torch.tensor(offset, dtype=torch.uint8))
        scale = self.constant(f"{name}.scale", module.scale)
        if module.quant_max - module.quant_min < 255:  # a uint8 saturates by itself only at 8 bits
            top = self.constant(f"{name}.top", module.scale * module.quant_max)
            bottom = self.constant(f"{name}.bottom", module.scale * module.quant_min)
            inputs = [self.emit("Clip", [*inputs, bottom, top])]
        integers = self.emit("QuantizeLinear", [*inputs, scale, zero])
        return self.emit("DequantizeLinear", [integers, scale, zero])
