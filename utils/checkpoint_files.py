"""Reads the checkpoint files of any program, without executing anything in them, and finds their weights."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.cli import UserError, first_line

# Keys under which programs keep a state_dict. The first one counts; means over steps only if there is nothing else.
PLACES = (
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params",
    "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "model_ema", "ema", "params_ema",
)  # fmt: skip
DEPTH = 2  # how deep such keys may be nested
WRAPPERS = {"module", "_orig_mod"}  # parts that DataParallel or torch.compile adds to names
MEANS = {"numpy._core.multiarray.scalar": "a numpy scalar", "numpy._core.multiarray._reconstruct": "a numpy array"}
ADVICE = "save model.state_dict() with plain numbers, strings, lists and dicts"


def read_file(path: Path) -> dict[str, Any]:
    """The content of the file at `path`, on the CPU, with its weights under the key state_dict.

    Raises UserError for a file that is damaged, holds more than tensors and plain values, or has no weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as about an unusual pickle: it is either read or refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of a foreign file can raise anything
        raise UserError(f"{path} is not a readable checkpoint ({refusal(error)})") from None
    state, facts = None, {}
    if isinstance(content, dict):
        state = find_state(content)
        facts = {key: value for key, value in content.items() if key not in PLACES}
        if state is None and has_tensors(content):
            state, facts = content, {}
    if state is None:
        raise UserError(f"{path} holds no state_dict of tensors: {ADVICE}")
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            kind = type(value).__name__
            raise UserError(f"{path}: {str(name)!r:.99} in its state_dict is not a tensor ({kind}): {ADVICE}")
    return facts | {"state_dict": state}


def refusal(error: Exception) -> str:
    """Why torch.load did not read a file, in one line, without its advice to read it anyway."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]*\w)", text):
        name = found[1].replace("numpy.core.", "numpy._core.")  # the old name is from before numpy 2
        kind = f"{MEANS[name]}, {name}," if name in MEANS else f"{name},"
        return f"it holds {kind} which is neither a tensor nor a plain value: {ADVICE}"
    if "Unsupported operand" in text:
        return f"it is a pickle that torch.save did not write: {ADVICE}"
    if "TorchScript" in text:
        return f"it is a TorchScript archive: {ADVICE}"
    if found := re.search(r"WeightsUnpickler error:\s*(.+)", text):
        return found[1].strip()[:120]
    if isinstance(error, (EOFError, KeyError)):  # their messages say nothing
        return "it is damaged, or not a file of torch.save"
    return first_line(error)[:120]


def has_tensors(content: dict) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def find_state(content: dict, depth: int = DEPTH) -> dict | None:
    """The dict with tensors under the first of PLACES that has one; None if there is none."""
    for place in PLACES:
        inner = content.get(place)
        if isinstance(inner, dict):
            state = inner if has_tensors(inner) else find_state(inner, depth - 1) if depth > 1 else None
            if state is not None:
                return state
    return None


def unwrapped(state: dict[str, Tensor], wanted: Any = ()) -> dict[str, Tensor]:
    """`state` under the network's own names, without the parts that a wrapper adds to them.

    These are WRAPPERS, and a first part that all names share, as in a file of Lightning, whose network is an attribute.
    A name that is in `wanted`, or whose plain form is taken, stays as it is.
    """
    outer = {str(name).partition(".")[0] for name in state}
    if len(outer) == 1 and not any(name in wanted for name in state) and all("." in name for name in state):
        return unwrapped({name.partition(".")[2]: value for name, value in state.items()}, wanted)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        found[name if name in wanted or plain in state or plain in found else plain] = value
    return found
