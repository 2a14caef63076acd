"""One function that writes a network as integers: to a packed file (.safetensors) or to ONNX (.onnx)."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..grid import Grid
from .onnx_graph import to_onnx
from .packed_file import integer_weights, save_packed


def export(
    model: nn.Module,
    path: str | Path,
    grid: Grid | int,
    image_size: int = 32,
    facts: dict[str, Any] | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
) -> None:
    """Writes `model` to `path`, with its weights quantized to `grid`. The suffix of `path` decides the format.

    A .safetensors file holds packed integers and `facts` (values that JSON can hold); `load_packed` reads it. It needs
    the package safetensors. An .onnx file takes normalized float32 images [N, C, image_size, image_size], with
    image_size in pixels (default 32). A network with other inputs needs `example_inputs`, a tuple with a tensor for
    each argument of its forward, such as token ids [N, T]; see `to_onnx`. The file holds no facts. It needs the
    packages onnx, onnx-ir and onnxscript: pip install "psgd[export]".

    Raises ValueError for any other suffix, for a weight that is not finite, and as `save_packed` or `to_onnx` does.
    """
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        save_packed(path, model, grid, facts)
    elif suffix == ".onnx":
        proto = to_onnx(model, integer_weights(model, grid), image_size, example_inputs=example_inputs)
        import onnx

        onnx.save(proto, path)
    else:
        raise ValueError(f"{path} must end in .safetensors or .onnx")
