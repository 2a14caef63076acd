"""The import graph of the project: which module imports which, and whether there is a circle.

    python -m tools.imports             # by folder
    python -m tools.imports --modules   # by module

An import inside a function, which runs when the function is called, counts too. One for type checking does not.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from utils.cli import Parser, UserError, run

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "quant", "utils", "tools")
SCRIPTS = ("train", "eval", "visualize", "export")


@cache
def modules() -> dict[str, Path]:
    """The project's modules, without tests and examples: file by dotted name."""
    found = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(name: str, path: Path, top_level: bool = False) -> Iterator[str]:
    """Dotted names that the module `name` imports, relative ones resolved; with `top_level` only when it is loaded."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text()), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    """The nodes below `tree` without what only a type checker reads; with `top_level` only what runs at load."""
    for node in ast.iter_child_nodes(tree):
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _statements(node, top_level)


def graph(top_level: bool = False) -> dict[str, set[str]]:
    """The project's modules that each module imports."""
    known = modules()
    return {
        name: {target for target in imported_names(name, path, top_level) if target in known} - {name}
        for name, path in known.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def folder_of(name: str) -> str:
    """The folder of a module, or "scripts"."""
    path = modules()[name]
    folder = path.parent.relative_to(ROOT).as_posix()
    return "scripts" if folder == "." else folder


def by_folder(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The other folders that the modules of each folder import from."""
    folders: dict[str, set[str]] = defaultdict(set)
    for name, targets in edges.items():
        folders[folder_of(name)] |= {folder_of(target) for target in targets} - {folder_of(name)}
    return folders


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--modules", action="store_true", help="module by module")
    return p


def main() -> None:
    args = parser().parse_args()
    edges = graph()
    shown, width = (edges, 28) if args.modules else (by_folder(edges), 16)
    for name, targets in shown.items():
        print(f"{name:{width}} -> {', '.join(sorted(targets)) or '-'}")
    if found := circle(edges):
        raise UserError(f"a circle: {' -> '.join(found)}")
    print("no circle", file=sys.stderr)


if __name__ == "__main__":
    run(main)
