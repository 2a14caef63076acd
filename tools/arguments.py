"""docs/arguments.md: every flag of every script and tool, from their parsers.

python -m tools.arguments
"""

import argparse
import importlib
import re
from pathlib import Path

from utils.cli import Parser, run
from utils.files import write_page

SCRIPTS = ("train", "eval", "export", "visualize")
TOOLS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
COMMANDS = {f"{name}.py": name for name in SCRIPTS} | {f"python -m tools.{name}": f"tools.{name}" for name in TOOLS}
TOLD_DEFAULT = re.compile(r" ?\(default: (.*)\)$")  # a help text says what a default of None stands for
METAVARS = {"FILE": "file", "DIR": "folder", "NAME": "name"}
SEVERAL = {"+": "; one or more", "*": "; any number"}
INTRODUCTION = """# Arguments

Every command prints these with `--help`. The flags of the published code keep their names. This page is made by
`python -m tools.arguments`.
"""


def default_of(action: argparse.Action) -> str:
    """What holds without the flag."""
    told = TOLD_DEFAULT.search(action.help or "")
    if action.required:
        return "required"
    if told:
        return told[1]
    if action.nargs == 0:
        return "off"
    values = action.default if isinstance(action.default, list) else [action.default]
    return (
        " ".join(
            f"`{value:g}`" if isinstance(value, float) else f"`{value}`" for value in values if value not in (None, "")
        )
        or "none"
    )


def values_of(action: argparse.Action) -> str:
    """What follows the flag: its choices, what the docstring of its type says, or what its metavar stands for."""
    if action.nargs == 0:
        return ""
    if action.choices:
        words = ", ".join(f"`{choice}`" for choice in action.choices)
    elif action.type:
        words = (action.type.__doc__ or "").removeprefix("Argument type: ").rstrip(".")
    else:
        words = METAVARS.get(str(action.metavar), "text")
    return words + SEVERAL.get(str(action.nargs), "")


def table(parser: argparse.ArgumentParser) -> str:
    """A row of Markdown for each flag."""
    lines = ["| flag | default | values | meaning |", "|---|---|---|---|"]
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            name = " ".join(action.option_strings) or action.dest
            cells = [f"`{name}`", default_of(action), values_of(action), TOLD_DEFAULT.sub("", action.help or "")]
            lines.append(f"| {' | '.join(cells)} |".replace("<", r"\<"))  # <dataset> is not a tag of HTML
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of docs/arguments.md."""
    parts = [INTRODUCTION]
    for command, name in COMMANDS.items():
        module = importlib.import_module(name)
        summary, _, _ = (module.__doc__ or "").partition("\n\n")
        parts.append(f"## {command}\n\n{summary}\n\n{table(module.parser())}")
    return "\n".join(parts)


def parser() -> Parser:
    p = Parser(__doc__ or "")
    p.add_argument("--out", default="docs/arguments.md", metavar="FILE", help="file to write")
    return p


def main() -> None:
    write_page(parser().parse_args().out, page)


if __name__ == "__main__":
    run(main)
