"""The floors of the house: a file imports only from those below its own, and the cheap ones import no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import loratools

PACKAGE = Path(loratools.__file__).parent
# from the ground up; a name is a file or a folder of loratools/
FLOORS = (
    ("errors",),
    ("source",),
    ("flushing", "jsonfile", "linalg", "names", "output", "refs", "sidefiles", "statistics", "threads"),
    ("follower", "header"),
    ("tensorfile",),
    ("alignment", "families", "flatnames", "gguffile", "quantized", "sliced", "tensors", "tensorwriter", "weightfiles"),
    ("deltas", "digests", "needed", "rounding", "torchfile", "ulps"),
    ("codes",),
    ("dequantize",),
    ("facts", "layouts", "orientation", "rewrite"),
    ("listing", "resolution"),
    ("adapter", "checkpoint", "corrections", "record"),
    ("changes", "differences", "factors", "pipeline", "receipt", "stream"),
    ("compress", "effect", "inverse", "plan"),
    ("ties",),
    ("planning",),
    ("formats",),
    ("layers",),
    ("ops",),
    ("workflows",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def imports(path: Path) -> list[list[str]]:
    """The modules of loratools a file imports, at its top or within a function, as components below the package."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "no relative imports"
            module = node.module or ""
            found += [f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module for alias in node.names]
    return [name.split(".")[1:] for name in found if name.startswith("loratools.")]


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down(path: Path) -> None:
    own = list(path.relative_to(PACKAGE).with_suffix("").parts)
    for other in imports(path):
        if other[0] != own[0]:
            assert LEVEL[other[0]] < LEVEL[own[0]], f"{'.'.join(own)} imports {'.'.join(other)}"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name in ("ops", "cli", "workflows", "formats")], ids=str)
def test_operations_commands_and_formats_do_not_know_each_other(path: Path) -> None:
    """They share `_name.py`, `base.py` and how a container is opened and written; the files of one format begin with its name."""
    for other in imports(path):
        if path.stem != "__init__" and len(other) > 1 and other[0] == path.parent.name:
            # targets are data; a card is what push writes
            shared = other[1] in ("base", "opening", "writing", "targets", "card") or other[1].startswith("_")
            assert shared or (other[0] == "formats" and other[1].partition("_")[0] == path.stem.partition("_")[0]), other


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {path.relative_to(PACKAGE).with_suffix("").parts: {tuple(other) for other in imports(path)} for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(FILES)  # CycleError names the circle


def test_every_file_has_a_floor() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("module", ["", ".tensorfile", ".checkpoint", ".formats", ".ops.inspect", ".cli"])
def test_opening_headers_needs_no_torch(module: str) -> None:
    heavy = {"torch", "huggingface_hub", "numpy", "rich", "transformers"}
    code = f"import sys, loratools{module}; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


# who talks to the Hub, and to publish as well as to read
ONLINE = {"source/cache.py", "source/remote.py", "source/download.py", "source/publish.py", "workflows/push.py"}


def test_only_the_source_and_push_import_the_hubs_client() -> None:
    """Anywhere in a file, by name or by its text, such as a call of import_module."""
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if _imports_client(path)}
    assert found <= ONLINE and "source/remote.py" in found, found - ONLINE


def _imports_client(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(re.fullmatch(r"huggingface_hub(\.[\w.]+)?", name) for name in names)
