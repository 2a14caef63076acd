"""Rules that rewrite a graph with integer weights, so that runtimes find their integer kernels.

A batch norm behind a convolution is folded into the bias of the convolution and one scale for each output channel; the
integers keep their magnitudes. Left between a convolution and a QuantizeLinear, it would prevent integer kernels. A
transposed weight is stored transposed.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..grid import nonzero_scale
from .onnx_integers import float_tensor, integer_tensor

if TYPE_CHECKING:
    import onnx_ir as ir


def apply_rules(program: "ir.Model") -> None:
    """Rewrites `program`, whose constants are folded, in place."""
    from onnxscript.rewriter import RewriteRule, rewrite

    rewrite(program, [RewriteRule(_conv_norm, _folded, _is_foldable), RewriteRule(_transpose, _transposed, _is_own)])


def _conv_norm(op: Any, x: Any, integers: Any, scale: Any) -> Any:
    weight = op.DequantizeLinear(integers, scale, _outputs=["weight"])
    conv = op.Conv(x, weight, _allow_other_inputs=True, _outputs=["conv"])
    return op.BatchNormalization(conv, _allow_other_inputs=True, _outputs=["norm"])


def _is_foldable(context: Any, x: Any, integers: Any, scale: Any, weight: Any, conv: Any, norm: Any) -> bool:
    """Whether all values are known, no other node has the integers, and their scales are those of output channels."""
    constants = [integers, scale, *conv.producer().inputs[2:], *norm.producer().inputs[1:]]
    by_output = scale.shape.rank() == 0 or weight.producer().attributes["axis"].as_int() == 0
    return by_output and _is_own(context, integers) and all(value.const_value is not None for value in constants)


def _folded(op: Any, x: Any, integers: Any, scale: Any, weight: Any, conv: Any, norm: Any) -> Any:
    """The new scale is scale * |gamma| / sigma, the new bias is beta + (bias - mean) * gamma / sigma, and the integers
    take the sign of gamma."""
    call, name = conv.producer(), integers.name.removesuffix(".integers")
    gamma, beta, mean, var = map(_floats, norm.producer().inputs[1:])
    factor = gamma / (var + norm.producer().attributes["epsilon"].as_float()).sqrt()
    values = _int8(integers)
    signed = values * factor.sign().to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    before = _floats(call.inputs[2]) if len(call.inputs) > 2 else 0
    stored = op.initializer(integer_tensor(signed, integers.dtype.bitwidth), integers.name)
    scales = op.initializer(float_tensor(nonzero_scale(_floats(scale) * factor.abs())), scale.name)
    bias = op.initializer(float_tensor(beta + (before - mean) * factor), f"{name}.folded_bias")
    return op.Conv(x, op.DequantizeLinear(stored, scales, axis=0), bias, **call.attributes)


def _transpose(op: Any, integers: Any, scale: Any) -> Any:
    weight = op.DequantizeLinear(integers, scale, _outputs=["weight"])
    return op.Transpose(weight, _outputs=["result"])


def _is_own(context: Any, integers: Any, **_: Any) -> bool:
    """Whether `integers` are constants that a single node has."""
    return integers.const_value is not None and len(integers.uses()) == 1


def _transposed(op: Any, integers: Any, scale: Any, weight: Any, result: Any) -> Any:
    permutation = result.producer().attributes["perm"].as_ints()
    attributes = (
        {"axis": permutation.index(weight.producer().attributes["axis"].as_int())} if scale.shape.rank() else {}
    )
    turned = integer_tensor(_int8(integers).permute(*permutation), integers.dtype.bitwidth)
    return op.DequantizeLinear(op.initializer(turned, integers.name), scale, **attributes)


def _floats(value: "ir.Value") -> Tensor:
    assert value.const_value is not None
    return torch.tensor(value.const_value.numpy())


def _int8(value: "ir.Value") -> Tensor:
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().astype("int8"))
