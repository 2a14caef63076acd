"""A network with integer weights as an ONNX graph: exported in float by torch, with the integers put in afterwards.

Each quantized weight is an INT8, INT4 or INT2 initializer followed by a DequantizeLinear. Each activation quantizer is
a QuantizeLinear followed by a DequantizeLinear. The packages onnx, onnx-ir and onnxscript are needed.
"""

from collections.abc import Mapping
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .onnx_capture import float_program
from .onnx_integers import float_tensor, insert_integers, width_of
from .onnx_rules import apply_rules
from .packed_file import IntegerWeight

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import ModelProto

OPSET_INT2 = 25  # the first with INT2; INT4 came in 21, the opset of every other file
IR_VERSION, IR_VERSION_INT2 = 10, 13


def to_onnx(
    model: nn.Module,
    integers: Mapping[str, IntegerWeight],
    image_size: int = 32,
    normalize: tuple[Tensor, Tensor] | None = None,
    int8: bool = False,
    example_inputs: tuple[Tensor, ...] | None = None,
) -> "ModelProto":
    """The onnx.ModelProto of `model` in eval mode, with `integers`, as `integer_weights` returns them, as its weights.

    By default the network takes images. The input "images" is float32 [batch, C, S, S], already normalized; S is
    `image_size`, and C is what the first convolution takes. With `normalize`, the mean and std [C] in units of 0..255,
    the input is uint8 [batch, S, S, C], as in an image file, and the graph normalizes it. Any other network needs
    `example_inputs`, a tuple with a tensor for each argument of its forward. The inputs of the graph have the names of
    these arguments. The batch is dimension 0 of every input that is as long there as the first one, and may have any
    size; all other sizes are those of `example_inputs`. The first output is named "logits".

    A bit-width without an ONNX type is stored in the next wider type: 3 bits in INT4, 5 to 7 bits in INT8. int8=True
    stores every bit-width in INT8. The file is larger, but runtimes without 4-bit kernels, such as onnxruntime on a
    CPU, can then compute convolutions in integers.

    Raises ValueError, with the reason, for a network that cannot be exported; for example_inputs of another form; and
    for parameters or buffers that are not float32. Raises ImportError, with the line for pip, without the packages.
    """
    check_packages()
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        if value.dtype != torch.float32 and (value.is_floating_point() or value.is_complex()):
            raise ValueError(f"{name} is {value.dtype}: ONNX files hold float32 networks (call model.float())")
    if example_inputs is None:
        program = float_program(model, sample_images(model, image_size), ["images"])
    else:
        program = float_program(model, checked_batch(example_inputs))
    if normalize:
        normalize_first(program, *normalize)
    return with_integers(program, model, integers, 8 if int8 else 2)


def check_packages() -> None:
    """Raises ImportError, with the line for pip, if a package that ONNX needs is missing."""
    try:
        for name in ("onnx", "onnx_ir", "onnxscript"):
            import_module(name)
    except ImportError as error:
        wanted = 'pip install -r requirements-export.txt, or pip install "psgd[export]"'
        raise ImportError(f"{error}: {wanted}", name=error.name) from None


def sample_images(model: nn.Module, image_size: int) -> tuple[Tensor]:
    """Two images of zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (torch.zeros(2, module.in_channels, image_size, image_size),)
    raise ValueError(f"{type(model).__name__} has no Conv2d, so it takes no images: give example_inputs")


def checked_batch(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`inputs` with a batch of two or more samples: of one alone, torch.export would take the size as fixed."""
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = [type(value).__name__ for value in inputs] if isinstance(inputs, tuple) else type(inputs).__name__
        raise ValueError(f"example_inputs must be a tuple of tensors, got {kinds}")
    if not inputs[0].dim() or not len(inputs[0]):
        raise ValueError(f"example_inputs must begin with a batch, got a tensor of shape {list(inputs[0].shape)}")
    if len(inputs[0]) > 1:
        return inputs
    return tuple(x.repeat_interleave(2, 0) if x.dim() and len(x) == 1 else x for x in inputs)


def normalize_first(program: "ir.Model", mean: Tensor, std: Tensor) -> None:
    """Makes the first input of `program` uint8 images [batch, H, W, C], as in image files, and normalizes them."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    graph, tape = program.graph, Tape()
    floats, images = graph.inputs[0], ir.Value(name="images", type=ir.TensorType(ir.DataType.UINT8))
    assert floats.shape is not None
    batch, channels, height, width = floats.shape
    images.shape = ir.Shape([batch, height, width, channels])
    result = tape.op("Cast", [images], {"to": ir.DataType.FLOAT})
    for kind, name, values in (("Sub", "mean", mean), ("Div", "std", std)):
        constant = tape.initializer(float_tensor(values.float()), name)
        graph.register_initializer(constant)
        result = tape.op(kind, [result, constant])
    result = tape.op("Transpose", [result], {"perm": [0, 3, 1, 2]})
    graph.insert_before(graph[0], tape.nodes)
    ir.convenience.replace_all_uses_with(floats, result)
    graph.inputs[0] = images


def with_integers(
    program: "ir.Model", model: nn.Module, integers: Mapping[str, IntegerWeight], narrowest: int = 2
) -> "ModelProto":
    """The checked ONNX model of `program`, the graph of `model`, with `integers` as its weights. `program` changes.

    `narrowest` is the number of bits of the narrowest integer type to use. Constants are folded after the integers have
    come in: otherwise the batch norm would be folded into the float weights.
    """
    import onnx_ir as ir
    from onnx import checker, shape_inference
    from onnxscript.optimizer import optimize_ir
    from onnxscript.version_converter import convert_version

    name = type(model).__name__
    has_int2 = any(width_of(weight.bits, narrowest) == 2 for weight in integers.values())
    if has_int2:  # first of all: the folding of constants infers shapes, by the rules of the opset
        convert_version(program, OPSET_INT2)
    insert_integers(program, model, integers, narrowest)
    optimize_ir(program)
    apply_rules(program)
    program.ir_version = IR_VERSION_INT2 if has_int2 else IR_VERSION
    program.graph.name, program.producer_name, program.producer_version = name, "psgd", None
    drop_notes(program)
    proto: ModelProto = ir.to_proto(program)
    try:
        checker.check_model(proto, full_check=True)
    except shape_inference.InferenceError as error:
        raise ValueError(f"{name} cannot be exported to ONNX: {' '.join(str(error).split())}") from None
    return proto


def drop_notes(program: "ir.Model") -> None:
    """Removes what only debugging needs: where each node comes from, its name, and the types of values inside."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program)
    graph = program.graph
    inner = [value for node in graph.all_nodes() for value in node.outputs if not value.is_graph_output()]
    for value in chain(inner, graph.initializers.values()):
        value.type = value.shape = None
    for value in chain(inner, graph.initializers.values(), graph.inputs, graph.outputs):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.name = None
