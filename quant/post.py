"""Post-training methods: what can be done to a trained, quantized network with training images and no gradient."""

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor], inplace: bool = False) -> nn.Module:
    """A copy of `model`, in eval mode, whose batch-norm statistics are the averages over `batches`.

    Quantized weights shift what batch norm sees; statistics taken with the weights as deployed undo the shift.
    `batches` are images [N, C, H, W] of equal or nearly equal size, unaugmented, from the training set, never the
    test set. Every other part of the network stays as it is; dropout is off while the statistics are taken.
    inplace=True changes `model` itself and returns it.

    Raises ValueError for a network without batch-norm statistics, and if `batches` is empty. Source: ours.
    """
    fresh = model if inplace else copy.deepcopy(model)
    norms = [m for m in fresh.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no batch-norm statistics to re-estimate")
    dropouts = [m for m in fresh.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    rates = [m.p for m in dropouts]
    for dropout in dropouts:
        dropout.p = 0.0
    update_bn(batches, fresh)
    for dropout, rate in zip(dropouts, rates):
        dropout.p = rate
    if not norms[0].num_batches_tracked:
        raise ValueError("re-estimating batch norm needs at least one batch of images")
    return fresh.eval()
