"""A network with integer weights as an ONNX graph.

Each quantized weight is an INT8, INT4 or INT2 initializer followed by a DequantizeLinear. Each activation quantizer is
a QuantizeLinear followed by a DequantizeLinear.

The graph follows the torch.fx trace node for node, except for a batch norm after a convolution with integer weights.
Such a batch norm is folded into the bias of the convolution and into one scale for each output channel; the integers
keep their magnitudes. Left between a convolution and a QuantizeLinear, it would prevent runtimes from using integer
kernels. The package onnx is needed.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..grid import nonzero_scale
from ..hooks import eval_mode
from ..quantizers import Quantizer
from ..tracing import called_module, check_same, conv_norm_pairs, is_sum, operation, trace
from .packed_file import IntegerWeight
from .packing import pack_bits

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSET, OPSET_INT2 = 21, 25  # the opsets that introduced INT4 and INT2
IR_VERSION, IR_VERSION_INT2 = 10, 13


def to_onnx(
    model: nn.Module,
    integers: dict[str, IntegerWeight],
    image_size: int = 32,
    normalize: tuple[Tensor, Tensor] | None = None,
    int8: bool = False,
) -> "ModelProto":
    """The onnx.ModelProto of `model` in eval mode, with `integers`, as `integer_weights` returns them, as its weights.

    The input "images" is float32 [batch, C, S, S], already normalized; S is `image_size`, and C is what the first
    convolution takes. With `normalize`, the mean and std [C] in units of 0..255, the input is uint8 [batch, S, S, C],
    as in an image file, and the graph normalizes it. The output "logits" is float32 [batch, classes].

    A bit-width without an ONNX type is stored in the next wider type: 3 bits in INT4, 5 to 7 bits in INT8. int8=True
    stores every bit-width in INT8. The file is larger, but runtimes without 4-bit kernels, such as onnxruntime on a
    CPU, can then compute convolutions in integers.

    Raises ValueError, with its name, for a layer or operation that cannot be exported; for a network that does not take
    one batch of images or does not return one tensor; and for parameters or buffers that are not float32.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.dtype != torch.float32 and (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"{name} is {value.dtype}: ONNX files hold float32 networks (call model.float())")
    with eval_mode(model):
        return _Builder(model, integers, 8 if int8 else 2).build(image_size, normalize)


class _Builder:
    def __init__(self, model: nn.Module, integers: dict[str, IntegerWeight], narrowest: int) -> None:
        self.model, self.name = model, type(model).__name__
        self.integers = dict(integers)
        self.narrowest = narrowest  # bits of the narrowest integer type to use
        self.biases: dict[str, str] = {}  # names of the biases from folded batch norms, by convolution
        self.dequantized: dict[str, str] = {}  # names of dequantized weights, by parameter
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def build(self, image_size: int, normalize: tuple[Tensor, Tensor] | None) -> "ModelProto":
        from onnx import TensorProto

        channels = self.image_channels()
        graph = trace(self.model)
        if [node.op for node in graph.nodes].count("placeholder") == 1:  # `output_of` refuses several, by name
            check_same(self.model, fx.GraphModule(self.model, graph), [self.sample(channels, image_size)])
        output = self.output_of(graph, normalize)
        if normalize:
            return self.proto(output, TensorProto.UINT8, [image_size, image_size, channels])
        return self.proto(output, TensorProto.FLOAT, [channels, image_size, image_size])

    def image_channels(self) -> int:
        """Number of channels of the images, which is what the first convolution takes."""
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
        raise ValueError(f"{self.name} has no Conv2d, so it takes no images: it cannot be exported to ONNX")

    def output_of(self, graph: fx.Graph, normalize: tuple[Tensor, Tensor] | None) -> str:
        """Adds all nodes of `graph` and returns the name of its output."""
        folded = self.fold_batch_norms(graph)
        names: dict[fx.Node, str] = {}
        *nodes, output = graph.nodes
        for node in nodes:
            if node in folded:
                names[node] = names[node.args[0]]
            elif node.op == "placeholder" and names:
                raise ValueError(f"{self.name} has a second input, {node.name}: it cannot be exported to ONNX")
            elif node.op == "placeholder":
                names[node] = self.normalized("images", *normalize) if normalize else "images"
            else:
                names[node] = self.translate(node, [names[a] for a in node.args if isinstance(a, fx.Node)])
        if not isinstance(output.args[0], fx.Node):
            raise ValueError(f"{self.name} does not return a single tensor: it cannot be exported to ONNX")
        return names[output.args[0]]

    def proto(self, output: str, image_type: int, image_shape: list[int]) -> "ModelProto":
        """The checked ONNX model of the nodes so far. Its output "logits" is the value named `output`."""
        from onnx import TensorProto, checker, helper, shape_inference

        graph = helper.make_graph(
            [*self.nodes, helper.make_node("Identity", [output], ["logits"])], self.name,
            [helper.make_tensor_value_info("images", image_type, ["batch", *image_shape])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            self.initializers,
        )  # fmt: skip
        has_int2 = any(tensor.data_type == TensorProto.INT2 for tensor in self.initializers)
        opset = helper.make_opsetid("", OPSET_INT2 if has_int2 else OPSET)
        version = IR_VERSION_INT2 if has_int2 else IR_VERSION
        model = helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="psgd")
        try:
            checker.check_model(model, full_check=True)
        except shape_inference.InferenceError as error:
            raise ValueError(f"{self.name} cannot be exported to ONNX: {' '.join(str(error).split())}") from None
        return model

    def sample(self, channels: int, image_size: int) -> Tensor:
        """Two images of noise, on the model's device."""
        images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
        return images.to(next(self.model.parameters()).device)

    def fold_batch_norms(self, graph: fx.Graph) -> set[fx.Node]:
        """Folds each batch norm that follows a convolution with integer weights. Returns the folded calls."""
        folded = set()
        for call, following in conv_norm_pairs(self.model, graph):
            name, conv, norm = operation(call), called_module(self.model, call), called_module(self.model, following)
            if f"{name}.weight" not in self.integers or not isinstance(conv, nn.Conv2d):
                continue
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                bias = self.fold(f"{name}.weight", conv, norm)
                self.biases[name] = self.constant(f"{operation(following)}.bias", bias)
                folded.add(following)
        return folded

    def fold(self, weight: str, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        """Folds `norm` into the integers and the scale of `weight`, and returns the new bias of `conv`, shape [C].

        The new scale is scale * |gamma| / sigma, the new bias is beta + (bias - mean) * gamma / sigma, and the integers
        take the sign of gamma.
        """
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        factor = (norm.weight / (var + norm.eps).sqrt()).detach()
        column = factor.view(-1, 1, 1, 1)
        values, scale, bits = self.integers[weight]
        signed = values * column.sign().to(values.dtype)
        self.integers[weight] = IntegerWeight(signed, nonzero_scale(scale * column.abs()), bits)
        before = conv.bias if conv.bias is not None else 0
        return norm.bias + (before - mean) * factor

    def emit(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        from onnx import helper

        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Tensor) -> str:
        """Adds an initializer, unless there is one of that name, and returns its name."""
        from onnx import numpy_helper

        if all(tensor.name != name for tensor in self.initializers):
            array = value.detach().cpu().contiguous().numpy()
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def parameter(self, name: str) -> str:
        """Name of the value of the parameter `name`: dequantized if it has integers, otherwise in float."""
        from onnx import TensorProto, helper

        layer, _, key = name.rpartition(".")
        if key not in self.model.get_submodule(layer)._parameters:
            raise ValueError(
                f"{name} is computed by its layer (weight_norm, spectral_norm or a pruning mask): it cannot be "
                "exported to ONNX; make it a parameter first (remove_weight_norm, prune.remove, ...)"
            )
        if name not in self.integers:
            return self.constant(name, self.model.get_parameter(name))
        if name in self.dequantized:  # for a layer that is called more than once
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
        centered = self.emit("Sub", [values, self.constant("mean", mean.float())])
        scaled = self.emit("Div", [centered, self.constant("std", std.float())])
        return self.emit("Transpose", [scaled], perm=[0, 3, 1, 2])

    def translate(self, node: fx.Node, inputs: list[str]) -> str:
        if node.op == "call_module":
            return self.layer(operation(node), self.model.get_submodule(operation(node)), inputs)
        if is_sum(node):
            return self.emit("Add", inputs)
        if operation(node) == "flatten" and (node.args[1:], dict(node.kwargs)) in (((1,), {}), ((), {"start_dim": 1})):
            return self.emit("Flatten", inputs, axis=1)
        raise ValueError(f"the operation {operation(node)} ({node.name}) cannot be exported to ONNX")

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
            keys = ["weight", "bias", "running_mean", "running_var"]
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
        """A QuantizeLinear and DequantizeLinear pair in uint8.

        A signed quantizer is uint8 too, with zero_point 128: runtimes have no kernels that mix signed and unsigned.
        """
        offset = -module.quant_min
        zero = self.constant(f"zero_point_{offset}", torch.tensor(offset, dtype=torch.uint8))
        scale = self.constant(f"{name}.scale", module.scale)
        if module.quant_max - module.quant_min < 255:  # at 8 bits uint8 saturates by itself
            top = self.constant(f"{name}.top", module.scale * module.quant_max)
            bottom = self.constant(f"{name}.bottom", module.scale * module.quant_min)
            inputs = [self.emit("Clip", [*inputs, bottom, top])]
        integers = self.emit("QuantizeLinear", [*inputs, scale, zero])
        return self.emit("DequantizeLinear", [integers, scale, zero])
