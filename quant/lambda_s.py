"""The pace of PSG, and lambda_s "auto", which sets it (ours; docs/optimizer.md derives both).

PSG moves the distance d of a weight to its grid point by a factor: d <- d * (1 - gain * lambda_s * g), where g is the
gradient and gain = lr * (1 - dampening) / (1 - momentum). With noisy gradients log|d| is therefore a random walk, and

    tau = sum over steps of (gain * lambda_s)^2 * mean(g^2)

is its variance. tau alone decides how many weights are near the grid, whatever the network and the bits, so lambda_s
"auto" chooses each tensor's lambda_s such that tau grows evenly to `tau_end` in the first part of the stage.

With acts_on="update" the base optimizer's step / lr takes the place of g, and gain is lr. If the base has momentum, its
steps are correlated. Their sum, and so the noise of the weights, is then larger for the same tau (19 times the variance
with beta1 = 0.9), while the draw towards the grid comes from the squares of single steps: see docs/optimizer.md, Adam.

Each scaled weight has a record in the optimizer's state, on its device: a float32 tensor of the RECORD fields. Its
`steps` are those of the stage, also for a weight that begins to move later; `seen` are those in its mean square.
"""

import math
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .passes import mean_squares_between
from .settings import AUTO
from .sharded import is_sharded, mean_squares

PLAN_END = 0.75  # share of the stage in which tau grows; lambda_s is constant in the rest
MEMORY = 100  # steps over which the mean square of the gradients is averaged
STILL = 1e-15  # a smaller root mean square counts as none
ENOUGH = 0.9  # a stage that ends with a smaller share of weights near the grid is announced
HARM = 1.1  # the pace is halved if the loss is larger than that of any epoch before by more than this factor

State = MutableMapping[Tensor, dict[str, Any]]
RECORD = ("steps", "tau", "mean_square", "lambda_s", "seen")


def expected_share(tau: float) -> float:
    """Share (0 to 1) of weights at most a tenth of the scale from a grid point after a walk of variance `tau` >= 0.

    The weights begin evenly spread over their cells: 0.2 at tau = 0. A weight that crosses the middle between two grid
    points is drawn to the other from there on, which reflects its walk. Raises ValueError for a negative tau.
    """
    if not tau >= 0:
        raise ValueError(f"tau must be at least 0, got {tau!r}")
    if tau < 1e-6:
        return 0.2
    if tau == math.inf:
        return 1.0
    # Z = log(0.5 / |d|), with d in units of the scale, is a Brownian motion of drift 1/2 that is reflected at 0. Its
    # start is exponential. This is P(Z >= edge), from the known P(Z < edge | start) integrated over the starts.
    edge = math.log(0.5 / 0.1)
    far = _exp_ndtr(0, (edge - tau / 2) / math.sqrt(tau)) - _exp_ndtr(tau - edge, (edge - 1.5 * tau) / math.sqrt(tau))
    turned = _exp_ndtr(edge, (-edge - tau / 2) / math.sqrt(tau))
    turned -= _exp_ndtr(tau + 2 * edge, (-edge - 1.5 * tau) / math.sqrt(tau))
    return 1 - far + turned


def _exp_ndtr(exponent: float, x: float) -> float:
    """exp(exponent) times the normal distribution at x, without overflow."""
    return math.exp(exponent + torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)).item())


@dataclass(frozen=True)
class Pace:
    """How far the scaled weights of an optimizer have come. Means over tensors are weighted by their numbers of
    weights.

    Attributes:
        steps: steps taken.
        tau: mean tau.
        expected_share: mean of `expected_share` over the tensors, to compare with `grid_share`.
        lambda_s: mean lambda_s, with "auto" the one of an even pace.
        planned_tau: mean tau at the end of the plan, if the rest goes as planned; `tau` itself if lambda_s is a number.
    """

    steps: int
    tau: float
    expected_share: float
    lambda_s: float
    planned_tau: float


def take_step(
    weights: list[Tensor], given: list[Tensor], group: dict[str, Any], state: State, compiled: bool = False
) -> list[Tensor]:
    """Counts a step of the walk of `weights` and returns its lambda_s for each of them, float32 and 0-d.

    `given` are the gradients of the weights or, with acts_on="update", what they were before the base optimizer's step.
    `compiled` is that of PSGD.
    """
    if group["acts_on"] == "update":
        rate = group["lr"]
        rate = rate.clamp(min=STILL) if isinstance(rate, Tensor) else max(rate, STILL)
        squares = mean_squares_between(given, weights, compiled) / (rate * rate)
    else:
        squares = mean_squares(given)
    return walk(Records(weights, state), squares, group)


class Records:
    """The records of `weights`, as columns [len(weights)] by field name. `write` puts them back into `state`.

    All of the weights have the steps of their stage, also those that had no gradient for a time.
    """

    def __init__(self, weights: Sequence[Tensor], state: State) -> None:
        self._tensors = [_record(weight, state) for weight in weights]
        self.columns = dict(zip(RECORD, torch.stack(self._tensors).unbind(1)))
        self.columns["steps"] = self.columns["steps"].max().expand(len(weights))

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def write(self, **columns: Tensor) -> None:
        """Replaces these columns, in the state too."""
        self.columns |= columns
        torch._foreach_copy_(self._tensors, list(torch.stack([self.columns[name] for name in RECORD], 1).unbind()))


def _record(weight: Tensor, state: State) -> Tensor:
    own = state[weight]
    if "psg_pace" not in own:
        device = weight.to_local().device if is_sharded(weight) else weight.device
        own["psg_pace"] = torch.zeros(len(RECORD), dtype=torch.float32, device=device)
    record: Tensor = own["psg_pace"]
    return record


def join_stage(
    weights: Iterable[Tensor], group: dict[str, Any], groups: Iterable[dict[str, Any]], state: State
) -> None:
    """Gives those of `weights`, of `group`, that have no record one that begins where the stage is: at the largest step
    of all weights in `groups` whose stage has as many steps."""
    new = [weight for weight in weights if "psg_pace" not in state.get(weight, {})]
    if not new:
        return
    stage = [weight for other in groups if other.get("steps") == group["steps"] for weight in other["params"]]
    begun = [state[weight]["psg_pace"][:1] for weight in stage if "psg_pace" in state.get(weight, {})]
    for weight in new if begun else ():
        record = _record(weight, state)
        record[:1] = torch.cat([part.to(record.device) for part in begun]).max()


def gain(group: dict[str, Any]) -> Any:
    """What a gradient moves its weight by in the long run: a number, or a tensor if lr is one."""
    if group["acts_on"] == "update":
        return group["lr"]
    return group["lr"] * (1 - group.get("dampening", 0)) / (1 - group.get("momentum", 0))


def walk(records: Records, squares: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Counts one step of the walk and returns its lambda_s for each tensor, float32 and 0-d.

    `squares` [number of tensors] are the mean squares of this step's gradients, or steps / lr.
    """
    steps = records["steps"] + 1
    # An update of zeros, as at a rate of zero, does not tell how large the others are.
    told = squares > 0 if group["acts_on"] == "update" else torch.ones_like(squares, dtype=torch.bool)
    seen = records["seen"] + told
    change = (squares - records["mean_square"]) / seen.clamp(1, MEMORY)
    mean_square = records["mean_square"] + torch.where(told, change, 0)
    if group["lambda_s"] == AUTO:
        spread, now = (gain(group) * part.sqrt() for part in (mean_square, squares))
        goes = spread >= STILL  # else the weights stand still, and no lambda_s would move them
        spread, now = spread.clamp(min=STILL), now.clamp(min=STILL)
        ahead = (steps <= plan_end(group)) & goes
        held = torch.where(ahead, even_noise(group) / spread, records["lambda_s"])
        lambda_s = torch.where(ahead, planned_variance(records, group).sqrt() / spread, held)
        # No single step exceeds the limit: near a loss of zero gradients are tiny for long, and then one is large.
        lambda_s = torch.minimum(lambda_s, group["noise_limit"] / now)
    else:
        lambda_s = held = torch.full_like(squares, group["lambda_s"])
    tau = records["tau"] + (gain(group) * lambda_s).square() * squares
    records.write(steps=steps, tau=tau, mean_square=mean_square, lambda_s=held, seen=seen)
    return list(lambda_s.unbind())


def planned_variance(records: Records, group: dict[str, Any]) -> Tensor:
    """What the next step is to add to tau, for each tensor: an even part of what is left of the plan."""
    remaining = (plan_end(group) - records["steps"]).clamp(min=1)
    left: Tensor = group["tau_end"] - records["tau"]
    return left.clamp(min=0) / remaining


def plan_end(group: dict[str, Any]) -> int:
    """The step with which the plan ends."""
    steps: int = group["steps"]
    return math.ceil(PLAN_END * steps)


def even_noise(group: dict[str, Any]) -> float:
    """Root mean square of a step of log|d| if tau grows evenly through the plan, within the limit."""
    return min(math.sqrt(group["tau_end"] / plan_end(group)), float(group["noise_limit"]))


def _tracked(groups: Iterable[dict[str, Any]], state: State) -> list[tuple[dict[str, Any], int, list[float]]]:
    """Group, number of weights and record of each weight tensor that has one."""
    return [
        (group, weight.numel(), state[weight]["psg_pace"].tolist())
        for group in groups
        for weight in group["params"]
        if "psg_pace" in state.get(weight, {})
    ]


def steps_taken(groups: Iterable[dict[str, Any]], state: State) -> int:
    """The largest number of steps that any weight has taken."""
    return max((int(record[0]) for _, _, record in _tracked(groups, state)), default=0)


def measured_pace(groups: Iterable[dict[str, Any]], state: State) -> Pace:
    """See `PSGD.pace`."""
    groups = list(groups)
    if not any("steps" in group for group in groups):
        raise ValueError("the pace is measured only with steps: PSGD(base, lambda_s, steps=...)")
    total, sums = 0, [0.0] * 4
    for group, count, (steps, tau, _, lambda_s, _) in _tracked(groups, state):
        share, planned = expected_share(tau) if tau >= 0 else math.nan, planned_tau(group, steps, tau)
        total += count
        for index, value in enumerate((tau, share, lambda_s, planned)):
            sums[index] += count * value
    return Pace(steps_taken(groups, state), *(value / max(total, 1) for value in sums))


def planned_tau(group: dict[str, Any], steps: float = 0, tau: float = 0) -> float:
    """What tau will be at the end of the plan of a group, if it is `tau` after `steps`."""
    if group["lambda_s"] != AUTO:
        return tau
    remaining = max(plan_end(group) - steps, 0)
    return tau + float(min(max(group["tau_end"] - tau, 0), remaining * group["noise_limit"] ** 2))


def whole_plan(group: dict[str, Any]) -> int:
    """The least number of steps of a stage whose plan reaches `tau_end` within the limit of a step."""
    steps: float = group["tau_end"] / group["noise_limit"] ** 2 / PLAN_END
    return math.ceil(steps)


def watch_loss(groups: Iterable[dict[str, Any]], state: State, loss: float) -> bool:
    """See `PSGD.watch_loss`."""
    halved, loss = False, float(loss)
    for group in groups:
        if group.get("lambda_s") != AUTO:
            continue
        most = group.get("psg_loss", math.inf)
        if math.isfinite(loss):
            group["psg_loss"] = loss if most == math.inf else max(loss, most)
            if loss <= most + (HARM - 1) * abs(most):
                continue
        halved = True
        group["noise_limit"] = even_noise(group) / 2
        for weight in group["params"]:
            if "psg_pace" in state.get(weight, {}):
                state[weight]["psg_pace"][RECORD.index("lambda_s")] /= 2
    return halved


def restore_records(groups: Iterable[dict[str, Any]], state: State, saved: dict[str, Any]) -> None:
    """Puts the records of a state_dict back in float32: torch loads state in the dtype of its weight."""
    for group, saved_group in zip(groups, saved["param_groups"]):
        for weight, key in zip(group["params"], saved_group["params"]):
            record = saved["state"].get(key, {}).get("psg_pace")
            if record is not None:
                if len(record) < len(RECORD):  # saved before `seen` was told apart from `steps`
                    record = torch.cat([record, record[:1]])
                state[weight]["psg_pace"] = record.to(state[weight]["psg_pace"].device, copy=True)
