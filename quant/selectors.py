"""What `Grid(include=..., exclude=...)` may say, and which parameters of a network that is."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Selector = str | type[nn.Module]  # a pattern for names of parameters and modules, or a class of modules


def selectors(name: str, value: Any) -> tuple[Selector, ...]:
    """`value`, given as `name`, as a tuple. Raises ValueError for anything but name patterns and classes of modules."""
    entries = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for entry in entries:
        if not (isinstance(entry, str) and entry) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
            raise ValueError(f"{name} takes name patterns and classes of modules, got {entry!r}")
    return entries


def selects(selector: Selector, parameter: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `selector` stands for the parameter of this name, or for a module of `modules` that it is in."""
    parts = parameter.split(".")
    paths = [".".join(parts[:end]) for end in range(len(parts))]
    if isinstance(selector, str):
        return any(fnmatchcase(name, selector) for name in (parameter, *paths))
    return any(isinstance(modules[path], selector) for path in paths)
