"""The rooms: a room imports those below it, nothing goes in a circle, and each is a handful of files that say what they are."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# from the lowest up; rooms of one line do not know each other. A room imports what stands above it in this list.
FLOORS = (
    ("errors", "version"),
    ("values",),
    ("passes.tracing",),
    ("passes.layers", "passes.labels"),
    ("passes.criteria",),
    ("passes.channels",),
    ("passes.transforms",),
    ("passes.statistics",),
    ("passes.fitting",),
    ("runtime.onnx", "runtime.timing"),
    ("runtime.backends",),
    ("runtime.measuring",),
    ("runtime.latency_model", "runtime.engines"),
    ("tasks",),
    ("data",),
    ("training",),
    ("search",),
    ("methods.base",),
    ("methods.structures",),
    ("methods.losses", "methods.layers"),
    ("methods.searching",),
    ("methods.published",),
    ("methods",),
    ("runs",),
    ("report",),
    ("pipeline",),
    ("api",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def modules():
    """Module name without `compressor.` -> its file."""
    found = {}
    for folder, inside in (("compressor", ""), ("passes", "passes"), ("runtime", "runtime")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "compressor" and parts[0] in ("passes", "runtime"):
                continue  # links
            name = ".".join([part for part in (inside, *parts) if part])
            found[name.removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports_of(file):
    """Modules of ours that a file imports, wherever in it; those for annotations alone do not count."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "compressor":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "compressor"]
        for name in names:
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found


IMPORTS = {name: imports_of(file) - {name} for name, file in MODULES.items()}


def room_of(module):
    parts = module.split(".")
    while ".".join(parts) not in HEIGHT:
        parts.pop()
        if not parts:
            pytest.fail(f"{module} is in no room of FLOORS")
    return ".".join(parts)


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name not in ("passes", "runtime")))
def test_a_room_imports_what_is_below_it(module):
    own = room_of(module)
    upward = {other for other in IMPORTS[module] if room_of(other) != own and HEIGHT[room_of(other)] >= HEIGHT[own]}
    assert not upward, f"{module} ({own}) imports upwards"


def test_no_file_imports_in_a_circle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_the_walk_over_imports_sees_what_there_is():
    assert "values.plan" in IMPORTS["api"]
    assert "search.cluster" in IMPORTS["methods.searching.search_study"], "inside a function"
    assert len(MODULES) > 150


FOLDERS = sorted({file.parent for file in MODULES.values()})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_is_a_handful_of_files_that_say_what_they_are(folder):
    files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert len(files) <= 13
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
