"""The walls of the project: imports point one way, and what says that it is quick to load imports no torch."""

import subprocess
import sys

import pytest

import quant
from tests.helpers import ROOT
from tools.imports import circle, folder_of, graph, imported_names, modules

ALLOWED = {  # what the modules of a folder may import from
    "quant": {"quant", "quant/deploy"},
    "quant/deploy": {"quant", "quant/deploy"},
    "models": {"models"},
    "utils": {"quant", "quant/deploy", "models", "utils"},
    "tools": {"quant", "quant/deploy", "models", "utils", "tools", "scripts"},
    "scripts": {"quant", "quant/deploy", "models", "utils"},
}
WITHOUT_TORCH = ["train", "eval", "visualize", "export", "utils.cli", "utils.data.specs", "utils.runs", "utils.signals"]
OPTIONAL = {"onnx", "onnx_ir", "onnxscript", "safetensors"}  # imported by the function that needs them


def test_imports_point_one_way():
    for name, targets in graph().items():
        own = folder_of(name)
        walls = ALLOWED["utils" if own.startswith("utils") else own]
        for target in targets:
            folder = folder_of(target)
            assert ("utils" if folder.startswith("utils") else folder) in walls, f"{name} imports {target}"


def test_there_is_no_circle():
    assert circle(graph()) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # it would be seen


def test_quant_needs_torch_only():
    for name, path in modules().items():
        if name.startswith("quant"):
            foreign = {module.partition(".")[0] for module in imported_names(name, path)}
            assert foreign - sys.stdlib_module_names - OPTIONAL <= {"quant", "torch"}, name
            at_load = {module.partition(".")[0] for module in imported_names(name, path, top_level=True)}
            assert not at_load & OPTIONAL, name


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_it_loads_without_torch(name):
    code = f"import sys, {name}; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_module_has_the_name_of_a_public_function():
    names = {module.rpartition(".")[2] for module in modules() if module.startswith("quant.")}
    assert not names & set(quant.__all__)
    assert all(callable(getattr(quant, name)) for name in quant.__all__)


def test_nothing_in_utils_runs_by_name():
    assert not [
        name for name, path in modules().items() if name.startswith("utils") and "if __name__" in path.read_text()
    ]
