"""PSG's pass over the weights: what is scaled, times lambda_s * |w - target(w)| + eps (ours).

A multiplier takes seven operations. Over a whole large network each of them would be a trip to memory, and their
results a second copy of the weights. So the pass goes over pieces that stay in the cache of a CPU, or is compiled.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .grid import dims_with_scales, nonzero_scale, peak_over, quant_max_of, weight_scales
from .sharded import is_sharded, local, means, squares

# Elements of a piece: on a CPU a few float32 pieces fit into its last-level cache, elsewhere calls have to be large.
CPU_PIECE = 1 << 18
PIECE = 1 << 22
WORTH_COMPILING = 1 << 20  # elements of a weight for which a call of compiled code is worth it


def scale_moves(
    moves: list[Tensor],
    weights: list[Tensor],
    group: dict[str, Any],
    lambda_s: float | list[Tensor],
    between: bool = False,
    compiled: bool = False,
) -> None:
    """Multiplies `moves` by the PSG multipliers of `weights`, in place.

    With `between`, `moves` are where the base optimizer's step has brought `weights`, and the way there is what is
    multiplied: moves <- weights + multiplier * (moves - weights).

    `moves` have the shapes of `weights`, and all share one device and dtype, which the fast path of the foreach calls
    requires. `lambda_s` is one number, or a 0-d tensor for each weight. `compiled` has the same results sooner for
    large weights in float32; the first call with it takes seconds to compile.
    """
    numbers = lambda_s if isinstance(lambda_s, list) else [lambda_s] * len(weights)
    on_grid, known = group["target"] == "grid", None
    if any(map(is_sharded, weights)):
        # Scales are those of whole weights. The rest needs this process's parts only.
        known = local(_scales(weights, group)) if on_grid else None
        weights, moves, compiled = local(weights), local(moves), False
    for batch in _batches(weights):
        columns: list[list[Any]] = [[column[index] for index in batch] for column in (weights, moves, numbers)]
        if compiled and _worth_compiling(columns[0]):
            weight, move, number = (column[0] for column in columns)
            _scale_compiled(weight, move, number, group, between)
            continue
        if on_grid:
            columns.append([known[index] for index in batch] if known else _scales(columns[0], group))
        for piece in _pieces(columns):
            _scale_piece(*piece, eps=group["psg_eps"], between=between)


def _scales(weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    return weight_scales(weights, group["bits"], group["per_channel"], group.get("scale_dims"))


def _scale_piece(
    weights: list[Tensor],
    moves: list[Tensor],
    lambda_s: list[Any],
    scales: list[Tensor] | None = None,
    *,
    eps: float,
    between: bool,
) -> None:
    """See `scale_moves`. `scales` are those of the grids; without them the target is zero."""
    if scales is None:
        factors = torch._foreach_abs(weights)
    else:
        # |round(w / s) * s - w|. No clamp is needed: max|w| / s is quant_max (approximately so in bfloat16). Division
        # and multiplication by 0-d scales have no fast path.
        factors = torch._foreach_div(weights, scales)
        torch._foreach_round_(factors)
        torch._foreach_mul_(factors, scales)
        torch._foreach_sub_(factors, weights)
        torch._foreach_abs_(factors)
    torch._foreach_mul_(factors, lambda_s)
    if eps:
        torch._foreach_add_(factors, eps)
    if between:
        torch._foreach_sub_(moves, weights)
    torch._foreach_mul_(moves, factors)
    if between:
        torch._foreach_add_(moves, weights)


def mean_squares_between(starts: list[Tensor], ends: list[Tensor], compiled: bool = False) -> Tensor:
    """Mean square of each of ends - starts: float32, shape [len(starts)]. Of sharded tensors it is over all processes.

    Of a large tensor no difference is made as a whole. `compiled` is as in `scale_moves`.
    """
    found, columns = [], [local(starts), local(ends)]
    for batch in _batches(columns[0]):
        chosen = [[column[index] for index in batch] for column in columns]
        if compiled and _worth_compiling(chosen[0]):
            found.append(_compiled(_squares_between)(*(column[0].detach() for column in chosen)))
            continue
        parts = [squares(list(torch._foreach_sub(end, start))) for start, end in _pieces(chosen)]
        found.append(torch.stack(parts).sum(0))
    return means(starts, torch.cat(found))


# --- pieces ---------------------------------------------------------------------------------------------------------


def _size(weights: Sequence[Tensor]) -> float:
    """Largest number of elements of a piece. Compiled code has pieces of its own."""
    if torch.compiler.is_compiling():
        return float("inf")
    return CPU_PIECE if weights[0].device.type == "cpu" else PIECE


def _batches(weights: list[Tensor]) -> Iterator[list[int]]:
    """Indices of weights that make up a piece together. A weight that is larger than a piece is alone."""
    size, total = _size(weights), 0
    batch: list[int] = []
    for index, weight in enumerate(weights):
        if batch and total + weight.numel() > size:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += weight.numel()
    yield batch


def _pieces(columns: list[list[Any]]) -> Iterator[list[list[Any]]]:
    """`columns`, whose first is a batch of weights, as they are; in pieces if that is one large weight."""
    size = _size(columns[0])
    if columns[0][0].numel() <= size:
        yield columns
        return
    for row in _cut([column[0] for column in columns], size):
        yield [[entry] for entry in row]


def pieces(weight: Tensor, *others: Tensor) -> Iterator[Sequence[Tensor]]:
    """`weight` in pieces that stay in the cache, as views, each with its part of `others`. A sharded one stays whole.

    The others have the weight's shape, or 1 in the place of some of its sizes, or are 0-d.
    """
    return _cut((weight, *others), float("inf") if is_sharded(weight) else _size([weight]))


def _cut(row: Sequence[Any], size: float) -> Iterator[Sequence[Any]]:
    """The weight that begins `row` in pieces of at most `size` elements, as views, each with its part of the others.

    The others are tensors of the weight's shape, or with 1 in the place of some of its sizes, or numbers.
    """
    whole = row[0]
    if whole.numel() <= size:
        yield row
        return
    dim = next(dim for dim, length in enumerate(whole.shape) if length > 1)
    length = max(int(size * whole.shape[dim] // whole.numel()), 1)

    def parts(entry: Any) -> Any:
        whole_everywhere = not isinstance(entry, Tensor) or not entry.dim() or entry.shape[dim] == 1
        return repeat(entry) if whole_everywhere else entry.split(length, dim)

    for part in zip(*map(parts, row)):
        yield from _cut(part, size)


# --- compiled -------------------------------------------------------------------------------------------------------


def _worth_compiling(weights: list[Tensor]) -> bool:
    weight = weights[0]
    alone = len(weights) == 1 and not torch.compiler.is_compiling()
    return alone and weight.dtype == torch.float32 and weight.numel() >= WORTH_COMPILING


def _scale_compiled(weight: Tensor, move: Tensor, lambda_s: Any, group: dict[str, Any], between: bool) -> None:
    on_grid = group["target"] == "grid"
    own = dims_with_scales(weight, group["per_channel"], group.get("scale_dims"))
    number = lambda_s if isinstance(lambda_s, Tensor) else torch.full((), lambda_s, device=weight.device)
    # Detached, as each shape of a parameter would be compiled anew.
    weight, move = weight.detach(), move.detach()
    quant_max = quant_max_of(group["bits"]) if on_grid else 0
    _compiled(_scale_whole)(weight, move, number, quant_max, own, group["psg_eps"], between)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _squares_between(start: Tensor, end: Tensor) -> Tensor:
    """The sum of squares of end - start, of shape [1]."""
    return (end - start).square().sum()[None]


def _scale_whole(
    weight: Tensor, move: Tensor, lambda_s: Tensor, quant_max: int, own: tuple[int, ...], eps: float, between: bool
) -> None:
    """`scale_moves` of one weight, as two loops when it is compiled. A quant_max of 0 stands for target zero."""
    if quant_max:
        scale = nonzero_scale(peak_over(weight.abs(), own) / quant_max)
        apart = ((weight / scale).round() * scale - weight).abs()
    else:
        apart = weight.abs()
    factor = apart * lambda_s + eps if eps else apart * lambda_s
    move.copy_((move - weight) * factor + weight if between else move * factor)
