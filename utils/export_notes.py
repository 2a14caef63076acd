"""What exported files say about themselves: their metadata, and a page beside them that tells how to use them."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import ARCHITECTURES
from quant import Grid
from quant.grid import FLOAT_BITS
from utils.opening import OpenedNetwork
from utils.trained_for import mismatches

if TYPE_CHECKING:
    from onnx import ModelProto

# Has onnxruntime turn weights into floats at loading. Without it a file with float activations runs much slower.
FAST = '\noptions.add_session_config_entry("session.disable_quant_qdq", "1")'
NORMALIZED, AS_IN_A_FILE = "float32 [N, 3, S, S], (value - mean) / std", "uint8 [N, S, S, 3]"


def file_facts(opened: OpenedNetwork, grid: Grid, num_classes: int, post: str) -> dict[str, Any]:
    """What the files hold beside the weights, in values that JSON can hold.

    `input` gives the size S of the images in pixels per side, their layout, and mean and std for each channel of values
    from 0 to 255. `notes` say how the grid differs from the one in training. `post` "bn_reestimate": batch norm was
    re-estimated for these files, whatever it was in the checkpoint.
    """
    path, spec, checkpoint = Path(opened.path), opened.spec, dict(opened.checkpoint)
    if post == "bn_reestimate":
        checkpoint.pop("averaged_epochs", None)
    return {
        "arch": opened.arch, "num_classes": num_classes, "dataset": opened.dataset_name,
        "grid": {key: value for key, value in grid.facts().items() if key != "weight_range"},  # always absmax
        **({"classes": opened.classes} if opened.classes else {}),
        "input": {
            "size": spec.size, "resized": spec.resized, "layout": NORMALIZED, "channels": "RGB",
            "mean": list(spec.mean), "std": list(spec.std),
        },
        "post": post, "notes": mismatches(checkpoint, grid),
        "source": path.name, "source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip


def add_metadata(proto: "ModelProto", facts: dict[str, Any], a_bit: int, with_normalize: bool) -> None:
    """Puts `facts` into the metadata_props of an ONNX model, each as JSON, with the layout that its input has."""
    from onnx import helper

    layout = AS_IN_A_FILE if with_normalize else NORMALIZED
    content = facts | {"a_bit": a_bit, "input": facts["input"] | {"layout": layout}}
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in content.items()})


def page(facts: dict[str, Any], packed: str, onnx: str, a_bit: int, with_normalize: bool) -> str:
    """The Markdown page about the files named `packed` and `onnx` of a network with `facts`."""
    grid, size = facts["grid"], facts["input"]["size"]
    mean, std = (", ".join(f"{value:g}" for value in facts["input"][key]) for key in ("mean", "std"))
    layouts = [(packed, NORMALIZED), (onnx, AS_IN_A_FILE if with_normalize else NORMALIZED)]
    activations = "float" if a_bit == FLOAT_BITS else f"{a_bit} bits in {onnx}, float in {packed}"
    classes = facts.get("classes", [])
    rows = [
        ("network", f"{facts['arch']}, for {facts['dataset']}; from {facts['source']}"),
        ("weights", f"{grid['bits']} bits, a scale for each {'output channel' if grid['per_channel'] else 'tensor'}"
                    f"{ends(Grid(**grid))}"),
        ("activations", activations),
        *([("batch norm", "re-estimated on training images, as deployed")] if facts["post"] != "none" else []),
        ("images", f"RGB, S = {size}: the middle {size} x {size} pixels, with the shorter side resized to "
                   f"{facts['input']['resized']}"),
        *((f"input of {name}", layout.replace("S", str(size))) for name, layout in layouts),
        ("mean, std", f"{mean}; {std}, for values from 0 to 255"),
        ("output", f"logits float32 [N, {facts['num_classes']}]"),
        *([("classes", ", ".join(f"{number} {name}" for number, name in enumerate(classes)))] if classes else []),
    ]  # fmt: skip
    table = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows)
    notes = "".join(f"\nNote: {note}.\n" for note in facts["notes"])
    fast = FAST if a_bit == FLOAT_BITS else ""
    return f"""# {Path(packed).stem}

| | |
|---|---|
{table}
{notes}
```python
import onnxruntime
options = onnxruntime.SessionOptions(){fast}
session = onnxruntime.InferenceSession("{onnx}", options)
logits = session.run(None, {{"images": images}})[0]  # images: a numpy array
```

```python
from psgd import load_packed
{build_line(facts)}
logits = load_packed("{packed}", network)(images)  # images: a tensor
```
"""


def ends(grid: Grid) -> str:
    """What is different in the first and last layer, in words."""
    if not grid.first_last:
        return "; the first and last layer in float"
    return f"; the first and last layer {grid.of_ends.bits} bits" if grid.of_ends != grid else ""


def build_line(facts: dict[str, Any]) -> str:
    """The line of Python that builds the network, freshly initialized."""
    arch, classes = facts["arch"], facts["num_classes"]
    if arch in ARCHITECTURES:
        return f"import models; network = models.{arch}({classes})  # models/ of the project PSGD"
    return f'import torchvision; network = torchvision.models.get_model("{arch}", num_classes={classes})'
