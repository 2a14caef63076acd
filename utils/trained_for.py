"""Compares what a network was trained for, and what its batch norm was estimated at, with how it is deployed."""

from typing import Any

from quant import Grid
from utils.checkpoint import grid_of

SAFE_BITS = 6  # from here up, a network that was not trained for a grid loses little


def mismatches(checkpoint: dict[str, Any], grid: Grid) -> list[str]:
    """How an unpruned deployment on `grid` differs from what the checkpoint's file says that it is for, in words.

    Empty for a file that does not say so.
    """
    args = checkpoint.get("args", {})
    found = []
    if args.get("target") == "zero" or not args.get("psg", 1):
        if grid.bits < SAFE_BITS:
            found.append(f"it was not trained for a grid, and {grid.bits} bits are few for such a network")
    elif "psg" in args:
        found += grid_mismatches(args, grid, grid_of(checkpoint, grid.bits).per_channel)
    return found + norm_mismatches(checkpoint, grid.bits, bool(found))


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
