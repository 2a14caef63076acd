"""PSGD: position-based scaled gradients (PSG) round any torch optimizer.

The rule (paper, section 3; published code), for a weight tensor w with gradient g, before the base optimizer's
momentum and weight decay:

    g <- g * (lambda_s * |w - Q(w)| + eps)      Q: the nearest point of the weight's own low-bit grid
    g <- g * (lambda_s * |w| + eps)             target "zero": sparse training

A weight on its target stays there, the others move, and the float weights end up on the grid. Adam and its kin divide
the factor out of the gradient again; for them it can act on the step itself instead (ours):

    w <- w + (lambda_s * |w - Q(w)| + eps) * (the step that the base optimizer makes from w)
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .grid import check_bits, weight_scales

CHOICES = {"target": ("grid", "zero"), "acts_on": ("gradient", "update")}
STATE_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
SWITCHES = {"train", "eval"}  # of bases that keep two sets of weights, as schedule_free's do
# Settings of a scaled group. It is psg_eps because Adam and others have an eps of their own in the same dict.
PSG_KEYS = {"bits", "target", "lambda_s", "psg_eps", "per_channel", "acts_on"}
PSG_KEYS |= {"lambda_s_start", "lambda_s_limit", "lambda_s_loss"}  # of steer_lambda_s


def is_scaled(group: dict[str, Any]) -> bool:
    """Whether PSGD scales this parameter group: it has `bits`, or its `target` is "zero"."""
    return "bits" in group or group.get("target") == "zero"


def psg_multipliers(weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """lambda_s * |w - target(w)| + psg_eps for each tensor of a scaled group: new tensors of the weights' shapes.

    `weights` share one device and dtype, as the foreach calls need for their fast path; dividing and multiplying by the
    0-d scales has none.
    """
    if group["target"] == "zero":
        distances = list(torch._foreach_abs(weights))
    else:
        scales = weight_scales(weights, group["bits"], group["per_channel"])
        # |round(w / s) * s - w|; no clamp is needed, since max|w| / s is the grid's last integer (in bfloat16 nearly).
        distances = list(torch._foreach_div(weights, scales))
        torch._foreach_round_(distances)
        torch._foreach_mul_(distances, scales)
        torch._foreach_sub_(distances, weights)
        torch._foreach_abs_(distances)
    torch._foreach_mul_(distances, group["lambda_s"])
    if group["psg_eps"]:
        torch._foreach_add_(distances, group["psg_eps"])
    return distances


def with_gradients(weights: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of `weights` that have a gradient, and these gradients."""
    pairs = [(weight, weight.grad) for weight in weights if weight.grad is not None]
    return [weight for weight, _ in pairs], [gradient for _, gradient in pairs]


class PSGD(Optimizer):
    """Scales gradients by the distance of each weight to its grid point, then lets the base optimizer step.

        optimizer = PSGD(torch.optim.SGD(psg_param_groups(model, 4), lr=0.01, momentum=0.9), lambda_s=150)

    Contract: it is a torch Optimizer whose `param_groups` and `state` are the base's own objects and whose state_dict
    is the base's, key for key. `step` makes no host synchronisation and leaves the scaled gradients in `.grad`, so
    clear them before the next backward pass. With a closure, gradients are scaled after each evaluation.

    With acts_on="update" gradients stay as they are, and what the base does to a weight is scaled as a whole: its
    momentum, preconditioning, weight decay and penalties. The right choice for a base that normalises gradients.

    Args:
        base: an optimizer instance. In its parameter groups `bits` (2..8) or `target="zero"` marks what is scaled;
            the other groups pass through untouched.
        lambda_s: strength, > 0, for the scaled groups that name none (default 150: the paper's for 4 bits). It is
            written into them, so that groups used a second time keep the first lambda_s.
        eps: added to the multiplier, >= 0, for the scaled groups without a `psg_eps` (default 0, as published).
        acts_on: "gradient" (default, as published) or "update", for the scaled groups that name none.

    What lies on its grid stays unless eps > 0: a tensor of zeros, and the largest weight, which sets the grid.

    A base that has train() and eval(), as schedule_free's have, lends them. Its other methods are its own: what they do
    to the weights is not scaled, so call them on `optimizer.base`, knowing that.

    Raises TypeError if `base` is not an optimizer instance, or a PSGD; ValueError for a setting out of range, for
    complex weights, for PSG settings in a group that is not marked, and if no group is marked.
    """

    def __init__(self, base: Optimizer, lambda_s: float = 150.0, eps: float = 0.0, acts_on: str = "gradient") -> None:
        if not isinstance(base, Optimizer) or isinstance(base, PSGD):
            raise TypeError(f"base must be an instance of another torch optimizer, got {base!r}")
        self.psg_defaults = dict(target="grid", lambda_s=lambda_s, psg_eps=eps, per_channel=False, acts_on=acts_on)
        for group in base.param_groups:
            self._complete(group)
        if not any(map(is_scaled, base.param_groups)):
            raise ValueError('no parameter group has "bits": build the base optimizer on psg_param_groups(model, grid)')
        if SWITCHES & set(dir(base)) and any(group.get("acts_on") == "update" for group in base.param_groups):
            raise ValueError(f'{type(base).__name__} keeps weights of its own, which acts_on="update" would not scale')
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self._follow()

    def _follow(self) -> None:
        self._share()
        if hasattr(self.base, "_optimizer_load_state_dict_post_hooks"):  # a wrapper such as Lookahead has none
            self.base.register_load_state_dict_post_hook(self._share)  # loading replaces them
        for name in STATE_HOOKS:  # saving and loading are the base's, and so are the hooks that it calls
            setattr(self, f"register_{name}_hook", getattr(self.base, f"register_{name}_hook"))
        for name in SWITCHES & set(dir(self.base)):
            setattr(self, name, getattr(self.base, name))

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base")
        if name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        advice = f"call optimizer.base.{name}, whose changes of weights are not scaled"
        raise AttributeError(f"PSGD has no {name}, which belongs to {type(base).__name__}: {advice}")

    def _share(self, *_: Optimizer) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.defaults = self.base.defaults

    def _complete(self, group: dict[str, Any]) -> None:
        """Checks a scaled group's settings, then fills in the missing ones; other groups stay as they are."""
        if not is_scaled(group):
            if stray := PSG_KEYS & group.keys():
                key = min(stray)
                raise ValueError(f'a group with {key}={group[key]!r} needs "bits", or target "zero", to be scaled')
            return
        settings = {key: group.get(key, default) for key, default in self.psg_defaults.items()}
        for key, choices in CHOICES.items():
            if settings[key] not in choices:
                raise ValueError(f"{key} must be one of {choices}, got {settings[key]!r}")
        params = group["params"] if isinstance(group["params"], (list, tuple)) else ()
        if any(isinstance(parameter, Tensor) and parameter.is_complex() for parameter in params):
            raise ValueError("a scaled group has complex weights: only real ones have a grid")
        if settings["target"] == "grid":
            check_bits(group["bits"])
        for key, least in (("lambda_s", "> 0"), ("psg_eps", ">= 0")):
            value = settings[key]
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and key == "lambda_s"):
                raise ValueError(f"{key} must be a finite number {least}, got {value!r}")
        group.update(settings)

    def _alike(self, acts_on: str) -> Iterator[tuple[list[Tensor], dict[str, Any]]]:
        """The weights of the scaled groups with this `acts_on`, in lists of one group, device and dtype."""
        for group in self.param_groups:
            if not is_scaled(group) or group["acts_on"] != acts_on:
                continue
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.numel():
                    alike[parameter.device, parameter.dtype].append(parameter)
            yield from ((weights, group) for weights in alike.values())

    @torch.no_grad()
    def scale_gradients(self) -> None:
        """Multiplies each `.grad` in the groups whose gradients are scaled by its PSG multiplier, in place."""
        for weights, group in self._alike("gradient"):
            moving, gradients = with_gradients(weights)
            if moving:
                torch._foreach_mul_(gradients, psg_multipliers(moving, group))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One scaled step of the base optimizer; returns the closure's loss, if there is one."""
        with torch.no_grad():
            starts = [
                (weights, [weight.clone() for weight in weights], psg_multipliers(weights, group))
                for weights, group in self._alike("update")
            ]
        loss = self._base_step(closure)
        with torch.no_grad():
            for weights, before, multipliers in starts:
                torch._foreach_sub_(weights, before)
                torch._foreach_mul_(weights, multipliers)
                torch._foreach_add_(weights, before)
        return loss

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
        """Adds a group to the base optimizer; scaled if it has `bits` or target "zero"."""
        if "base" not in self.__dict__:  # called by Optimizer.__init__ with the groups the base already has
            super().add_param_group(param_group)
            return
        self._complete(param_group)
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict; the PSG settings are in its param_groups."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a state_dict of PSGD, with its PSG settings, or of the bare base, which keeps this instance's."""
        before = [{key: group[key] for key in PSG_KEYS & group.keys()} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._share()
        for group, settings in zip(self.base.param_groups, before, strict=True):
            for key, value in settings.items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "psg_defaults": self.psg_defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow()
        super().__setstate__(state)
