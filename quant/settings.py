"""The PSG settings of a parameter group: what they may be, and how the missing ones are filled in."""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .grid import check_bits, check_scale_dims

CHOICES = {"target": ("grid", "zero"), "acts_on": ("gradient", "update")}
AUTO = "auto"  # as lambda_s: each tensor's own, set by the pace of the stage
# The key is psg_eps because Adam and others have their own eps in the same dict.
PSG_KEYS = {"bits", "target", "lambda_s", "psg_eps", "per_channel", "scale_dims", "acts_on", "keep_range"}
STAGE_KEYS = {"steps", "tau_end", "noise_limit", "psg_loss"}  # of a group whose stage has a known number of steps
STAGE_DEFAULTS = {"tau_end": 10.0, "noise_limit": 0.1}  # of lambda_s "auto"; see quant/lambda_s.py
SWITCHES = {"train", "eval"}  # methods of base optimizers that keep two sets of weights, such as those of schedule_free
LEAST = {"lambda_s": "> 0", "psg_eps": ">= 0", "tau_end": "> 0", "noise_limit": "> 0"}


def is_scaled(group: dict[str, Any]) -> bool:
    """Whether PSGD scales this parameter group, which means that it has `bits` or that its `target` is "zero"."""
    return "bits" in group or group.get("target") == "zero"


def momentum(group: dict[str, Any]) -> float:
    """The momentum of the base optimizer's steps in a group: SGD's, or beta1 of Adam and its kin; 0 if it has none."""
    betas = group.get("betas") or (0.0,)
    return float(group.get("momentum") or betas[0])


def complete(group: dict[str, Any], defaults: dict[str, Any], base: Optimizer) -> None:
    """Checks the settings of a scaled group of `base`, then fills in the missing ones. Other groups stay as they are.

    Raises ValueError, showing the value, for settings that are out of range or do not go together.
    """
    if not is_scaled(group):
        if stray := (PSG_KEYS | STAGE_KEYS) & group.keys():
            key = min(stray)
            raise ValueError(f'a group with {key}={group[key]!r} needs "bits", or target "zero", to be scaled')
        return
    settings = defaults | {key: group[key] for key in (PSG_KEYS | STAGE_KEYS) & group.keys()}
    for key, choices in CHOICES.items():
        if settings[key] not in choices:
            raise ValueError(f"{key} must be one of {choices}, got {settings[key]!r}")
    if settings["acts_on"] == "update" and SWITCHES & set(dir(base)):
        raise ValueError(f'{type(base).__name__} keeps weights of its own, which acts_on="update" would not scale')
    params = group["params"] if isinstance(group["params"], (list, tuple)) else [group["params"]]
    if any(isinstance(parameter, Tensor) and parameter.is_complex() for parameter in params):
        raise ValueError("a scaled group has complex weights: only real ones have a grid")
    if not isinstance(settings["keep_range"], bool):
        raise ValueError(f"keep_range must be True or False, got {settings['keep_range']!r}")
    if settings["keep_range"] and settings["target"] == "zero":
        raise ValueError('keep_range=True needs a grid, and a group has target "zero"')
    if settings["target"] == "grid":
        settings["bits"] = check_bits(group["bits"])
        if settings.get("scale_dims") is not None:
            settings["scale_dims"] = check_scale_dims(settings["scale_dims"])
    if settings["lambda_s"] == AUTO:
        settings = STAGE_DEFAULTS | settings
        _check_auto(settings)
    for key in LEAST.keys() & settings.keys():
        settings[key] = _checked_number(key, settings[key])
    if not settings["keep_range"]:
        del settings["keep_range"]
    if settings["steps"] is None:
        del settings["steps"]
    else:
        _check_steps(settings, base)
        settings["steps"] = int(settings["steps"])
    group.update(settings)


def _checked_number(key: str, value: Any) -> float | str:
    """The value as a plain number, which every state_dict can hold; "auto" as it is. Raises ValueError for others."""
    if key == "lambda_s" and value == AUTO:
        return AUTO
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and LEAST[key] == "> 0"):
        auto = ' or "auto"' if key == "lambda_s" else ""
        raise ValueError(f"{key} must be a finite number {LEAST[key]}{auto}, got {value!r}")
    return float(value)


def _check_steps(settings: dict[str, Any], base: Optimizer) -> None:
    """Raises ValueError where the pace of a group cannot be measured."""
    steps = settings["steps"]
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    if settings["acts_on"] == "gradient" and not isinstance(base, torch.optim.SGD):
        raise ValueError(
            f"the pace of scaled gradients is known only for torch.optim.SGD: {type(base).__name__} may normalize "
            'gradients, which cancels lambda_s; use acts_on="update", or lambda_s a number without steps'
        )


def _check_auto(settings: dict[str, Any]) -> None:
    """Raises ValueError where the pace of a group cannot be set."""
    if settings["target"] == "zero":
        raise ValueError('lambda_s "auto" needs a grid: give a group with target "zero" a number, such as 150')
    if settings["steps"] is None:
        raise ValueError('lambda_s "auto" needs steps, the number of optimizer steps of the stage')
