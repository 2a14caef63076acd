"""A network with integer weights as an ONNX graph: each quantized weight an INT8, INT4 or INT2 initializer behind a
DequantizeLinear, each activation quantizer a QuantizeLinear and DequantizeLinear pair.

Built from the torch.fx trace, node for node, so that nothing is folded or rewritten and a runtime may fuse integer
kernels. Needs the package onnx.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from .activations import ActivationQuantizer, trace
from .packing import pack_bits

OPSET, OPSET_INT2 = 21, 25  # INT4 came with the first, INT2 with the second
IR_VERSION, IR_VERSION_INT2 = 10, 13


def to_onnx(
    model: nn.Module,
    integers: dict[str, tuple[Tensor, Tensor, int]],
    image_size: int = 32,
    normalize: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """The onnx.ModelProto of `model` in eval mode, with `integers`, as `integer_weights` gives them, for its weights.

    Input "images": float32 [batch, 3, S, S], already normalised; with `normalize`, mean and std [3] in units of 0..255,
    uint8 [batch, S, S, 3] as a file holds them. Output "logits": float32 [batch, classes]. A bit-width without an ONNX
    type goes into the next wider one: 3 into INT4, 5 to 7 into INT8.

    Raises ValueError naming the layer or operation that has no counterpart here.
    """
    return _Builder(model.eval(), integers).build(image_size, normalize)


class _Builder:
    def __init__(self, model: nn.Module, integers: dict[str, tuple[Tensor, Tensor, int]]) -> None:
        self.model, self.integers = model, integers
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def build(self, image_size: int, normalize: tuple[Tensor, Tensor] | None) -> Any:
        from onnx import TensorProto, checker, helper

        image = ["batch", image_size, image_size, 3] if normalize else ["batch", 3, image_size, image_size]
        kind = TensorProto.UINT8 if normalize else TensorProto.FLOAT
        names: dict[fx.Node, str] = {}
        result = None
        for node in trace(self.model).nodes:
            if node.op == "placeholder":
                names[node] = self.normalized("images", *normalize) if normalize else "images"
            elif node.op == "output":
                result = names[node.args[0]]
            else:
                names[node] = self.translate(node, [names[a] for a in node.args if isinstance(a, fx.Node)])
        self.nodes.append(helper.make_node("Identity", [result], ["logits"]))
        graph = helper.make_graph(
            self.nodes, type(self.model).__name__,
            [helper.make_tensor_value_info("images", kind, image)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
            self.initializers,
        )  # fmt: skip
        has_int2 = any(tensor.data_type == TensorProto.INT2 for tensor in self.initializers)
        opset = helper.make_opsetid("", OPSET_INT2 if has_int2 else OPSET)
        version = IR_VERSION_INT2 if has_int2 else IR_VERSION
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=version, producer_name="psgd")
        checker.check_model(proto)
        return proto

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

        if name not in self.integers:
            return self.constant(name, self.model.get_parameter(name))
        values, scale, bits = self.integers[name]
        kind, width = (
            (TensorProto.INT8, 8) if bits > 4 else (TensorProto.INT4, 4) if bits > 2 else (TensorProto.INT2, 2)
        )
        packed = pack_bits(values.contiguous(), width).cpu().numpy().tobytes()  # ONNX packs in the same order
        self.initializers.append(helper.make_tensor(f"{name}.integers", kind, list(values.shape), packed, raw=True))
        scale_name = self.constant(f"{name}.scale", scale.flatten() if scale.dim() else scale)
        return self.emit("DequantizeLinear", [f"{name}.integers", scale_name], **({"axis": 0} if scale.dim() else {}))

    def normalized(self, images: str, mean: Tensor, std: Tensor) -> str:
        from onnx import TensorProto

        values = self.emit("Cast", [images], to=TensorProto.FLOAT)
        centred = self.emit("Sub", [values, self.constant("mean", mean.float())])
        scaled = self.emit("Div", [centred, self.constant("std", std.float())])
        return self.emit("Transpose", [scaled], perm=[0, 3, 1, 2])

    def translate(self, node: fx.Node, inputs: list[str]) -> str:
        if node.op == "call_module":
            return self.layer(node.target, self.model.get_submodule(node.target), inputs)
        operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if operation in ("add", "iadd", "add_") and len(inputs) == 2:
            return self.emit("Add", inputs)
        if operation == "flatten" and tuple(node.args[1:]) == (1,):
            return self.emit("Flatten", inputs, axis=1)
        raise ValueError(f"the operation {operation} ({node.name}) cannot be exported to ONNX")

    def layer(self, name: str, module: nn.Module, inputs: list[str]) -> str:
        if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str) and module.padding_mode == "zeros":
            weights = [self.parameter(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)]
            return self.emit(
                "Conv", inputs + weights, strides=list(module.stride), pads=list(module.padding) * 2,
                dilations=list(module.dilation), group=module.groups,
            )  # fmt: skip
        if isinstance(module, nn.Linear):
            weights = [self.parameter(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False)]
            return self.emit("Gemm", inputs + weights, transB=1)
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats:
            keys = ("weight", "bias", "running_mean", "running_var")
            moments = [self.constant(f"{name}.{key}", getattr(module, key)) for key in keys]
            return self.emit("BatchNormalization", inputs + moments, epsilon=module.eps)
        if isinstance(module, nn.ReLU):
            return self.emit("Relu", inputs)
        if isinstance(module, ActivationQuantizer):
            return self.activation(name, module, inputs)
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

    def activation(self, name: str, module: ActivationQuantizer, inputs: list[str]) -> str:
        zero = self.constant("zero_point", torch.tensor(0, dtype=torch.uint8))
        scale = self.constant(f"{name}.scale", module.scale)
        if module.quant_max < 255:  # a uint8 saturates by itself only at 8 bits
            top = self.constant(f"{name}.top", module.scale * module.quant_max)
            bottom = self.constant("zero", torch.tensor(0.0))
            inputs = [self.emit("Clip", [*inputs, bottom, top])]
        integers = self.emit("QuantizeLinear", [*inputs, scale, zero])
        return self.emit("DequantizeLinear", [integers, scale, zero])
