"""lambda_s "auto": one setting for every bit-width, steered by what is wanted, the share of weights near the grid."""

from torch.optim import Optimizer

from .psgd import is_scaled

AUTO_START = 150.0  # the paper's lambda_s for 4 bits
AUTO_SHARE = (0.2, 0.95)  # planned shares at progress 0 (a network not trained for a grid) and 1
AUTO_RISE, AUTO_LIMIT = 1.25, 20 * AUTO_START


def steer_lambda_s(optimizer: Optimizer, share: float, progress: float) -> float:
    """One epoch of lambda_s "auto": raises lambda_s if too few weights are near the grid; returns it. Source: ours.

    Build the PSGD optimizer with lambda_s=AUTO_START and call this after each epoch, with the `share` (0 to 1) of
    weights near the grid, as `grid_share` gives it, and the `progress` (0 to 1) through the epochs before the first
    learning-rate decay. The plan is a share that rises evenly over them from AUTO_SHARE[0] to AUTO_SHARE[1]; an epoch
    that ends below it multiplies the lambda_s of every scaled group by AUTO_RISE, up to AUTO_LIMIT. It never falls,
    and stays once `progress` has reached 1. All state is in the parameter groups, saved and restored with them.

    Raises ValueError if the optimizer has no scaled group.
    """
    groups = [group for group in optimizer.param_groups if is_scaled(group)]
    if not groups:
        raise ValueError("the optimizer has no parameter group with PSG settings to steer")
    low, high = AUTO_SHARE
    if progress < 1 and share < low + (high - low) * progress:
        for group in groups:
            group["lambda_s"] = min(group["lambda_s"] * AUTO_RISE, AUTO_LIMIT)
    return groups[0]["lambda_s"]
