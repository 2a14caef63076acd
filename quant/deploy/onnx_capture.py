"""A network as the exporter of torch writes it to ONNX: in float, but its quantizers as QuantizeLinear pairs.

torch.onnx.export(dynamo=True) translates the graph of torch.export. Both are in torch 2.6 and newer. The packages onnx,
onnx-ir and onnxscript are needed.
"""

import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hooks import eval_mode, unfused_attention
from ..quantizers import Quantizer

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

OPSET = 21  # the first with QuantizeLinear and DequantizeLinear as they are used here
INSTEAD = "replace it in the network, or write a packed file (.safetensors), which holds every network"


def float_program(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str] | None = None) -> "ir.Model":
    """The ONNX model of `model` in eval mode, not optimized. Its initializers have the names of the state_dict.

    `inputs` is a batch of at least two samples. Dimension 0 of every input that is as long there as the first input is
    the batch, of any size. `names` are the names of the inputs (default: those of the arguments of forward); the first
    output is named "logits".

    Raises ValueError, with the reason, for a network that cannot be exported.
    """
    device = next(chain(model.parameters(), model.buffers()), inputs[0]).device
    inputs = tuple(x.to(device) for x in inputs)
    axes = tuple({0: "batch"} if x.dim() and len(x) == len(inputs[0]) else None for x in inputs)
    with ExitStack() as stack:
        stack.callback(_restore, _plain_tensors(model))
        for context in (eval_mode(model), _quiet(), _quantizers_as_operations(model), unfused_attention()):
            stack.enter_context(context)
        program = _captured(model, inputs, axes)
        try:
            exported = torch.onnx.export(
                program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False, dynamic_shapes=axes,
                input_names=names, output_names=["logits"],
                custom_translation_table={torch.ops.psgd.quantize.default: _quantize_linear},
            )  # fmt: skip
        except Exception as error:  # an operation may raise anything
            raise ValueError(f"{_name(model)} cannot be exported to ONNX: {_reason(error)}; {INSTEAD}") from error
    assert exported is not None  # as with dynamo=True
    return exported.model


def _captured(model: nn.Module, inputs: tuple[Tensor, ...], axes: tuple[Any, ...]) -> "ExportedProgram":
    """The graph of `model` by torch.export."""
    try:
        inspect.signature(model.forward).bind(*inputs)
    except TypeError as error:
        shapes = [list(x.shape) for x in inputs]
        raise ValueError(
            f"{_name(model)} cannot be exported to ONNX with inputs of the shapes {shapes} ({error}): give "
            "example_inputs, a tuple with a tensor for each argument of forward"
        ) from None
    batch = torch.export.Dim("batch")
    sizes = tuple({0: batch} if axis else None for axis in axes)
    try:
        return torch.export.export(model, inputs, dynamic_shapes=sizes, strict=False)
    except Exception as error:  # the network's own code may raise anything
        raise ValueError(f"{_name(model)} cannot be exported to ONNX: {_reason(error)}; {INSTEAD}") from error


def _plain_tensors(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors that are attributes of modules, such as the weights that weight_norm computes at each call."""
    return [(m, key, value) for m in model.modules() for key, value in vars(m).items() if isinstance(value, Tensor)]


def _restore(tensors: list[tuple[nn.Module, str, Tensor]]) -> None:
    for module, key, value in tensors:
        vars(module)[key] = value


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _reason(error: BaseException) -> str:
    """Why an export failed, in one line: the operation that ONNX lacks, or what stopped torch.export."""
    text = str(error)
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
        text += f"\n{error}"
    if missing := re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text):
        return f"the operation {missing[1]} has no counterpart in ONNX"
    if "Constraints violated (batch)" in text:
        return "its code fixes the number of samples in a batch"
    return f"torch.export stops at {next(filter(None, map(str.strip, text.splitlines())), type(error).__name__)!r}"


@torch.library.custom_op("psgd::quantize", mutates_args=())
def _quantize(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """What a quantizer computes, as one operation of a graph."""
    integers = (x / scale).round() + zero_point
    return (integers.clamp(quant_min, quant_max) - zero_point) * scale


@_quantize.register_fake
def _like(x: Tensor, scale: Tensor, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


def _quantize_linear(x: Any, scale: Any, zero_point: int, quant_min: int, quant_max: int) -> Any:
    """The ONNX nodes of `_quantize`: a QuantizeLinear and DequantizeLinear pair in uint8.

    Signed integers are moved by quant_min into uint8 too: runtimes have no kernels that mix signed and unsigned.
    """
    import onnx_ir as ir
    import onnxscript

    op: Any = onnxscript.opset21  # called with values of a graph, while its types are those of tensors
    zero = op.Constant(value=ir.tensor(zero_point - quant_min, ir.DataType.UINT8))
    if quant_max - quant_min < 255:  # at 8 bits uint8 saturates by itself
        bottom, top = (
            op.Mul(scale, op.Constant(value=ir.tensor(float(limit - zero_point), ir.DataType.FLOAT)))
            for limit in (quant_min, quant_max)
        )
        x = op.Clip(x, bottom, top)
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


@contextmanager
def _quantizers_as_operations(model: nn.Module) -> Iterator[None]:
    """Makes every quantizer of `model` compute its output by the one operation `_quantize`."""
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    for quantizer in quantizers:
        vars(quantizer)["forward"] = partial(_as_operation, quantizer, int(getattr(quantizer, "zero_point", 0)))
    try:
        yield
    finally:
        for quantizer in quantizers:
            del vars(quantizer)["forward"]


def _as_operation(quantizer: Quantizer, zero_point: int, x: Tensor) -> Tensor:
    quantized: Tensor = _quantize(x, quantizer.scale, zero_point, quantizer.quant_min, quantizer.quant_max)
    return x.copy_(quantized) if quantizer.inplace else quantized


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the exporter logs, prints and warns of."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
