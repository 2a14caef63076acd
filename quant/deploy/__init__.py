"""Networks as files of integers: packed .safetensors and ONNX.

The packages safetensors and onnx are imported only when a function needs them.
"""

from .exporter import export
from .onnx_graph import to_onnx
from .packed_file import IntegerWeight, integer_weights, load_packed, read_facts, save_packed
from .packing import pack_bits, unpack_bits

__all__ = [
    "IntegerWeight",
    "export",
    "integer_weights",
    "load_packed",
    "pack_bits",
    "read_facts",
    "save_packed",
    "to_onnx",
    "unpack_bits",
]
