"""PSGD: position-based scaled gradients (PSG) for any torch optimizer.

PSG scales the gradient g of a weight tensor w before the base optimizer applies its momentum and weight decay (paper,
section 3, and published code):

    g <- g * (lambda_s * |w - Q(w)| + eps)      target "grid": Q(w) is the nearest point of the low-bit grid of w
    g <- g * (lambda_s * |w| + eps)             target "zero": sparse training

With eps = 0 a weight on its target stays there while the other weights move, and so the float weights end up on the
grid. Adam and similar optimizers normalize the gradient, which cancels the factor. For them the factor can act on the
optimizer's step instead (ours):

    w <- w + (lambda_s * |w - Q(w)| + eps) * (the step that the base optimizer makes from w)
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .kept_range import first_ranges, keep_ranges
from .lambda_s import (
    ENOUGH,
    Pace,
    expected_share,
    join_stage,
    measured_pace,
    planned_tau,
    restore_records,
    steps_taken,
    take_step,
    watch_loss,
    whole_plan,
)
from .passes import scale_moves
from .settings import AUTO, PSG_KEYS, STAGE_KEYS, SWITCHES, complete, is_scaled, momentum
from .sharded import is_sharded

# Weights of one group, of one device, dtype and mesh; their gradients, or what they were before the step; the group.
Moves = tuple[list[Tensor], list[Tensor], dict[str, Any]]
STAGE_SETTINGS = (
    "lambda_s",
    "psg_eps",
    "acts_on",
    "steps",
    "keep_range",
)  # of `PSGD(...)`, for groups without their own
STATE_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


def with_gradients(weights: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that have a gradient, and their gradients."""
    pairs = [(weight, weight.grad) for weight in weights if weight.grad is not None]
    return [weight for weight, _ in pairs], [gradient for _, gradient in pairs]


def _warn_of_short_stages(groups: Iterable[dict[str, Any]]) -> None:
    for group in groups:
        if group.get("lambda_s") != AUTO or group["steps"] >= whole_plan(group):
            continue
        share = expected_share(planned_tau(group))
        if share < ENOUGH:
            warnings.warn(
                f'lambda_s "auto" over {group["steps"]} steps plans for only {100 * share:.0f} % of the weights near '
                f"the grid: it takes {whole_plan(group)} steps for {100 * expected_share(group['tau_end']):.0f} %",
                stacklevel=3,
            )
            return


def _warn_of_momentum(groups: Iterable[dict[str, Any]], base: Optimizer) -> None:
    repeated = max((momentum(group) for group in groups if group.get("acts_on") == "update"), default=0)
    if repeated:
        warnings.warn(
            f'acts_on="update" around {type(base).__name__} with a momentum (beta1) of {repeated:g}, which repeats '
            "scaled steps: it adds noise to the weights and no draw to the grid; set it to 0",
            stacklevel=3,
        )


class PSGD(Optimizer):
    """Scales each gradient by its weight's distance to the nearest grid point, then lets the base optimizer step.

        optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.01, momentum=0.9), lambda_s=150)

    PSGD is a torch Optimizer. Its `param_groups` and `state` are the base optimizer's own objects, and its state_dict
    is the base optimizer's, key for key. With `steps`, the state of each scaled weight also has "psg_pace". `step`
    makes no host synchronization. It leaves the scaled gradients in `.grad`, so clear them before the next backward
    pass. With a closure, gradients are scaled after each evaluation.

    With acts_on="update" the gradients stay unscaled, and the whole change that the base optimizer makes to a weight is
    scaled: momentum, preconditioning, weight decay and penalties. Use it with base optimizers that normalize gradients,
    with their momentum set to 0, such as AdamW(groups, lr, betas=(0.0, 0.999)); a warning names any other.

    Args:
        base: an optimizer instance. `bits` (2..8) or `target="zero"` in a parameter group marks the group as scaled;
            the other groups pass through untouched.
        lambda_s: strength, > 0, of the scaled groups that do not set their own (default 150, the paper's value for
            4 bits). It is written into the groups, so groups that are used again keep the first lambda_s. "auto" (ours)
            gives each tensor its own, in each step, such that 96 % of the weights are near the grid after three
            quarters of the stage. It then stays as it is. A warning says if the stage is too short for 90 %.
        eps: constant, >= 0, added to the multiplier of the scaled groups that do not set a `psg_eps` (default 0, as
            published).
        acts_on: "gradient" (default, as published) or "update", for the scaled groups that do not set their own.
        steps: number of steps of the stage, >= 1, which "auto" needs. With a lambda_s that is a number, steps only
            have the pace measured, see `pace`. By default it is not measured, and the state is the base optimizer's.
        compiled: whether PSG's pass over float32 weights of a million elements and more is compiled with torch.compile
            (default False). The results are the same. The first step then takes seconds, and needs what torch.compile
            needs: a C++ compiler on a CPU, Triton on a GPU.
        keep_range: whether the scaled groups that do not set their own keep their weights within the range that these
            have at the first step (default False, as published). Use it after `clip_weights`, which makes that range
            the best for the grid: momentum would carry weights beyond it. It takes a pass over the weights. Other
            weights that are loaded after the first step are clamped too: begin a new stage with a new base optimizer.

    A weight on a grid point does not move unless eps > 0. That holds for all-zero tensors and for the largest weight of
    each tensor, which defines the grid.

    PSGD has train() and eval() if the base optimizer has them, as the optimizers of schedule_free do. Call any other
    method of the base optimizer on `optimizer.base`; its changes to the weights are not scaled.

    Raises TypeError if `base` is not an optimizer instance or is itself a PSGD. Raises ValueError for a setting out of
    range, for complex weights, for PSG settings in a group that is not marked, and if no group is marked. Raises
    ValueError for "auto" without steps, for "auto" and keep_range with target "zero", which has no grid, and for steps
    with acts_on="gradient" around a base other than torch.optim.SGD.
    """

    def __init__(
        self,
        base: Optimizer,
        lambda_s: float | str = 150.0,
        eps: float = 0.0,
        acts_on: str = "gradient",
        steps: int | None = None,
        compiled: bool = False,
        keep_range: bool = False,
    ) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, PSGD):
            raise TypeError(f"base must be an instance of another torch optimizer, got {base!r}")
        self.psg_defaults = {
            "target": "grid", "lambda_s": lambda_s, "psg_eps": eps, "per_channel": False, "acts_on": acts_on,
            "steps": steps, "keep_range": keep_range,
        }  # fmt: skip
        completed = [dict(group) for group in base.param_groups]
        for group in completed:
            complete(group, self.psg_defaults, base)
        if not any(map(is_scaled, base.param_groups)):
            raise ValueError('no parameter group has "bits": build the base optimizer on psg_param_groups(model, grid)')
        for group, settings in zip(base.param_groups, completed):  # all of them are right
            group.update(settings)
        _warn_of_momentum(base.param_groups, base)
        _warn_of_short_stages(base.param_groups)
        super().__init__(base.param_groups, base.defaults)
        self.base, self.compiled = base, compiled
        self._follow()

    def _follow(self) -> None:
        self._share()
        if hasattr(self.base, "_optimizer_load_state_dict_post_hooks"):  # a wrapper such as Lookahead has none
            self.base.register_load_state_dict_post_hook(self._share)  # loading replaces the shared objects
        for name in STATE_HOOKS:  # the base saves and loads, and so its hooks are the ones that run
            setattr(self, f"register_{name}_hook", getattr(self.base, f"register_{name}_hook"))
        for name in SWITCHES & set(dir(self.base)):
            setattr(self, name, getattr(self.base, name))

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        advice = f"call optimizer.base.{name}, whose changes to the weights are not scaled"
        raise AttributeError(f"PSGD has no {name}, which belongs to {type(base).__name__}: {advice}")

    def _share(self, *_: Optimizer) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.defaults = self.base.defaults
        self._taken = steps_taken(self.param_groups, self.state)

    def _alike(self, acts_on: str) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        """Lists of scaled weights with this `acts_on`, each list from one group and of one device, dtype and mesh."""
        for group in self.param_groups:
            if not is_scaled(group) or group["acts_on"] != acts_on:
                continue
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.numel():
                    mesh = parameter.device_mesh if is_sharded(parameter) else None
                    alike[parameter.device, parameter.dtype, mesh].append(parameter)
            yield from ((weights, group) for weights in alike.values())

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Multiplies each `.grad` by its PSG multiplier, in place, in the scaled groups with acts_on="gradient"."""
        moving = [(*with_gradients(weights), group) for weights, group in self._alike("gradient")]
        for weights, gradients, group in self._in_stage(moving):
            lambda_s = self._lambda_s(weights, gradients, group)
            scale_moves(gradients, weights, group, lambda_s, compiled=self.compiled)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one scaled step of the base optimizer. Returns the loss if there is a closure."""
        with torch.no_grad():
            starts = [
                (weights, [weight.clone() for weight in weights], group) for weights, group in self._alike("update")
            ]
        ranges = first_ranges(self.param_groups, self.state)
        loss = self._base_step(closure)
        self._scale_updates(starts)
        keep_ranges(self.param_groups, self.state, ranges)
        self._warn_once_after_the_plan()
        return loss

    @torch.no_grad()
    def _scale_updates(self, starts: list[Moves]) -> None:
        """Scales the base optimizer's changes to weights, which were `starts`."""
        moved: list[Moves] = []
        for weights, before, group in starts:
            # No weight without a gradient or state has moved, and the base optimizer expects its state to be empty.
            chosen = [i for i, weight in enumerate(weights) if weight.grad is not None or self.state.get(weight)]
            moved.append(([weights[i] for i in chosen], [before[i] for i in chosen], group))
        for weights, before, group in self._in_stage(moved):
            lambda_s = self._lambda_s(weights, before, group)
            scale_moves(weights, before, group, lambda_s, between=True, compiled=self.compiled)

    def _in_stage(self, moves: list[Moves]) -> list[Moves]:
        """Those of `moves` that are not empty. All their weights join the stage before any of them counts a step."""
        moves = [entry for entry in moves if entry[0]]
        for weights, _, group in moves:
            if "steps" in group:
                join_stage(weights, group, self.param_groups, self.state)
        return moves

    def _lambda_s(self, weights: list[Tensor], given: list[Tensor], group: dict[str, Any]) -> float | list[Tensor]:
        """lambda_s of this step: one for all weights, or one for each. `given` is what `take_step` takes."""
        own = take_step(weights, given, group, self.state, self.compiled) if "steps" in group else []
        number: float = group["lambda_s"]
        return own if group["lambda_s"] == AUTO else number

    def _warn_once_after_the_plan(self) -> None:
        """Counts the step. Replays of a CUDA graph and compiled steps are not counted here."""
        planned = [group["steps"] for group in self.param_groups if group.get("lambda_s") == AUTO]
        if not planned or torch.compiler.is_compiling():
            return
        self._taken += 1
        if self._taken == max(planned) + 1:
            warnings.warn(
                f"step {self._taken} of a stage of {max(planned)}: lambda_s stays as it is from here on", stacklevel=3
            )

    def pace(self) -> Pace:
        """How far the scaled weights have come. Reads from the device: call it once an epoch, not every step.

        Raises ValueError if no scaled group has `steps`, without which the pace is not measured.
        """
        return measured_pace(self.param_groups, self.state)

    def watch_loss(self, loss: float) -> bool:
        """Halves the pace of lambda_s "auto", for good, if `loss` is further above the largest of the calls before than
        a tenth of that, or not finite.

        Call it after each epoch with the mean training loss. Returns whether the pace was halved.
        """
        return watch_loss(self.param_groups, self.state, loss)

    def _base_step(self, closure: Callable[[], Any] | None) -> Any:
        if not closure:
            self.scale_gradients()
            return self.base.step()

        def scaled_closure() -> Any:
            loss = closure()
            self.scale_gradients()
            return loss

        return self.base.step(scaled_closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. The group is scaled if it has `bits` or target "zero"."""
        if "base" not in self.__dict__:  # Optimizer.__init__ passes the groups that the base already has
            super().add_param_group(param_group)
            return
        complete(param_group, self.psg_defaults, self.base)
        _warn_of_momentum([self.base.defaults | param_group], self.base)
        _warn_of_short_stages([param_group])
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict. Its param_groups hold the PSG settings."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict of PSGD or of the bare base optimizer.

        PSG settings that a state_dict of the bare base lacks keep their present values. One of PSGD brings its own, and
        with them whether the stage has steps and keeps the range of its weights.
        """
        before = [{key: group[key] for key in (PSG_KEYS | STAGE_KEYS) & group.keys()} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._share()
        for group, settings in zip(self.base.param_groups, before, strict=True):
            # What was saved with PSG belongs to its own stage, whether or not that has steps or keeps its range.
            keys = PSG_KEYS - {"keep_range"} if "lambda_s" in group else PSG_KEYS | STAGE_KEYS
            for key in keys & settings.keys():
                group.setdefault(key, settings[key])
        scaled = [group for group in self.param_groups if is_scaled(group)]
        for key in STAGE_SETTINGS:  # for groups that are added later
            values = {group.get(key, False if key == "keep_range" else None) for group in scaled}
            if len(values) == 1:
                self.psg_defaults[key] = values.pop()
        restore_records(self.param_groups, self.state, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "psg_defaults": self.psg_defaults, "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()
        super().__setstate__(state)
