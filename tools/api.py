"""docs/api.md: every public function and class of the package, from their docstrings.

python -m tools.api
"""

import inspect
import re
from types import ModuleType

import quant
import quant.deploy
from utils.cli import Parser, run
from utils.files import write_page

PACKAGES: dict[str, ModuleType] = {"psgd": quant, "psgd.deploy": quant.deploy}
INTRODUCTION = """# The package psgd

`help(psgd.NAME)` shows shapes, defaults, errors and sources. Other functions are in the package's modules. This page is
made by `python -m tools.api`.
"""


def call(name: str, thing: object) -> str:
    """How `thing` is called: its parameters, with the defaults that a parameter has, and no types."""
    if not callable(thing):
        return name
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(thing).parameters.values()
    ]
    return f"{name}({', '.join(map(str, parameters))})"


def first_sentence(thing: object) -> str:
    """The first paragraph of a docstring up to its first full stop, as one line of a Markdown table."""
    paragraph = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return (re.split(r"(?<!\.)\. ", paragraph)[0].rstrip(".") + ".").replace("|", r"\|")


def page() -> str:
    """The whole of docs/api.md."""
    parts = [INTRODUCTION]
    for package, module in PACKAGES.items():
        rows = [f"| `{call(name, getattr(module, name))}` | {first_sentence(getattr(module, name))} |"
                for name in module.__all__]  # fmt: skip
        parts.append("\n".join([f"## {package}\n", "| | |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def parser() -> Parser:
    p = Parser(__doc__ or "")
    p.add_argument("--out", default="docs/api.md", metavar="FILE", help="file to write")
    return p


def main() -> None:
    write_page(parser().parse_args().out, page)


if __name__ == "__main__":
    run(main)
