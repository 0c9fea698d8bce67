"""Guards what the tree promises to whoever reads it: no import circles, no file, class or function that is several."""

import ast
from pathlib import Path

import pytest
import torch

import lucid.optim as optim

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
KERNELS = ROOT / "src/lucid/engine/cuda/kernels.py"  # where Triton wants one function


def module_of(path):
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES} | {"lucid.engine._cpu": None}


def imported(module, path):
    """The modules of ours that a module imports anywhere, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            whole = {f"{origin}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else origin for name in whole}
    return found & MODULES.keys() - {module}


def circle(graph):
    """One circle of a graph, or none: what is left when all that imports nothing left is taken away."""
    left = dict(graph)
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    return sorted(left)


def test_no_module_imports_what_imports_it():
    graph = {module: imported(module, path) for module, path in MODULES.items() if path}
    assert sum(map(len, graph.values())) > 200
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["a", "b", "c"]


def test_the_engine_knows_no_optimizer():
    for module, path in MODULES.items():
        if module.startswith("lucid.engine") and path:
            assert not [name for name in imported(module, path) if name.startswith("lucid.optim")], module


def lines_of(node):
    """How long it is without its docstring."""
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


@pytest.mark.parametrize(("kind", "most"), [(ast.ClassDef, 300), (ast.FunctionDef, 60)], ids=["class", "function"])
def test_no_class_or_function_is_several(kind, most):
    found = {
        f"{module_of(path)}:{node.lineno} {node.name}": lines_of(node)
        for path in SOURCES
        if path != KERNELS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kind)
    }
    assert len(found) > 100
    assert {name: lines for name, lines in found.items() if lines > most} == {}


def test_files_are_one_idea_each():
    lengths = {path: len(path.read_text().splitlines()) for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]}
    assert {path.name for path, lines in lengths.items() if lines > (400 if path in SOURCES else 600)} <= {KERNELS.name}


def test_a_quiet_step_calls_the_extension_five_times():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param])
    optimizer.step()
    plan, calls = optimizer._stepper.whole.plan, []

    class Counted:
        def __init__(self, rows):
            self._rows = rows

        def __getattr__(self, name):
            calls.append(name)
            return getattr(self._rows, name)

    plan._rows = plan._cpu._rows = Counted(plan._rows)
    optimizer.step()
    assert calls == ["gather", "steps", "before_writing", "update", "release"]
    assert optimizer.state[param]["step"] == 2


def test_every_test_file_says_what_it_guards():
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
