"""Packed files (.safetensors): integer weights packed at their bit-width, and scales and all other tensors in float.

    save_packed("w4.safetensors", model, 4, {"arch": "ResNet32"})
    load_packed("w4.safetensors", ResNet32(100))    # outputs equal quantize_weights(model, 4), bit for bit

The package safetensors is needed. Loading executes nothing from the file and does not trust the sizes that it states:
every length is checked against the network that is filled.
"""

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..grid import BITS, Grid, in_float32, quantize, weight_scale
from ..layers import check_finite, layer_grids, warn_of_float, weight_value
from ..passes import pieces
from .packing import pack_bits, unpack_bits

FORMAT = "psgd-packed-1"


class IntegerWeight(NamedTuple):
    """A quantized parameter: int8 `values` in its shape, its `scale`, which broadcasts against it (0-d, or of as many
    dims, with a size of 1 where indices share a scale), its bit-width."""

    values: Tensor
    scale: Tensor
    bits: int


def integer_weights(model: nn.Module, grid: Grid | int) -> dict[str, IntegerWeight]:
    """The integers of every parameter that `layer_grids` lists, by state_dict name.

    values * scale, in the dtype of the weight, equals that of `quantize_weights`, bit for bit, and warnings are as
    there. Raises ValueError for a weight that is not finite, and what `layer_grids` raises.
    """
    found, grids = {}, layer_grids(model, grid)
    warn_of_float(model, grid)
    for name, own in grids.items():
        weight = weight_value(model, name).detach()
        check_finite(name, weight)
        scale = weight_scale(weight, own)
        values = torch.empty_like(weight, dtype=torch.int8)
        for part, its_scale, integers in pieces(weight, scale, values):
            integers.copy_(quantize(in_float32(part), its_scale, -own.quant_max, own.quant_max))
        found[name] = IntegerWeight(values, scale, own.bits)
    return found


def save_packed(path: str | Path, model: nn.Module, grid: Grid | int, facts: dict[str, Any] | None = None) -> None:
    """Writes `model`, with its weights packed at the bit-widths of `grid`, and `facts` (values that JSON can hold).

    A tensor that several layers share is stored once. Raises ValueError for quantized weights that are not float32, for
    parameters that are not finite and buffers with NaN, for extra state that is not a tensor, for sparse tensors, and
    for different tensors that overlap in memory.
    """
    from safetensors.torch import save_file

    integers = integer_weights(model, grid)
    tensors, described = {}, {}
    state = model.state_dict(keep_vars=True)
    named = _names_in_state(state, model, integers)
    stored = _stored_names(state, named)
    for name, value in state.items():
        if name != stored[name]:
            continue
        _check_tensor(name, value)
        if name in named:
            if value.dtype != torch.float32:
                raise ValueError(f"{name} is {value.dtype}: packed files hold float32 networks (call model.float())")
            values, scale, width = integers.pop(named[name])  # which frees its memory
            tensors[f"{name}.packed"] = pack_bits(values.contiguous(), width)
            tensors[f"{name}.scale"] = scale.contiguous()
            described[name] = {"bits": width, "shape": list(values.shape)}
        else:
            if fault := _fault_of(value, value):
                raise ValueError(f"{name} has {fault}: no packed file can be loaded with it")
            tensors[name] = value.detach().contiguous()
    metadata = {"format": FORMAT, "tensors": json.dumps(described), "facts": json.dumps(facts or {})}
    try:
        save_file({name: value.cpu() for name, value in tensors.items()}, path, metadata)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "memory" not in reason:
            raise
        raise ValueError(f"a packed file cannot hold tensors that overlap in memory ({reason})") from None


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ValueError(f"{name} of the state_dict is a {kind}: a packed file holds tensors only, no extra state")
    if value.layout is not torch.strided or value.is_quantized:
        kind = f"quantized to {value.dtype}" if value.is_quantized else f"of layout {value.layout}"
        raise ValueError(
            f"{name} is {kind}: a packed file holds plain dense tensors only (tensor.to_dense(), tensor.dequantize())"
        )


def _fault_of(value: Tensor, wanted: Any) -> str:
    """What makes the values of a tensor unfit for its place, that of `wanted`; empty if nothing does.

    A buffer may be infinite, as the masks of attentions are.
    """
    if not value.is_floating_point():
        return ""
    value = value.detach().float() if value.element_size() < 4 else value.detach()  # float8 has no isfinite
    if isinstance(wanted, nn.Parameter):
        return "" if value.isfinite().all() else "values that are not finite"
    return "NaN" if value.isnan().any() else ""


def read_facts(path: str | Path) -> dict[str, Any]:
    """The `facts` given to `save_packed`. Raises ValueError for a file that `save_packed` did not write."""
    return _open(path)[1]


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Fills `model` with the tensors of a packed file and returns it in eval mode.

    `model` must have the architecture of the network in the file. A model on the meta device moves to the CPU. Raises
    ValueError, naming the file and the fault, for a file that is truncated, malformed or foreign, or that does not fit
    `model`. `model` is then unchanged.
    """
    left = next((name for name, buffer in _unsaved_buffers(model) if buffer.is_meta), None)
    if left:
        raise ValueError(f"{left} is on the meta device, and no file has its values: build the network on the CPU")
    tensors, _, described = _open(path)
    held, whole, state = model.state_dict(keep_vars=True), model.state_dict(), {}
    stored = _stored_names(held, described)
    for name, wanted in whole.items():
        if name != stored[name]:
            continue
        _check_tensor(name, wanted)
        keys = [f"{name}.packed", f"{name}.scale"] if name in described else [name]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]}")
        values = [tensors.pop(key) for key in keys]
        state[name] = _unpacked(path, name, wanted, values, described[name]) if name in described else values[0]
        if state[name].shape != wanted.shape or state[name].dtype != wanted.dtype:
            got, need = (f"{t.dtype} {list(t.shape)}" for t in (state[name], wanted))
            raise ValueError(f"{path}: {name} is {got} instead of {need}")
        if fault := _fault_of(state[name], held[name]):
            raise ValueError(f"{path}: {name} has {fault}")
    if tensors:
        raise ValueError(f"{path} has {next(iter(tensors))}, which the network does not know")
    on_meta = any(value.is_meta for value in whole.values())
    if on_meta:  # assign=True replaces tensors; layers keep sharing one if it is a single Parameter
        for name, value in held.items():
            if isinstance(value, nn.Parameter) and name in state:
                state[name] = nn.Parameter(state[name], requires_grad=value.requires_grad)
    whole.update({name: state[stored[name]] for name in stored})  # in place, which keeps the modules' version numbers
    model.load_state_dict(whole, assign=on_meta)
    return model.eval()


def _unsaved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name not in saved]


def _names_in_state(state: dict[str, Any], model: nn.Module, integers: Iterable[str]) -> dict[str, str]:
    """The names of quantized parameters in the state_dict, which a hook may have renamed, each with its own name.

    Raises ValueError for a parameter that is not in the state_dict.
    """
    own = {id(model.get_parameter(name)): name for name in integers}
    named = {key: own[id(value)] for key, value in state.items() if id(value) in own}
    if missing := next((name for name in integers if name not in named.values()), None):
        raise ValueError(f"{missing} is not in the state_dict as it is: a packed file cannot hold it")
    return named


def _stored_names(state: dict[str, Any], packed: Container[str]) -> dict[str, str]:
    """Maps each name in the state_dict to the name under which its tensor is stored. Of several names for one tensor, a
    name in `packed` has precedence. With keep_vars=True a shared tensor is the same object under all its names."""
    first: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name not in packed):
        first.setdefault(id(state[name]), name)
    return {name: first[id(value)] for name, value in state.items()}


def _open(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Reads the tensors, the facts, and the description (bits and shape) of the packed tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r} instead of {FORMAT!r}")
        facts, described = json.loads(metadata["facts"]), json.loads(metadata["tensors"])
        if not isinstance(facts, dict) or not isinstance(described, dict):
            raise ValueError("its metadata are not mappings")
    except (SafetensorError, ValueError, KeyError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable packed file ({error})") from None
    return tensors, facts, described


def _unpacked(path: str | Path, name: str, wanted: Tensor, values: list[Tensor], entry: Any) -> Tensor:
    packed, scale = values
    bits = entry.get("bits") if isinstance(entry, dict) else None
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{path}: {name} has {bits!r} bits, which is not one of {BITS[0]} to {BITS[-1]}")
    if entry.get("shape") != list(wanted.shape):
        raise ValueError(f"{path}: {name} has the shape {entry.get('shape')!r} instead of {list(wanted.shape)}")
    fits = not scale.dim() or len(scale.shape) == wanted.dim()
    fits = fits and all(count in (1, size) for count, size in zip(scale.shape, wanted.shape))
    if scale.dtype != torch.float32 or not fits:
        raise ValueError(f"{path}: the scale of {name} is {scale.dtype} {list(scale.shape)}")
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise ValueError(f"{path}: the scale of {name} is not a positive finite number")
    try:
        integers = unpack_bits(packed, bits, wanted.numel())
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from None
    return integers.view(wanted.shape).to(torch.float32) * scale
