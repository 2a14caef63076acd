"""Compares what a network was trained for, and what its batch norm was estimated at, with how it is deployed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quant import Grid
from quant.grid import FLOAT_BITS
from utils.checkpoint import grid_of

TERNARY = 2  # bits whose grid is so coarse that the statistics of batch norm are not those of the float network
OF_LSQ = (
    "it was trained for grids of learned steps, which these grids are not: evaluate its run's quantized.pth with "
    "eval.py --w_bit 32; no file can be exported with learned steps"
)
SAFE_BITS = 6  # from here up, a network that was not trained for a grid loses little


def evaluation_mismatches(checkpoint: dict[str, Any], grids: Sequence[Grid]) -> list[str]:
    """How an evaluation in float and on `grids` goes beyond what the checkpoint's file says that it is for, in words.

    Empty for a baseline, which was not trained for a grid.
    """
    args, quantized = checkpoint.get("args", {}), [grid for grid in grids if grid.bits != FLOAT_BITS]
    if of_steps := next((step_mismatch(args, grid.bits) for grid in quantized), ""):
        return [of_steps]
    w_bit = args.get("w_bit")
    if not (args.get("psg") and w_bit and args.get("target", "grid") == "grid"):
        return []
    found = []
    if others := [f"W{grid.bits}" for grid in quantized if grid.bits != w_bit]:
        found.append(f"it was trained for W{w_bit}; at {', '.join(others)} its weights are off their grid")
    if quantized:
        same_bits = replace(quantized[0], bits=w_bit)
        found += grid_mismatches(args, same_bits, grid_of(checkpoint, w_bit).per_channel)
    if renewed_at(checkpoint) == TERNARY:
        found.append(f"its batch norm was re-estimated at W{TERNARY}; in float it may fail")
    return found


def renewed_at(checkpoint: dict[str, Any]) -> int | None:
    """The bit-width of the weights with which batch norm was re-estimated; None if it was not."""
    if not checkpoint.get("averaged_epochs"):
        return None
    # Files from before tools.average noted it were re-estimated at the bits that they were trained for.
    return checkpoint.get("deployed", checkpoint.get("args", {})).get("w_bit")


def mismatches(checkpoint: dict[str, Any], grid: Grid) -> list[str]:
    """How an unpruned deployment on `grid` differs from what the checkpoint's file says that it is for, in words.

    Empty for a file that does not say so.
    """
    args = checkpoint.get("args", {})
    found = []
    if of_steps := step_mismatch(args, grid.bits):
        found.append(of_steps)
    elif args.get("target") == "zero" or not (args.get("psg", 1) or "method" in args):
        if grid.bits < SAFE_BITS:
            found.append(f"it was not trained for a grid, and {grid.bits} bits are few for such a network")
    elif "psg" in args:
        found += grid_mismatches(args, grid, grid_of(checkpoint, grid.bits).per_channel)
    return found + norm_mismatches(checkpoint, grid.bits, bool(found))


def step_mismatch(args: dict[str, Any], bits: int) -> str:
    """Why weights with learned steps do not fit a grid of `bits`; empty if they have none or stay float."""
    return OF_LSQ if args.get("method") == "lsq" and bits != FLOAT_BITS else ""


def grid_mismatches(args: dict[str, Any], grid: Grid, trained_by_channel: bool) -> list[str]:
    """How the grid differs from the one in training."""
    found = []
    if args.get("w_bit") not in (None, grid.bits):
        found.append(f"it was trained for {args['w_bit']} bits, not for {grid.bits}")
    if trained_by_channel != grid.per_channel:
        found.append(f"it was trained with a grid for each {'channel' if trained_by_channel else 'tensor'}")
    if "first_last_quant" in args and bool(args["first_last_quant"]) != grid.first_last:
        found.append(f"it was trained with --first_last_quant {int(not grid.first_last)}")
    return found


def norm_mismatches(checkpoint: dict[str, Any], bits: int, others: bool) -> list[str]:
    """How the weights that batch norm was re-estimated with differ from these; `others`: something else differs."""
    if not checkpoint.get("averaged_epochs"):
        return []
    deployed, target = checkpoint.get("deployed"), checkpoint.get("args", {}).get("target")
    if deployed is None:
        if others or target == "zero":
            return ["its batch norm was re-estimated, but the file does not say with which weights"]
        return []
    width, sparsity = deployed.get("w_bit", 32), deployed.get("sparsity", 0)
    found = []
    if width not in (32, bits):
        found.append(f"its batch norm was re-estimated at {width} bits")
    if sparsity:
        found.append(f"its batch norm was re-estimated at sparsity {sparsity}, and nothing is pruned here")
    return found
