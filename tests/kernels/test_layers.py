"""kernels/ imports nothing of the project but itself, and not in a circle; import-linter sees packages only."""

import ast
from contextlib import nullcontext
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def imported(path):
    """Full names of all that a file imports, wherever in it; of `from m import x` both m and m.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (module, *(f"{module}.{alias.name}" for alias in node.names))


def project_imports(folder):
    """{file's name: files of bpo_fast.kernels that it imports}; fails on any other import of the project."""
    names = {path.stem for path in folder.glob("*.py")}
    graph = {}
    for path in folder.glob("*.py"):
        ours = {name for name in imported(path) if name.split(".")[0] in ("", "bpo_fast", "kernels")}
        foreign = {name for name in ours if (name + ".").split("bpo_fast.kernels.")[0]}
        assert not foreign, f"{path.name} imports {foreign}"
        graph[path.stem] = {name.split(".")[2] for name in ours if name.count(".") > 1} & names
    return graph


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("from bpo_fast.ops import rows", AssertionError),
        ("from bpo_fast import kernels", AssertionError),
        ("from . import b", AssertionError),
        ("from bpo_fast.kernels import b", CycleError),
        ("import bpo_fast.kernels.b", CycleError),
        ("import bpo_fast_other, torch", None),
    ],
)
def test_what_is_refused(tmp_path, line, error):
    (tmp_path / "a.py").write_text(line)
    (tmp_path / "b.py").write_text("def f():\n    from bpo_fast.kernels.a import g")
    with pytest.raises(error) if error else nullcontext():
        TopologicalSorter(project_imports(tmp_path)).prepare()


def test_kernels_import_only_kernels_and_in_no_circle():
    graph = project_imports(KERNELS)
    assert graph["sequence_logps"] == {"heuristics", "rows"}
    TopologicalSorter(graph).prepare()  # raises CycleError
