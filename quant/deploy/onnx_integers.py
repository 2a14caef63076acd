"""Integer weights in an ONNX graph: initializers of INT8, INT4 or INT2 behind DequantizeLinear, in place of floats."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .packed_file import IntegerWeight

if TYPE_CHECKING:
    import onnx_ir as ir

WIDTHS = (2, 4, 8)  # bits of the signed integer types of ONNX


def width_of(bits: int, narrowest: int) -> int:
    """Bits of the ONNX type that holds integers of `bits` bits; `narrowest` or more."""
    return next(width for width in WIDTHS if width >= max(bits, narrowest))


def insert_integers(
    program: "ir.Model", model: nn.Module, integers: Mapping[str, IntegerWeight], narrowest: int
) -> None:
    """Puts `integers` in place of the initializers of the same parameters in `program`, the graph of `model`.

    A parameter that eval mode never reads is not in the graph, and perhaps not in `model`, and is skipped.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    in_graph = {id(parameters[name]): name for name in program.graph.initializers if name in parameters}
    for name, weight in integers.items():
        known = in_graph.get(id(parameters.get(name)))  # perhaps by another of its names
        if known is not None:
            _insert(program.graph, program.graph.initializers.pop(known), weight, narrowest)


def _insert(graph: "ir.Graph", floats: "ir.Value", weight: IntegerWeight, narrowest: int) -> None:
    """Replaces the initializer `floats` by DequantizeLinear of integers.

    A scale along one dimension is its axis. ONNX has none along several: they are multiplied behind it.
    """
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    values, scale, bits = weight
    tape, name = Tape(), str(floats.name)
    scale = scale.reshape((1,) * (values.dim() - scale.dim()) + scale.shape)
    along = [axis for axis, size in enumerate(scale.shape) if size > 1]
    known = tape.initializer(integer_tensor(values, width_of(bits, narrowest)), f"{name}.integers")
    own = scale.reshape(-1 if along else ()) if len(along) < 2 else torch.ones(())
    attributes = {"axis": along[0]} if len(along) == 1 else {}
    result = tape.op("DequantizeLinear", [known, tape.initializer(float_tensor(own), f"{name}.scale")], attributes)
    if len(along) > 1:
        result = tape.op("Mul", [result, tape.initializer(float_tensor(scale), f"{name}.scales")])
    for value in tape.initializers:
        graph.register_initializer(value)
    graph.insert_before(graph[0], tape.nodes)
    ir.convenience.replace_all_uses_with(floats, result)


def integer_tensor(values: Tensor, width: int) -> "ir.TensorProtocol":
    """`values` as a tensor of the signed ONNX type of `width` bits."""
    import onnx_ir as ir

    kind = ir.DataType[f"INT{width}"]
    return ir.Tensor(values.contiguous().cpu().numpy().astype(kind.numpy()), dtype=kind)


def float_tensor(values: Tensor) -> "ir.TensorProtocol":
    """`values` as a float32 tensor of ONNX."""
    import onnx_ir as ir

    return ir.Tensor(values.detach().contiguous().cpu().numpy())
