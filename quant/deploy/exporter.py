"""One call that writes a network as integers, by the suffix of the file: packed (.safetensors) or ONNX (.onnx)."""

from pathlib import Path
from typing import Any

from torch import nn

from ..grid import Grid
from ..weights import quantize_weights
from .onnx_graph import to_onnx
from .packed_file import integer_weights, save_packed


def export(
    model: nn.Module, path: str | Path, grid: Grid | int, image_size: int = 32, facts: dict[str, Any] | None = None
) -> None:
    """Writes `model`, its weights on `grid`, to `path`.

    A .safetensors file holds packed integers and `facts` (plain values); `load_packed` reads it. An .onnx file takes
    normalized float32 images [N, C, image_size, image_size]. They need the package safetensors or onnx. Raises
    ValueError for another suffix, a weight that is not finite, or what `to_onnx` cannot express.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        save_packed(path, model, grid, facts)
    elif suffix == ".onnx":
        import onnx

        onnx.save(to_onnx(quantize_weights(model, grid), integer_weights(model, grid), image_size), path)
    else:
        raise ValueError(f"{path} must end in .safetensors or .onnx")
