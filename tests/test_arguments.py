"""docs/arguments.md is what the parsers say."""

import re

import pytest

from tests.helpers import ROOT
from tools.arguments import COMMANDS, page, table
from utils import cli as types
from utils.cli import Parser

PAGE = (ROOT / "docs/arguments.md").read_text()


def test_the_page_is_current(cli, tmp_path):
    assert page() == PAGE, "run python -m tools.arguments"
    assert cli("tools.arguments", "--out", "arguments.md").code == 0
    assert (tmp_path / "arguments.md").read_text() == PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_help_has_a_whole_row(cli, command):
    """And no other has one."""
    help_text = cli(COMMANDS[command] + (".py" if command.endswith(".py") else ""), "--help").out
    flags = set(re.findall(r"^  (--\w+)", help_text, flags=re.MULTILINE)) - {"--help"}
    section = PAGE.split(f"\n## {command}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert {name.strip("`") for name, *_ in rows if name.startswith("`--")} == flags
    for row in rows:
        assert len(row) == 4 and row[1] and row[3], row
        assert "(default" not in row[3] and row[1] != "None"


def test_a_row_says_what_argparse_does():
    p = Parser("")
    p.add_argument("file", metavar="FILE", help="a file")
    p.add_argument("--n", type=types.count, nargs="+", default=[3, 4], help="numbers, <n>")
    p.add_argument("--share", type=types.positive_or("auto"), default=150.0, help="strength")
    p.add_argument("--kind", choices=["a", "b"], default=None, help="kind (default: as (before))")
    p.add_argument("--on", action="store_true", help="switch")
    p.add_argument("--names", nargs="*", default=[], metavar="NAME", help="names")
    assert table(p).splitlines()[2:] == [
        "| `file` | required | file | a file |",
        "| `--n` | `3` `4` | a whole number >= 1; one or more | numbers, \\<n> |",
        "| `--share` | `150` | a finite number > 0, or auto | strength |",
        "| `--kind` | as (before) | `a`, `b` | kind |",
        "| `--on` | off |  | switch |",
        "| `--names` | none | name; any number | names |",
    ]


def test_an_output_that_cannot_be_written_is_one_line(rejected):
    assert "--out no/a.md cannot be written" in rejected("tools.arguments", "--out", "no/a.md")
