"""What is shipped: the wheel's contents, one version, the core dependencies and no more, pins for all the tests need."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import loratools

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = {"torch", "safetensors", "numpy", "click", "huggingface-hub", "rich", "blake3"}
# programs that tests/interop/trainers runs where somebody installed them, and whose pins fight with the tests' own
TRAINERS = {"torchtune", "litgpt", "lightning", "llama_cpp", "megatron"}
WITH_TORCH = {"triton"}  # which torch's CUDA builds bring; layers/_fused.py does without


def pins() -> dict[str, str]:
    """Name and version of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a line that is not NAME==VERSION"
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as a build front end makes it, from pyproject.toml alone."""
    folder = tmp_path_factory.mktemp("wheel")
    script = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(folder / made.stdout.split()[-1])


def test_the_wheel_holds_the_package_its_marker_and_its_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loratools").rglob("*") if path.suffix in (".py", ".toml")}
    assert sources <= names
    assert "loratools/py.typed" in names
    info = f"loratools-{loratools.__version__}.dist-info"
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {name.split("/")[0] for name in names} == {"loratools", info}
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_says_what_pyproject_says(wheel: zipfile.ZipFile) -> None:
    info = f"loratools-{loratools.__version__}.dist-info"
    metadata = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == loratools.__version__ == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert wheel.read(f"{info}/entry_points.txt").decode().split() == ["[console_scripts]", "loratools", "=", "loratools.cli:main"]
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {canonicalize_name(need.name) for need in required if need.marker is None} == CORE
    assert set(metadata.get_all("Provides-Extra", [])) == {"demo", "gguf", "plot", "test"}


def test_the_core_dependencies_are_these_and_no_others() -> None:
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == CORE


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
def test_every_requirement_is_pinned_within_its_range(line: str) -> None:
    need = Requirement(line)
    if need.name == "loratools":
        assert need.extras <= set(EXTRAS)
        return
    assert need.specifier.contains(pins()[canonicalize_name(need.name)])


@pytest.mark.parametrize(("folder", "extras"), [("loratools", ["demo", "gguf", "plot"]), ("tests", ["demo", "gguf", "plot", "test"])])
def test_what_is_imported_is_required(folder: str, extras: list[str]) -> None:
    """Nothing that happens to be installed here is needed, by the package or by its tests, without being asked for."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    required = {canonicalize_name(Requirement(line).name) for line in lines}
    owners = packages_distributions()
    for path in (ROOT / folder).rglob("*.py"):
        known = {"loratools", "tests", *WITH_TORCH, *(TRAINERS if path.parent.name == "trainers" else ())}
        for name in imported(path) - set(sys.stdlib_module_names) - known:
            assert {canonicalize_name(owner) for owner in owners.get(name, [name])} & required, f"{path} imports {name}"


def imported(path: Path) -> set[str]:
    """First components of all modules that a file imports, anywhere in it; relative imports have none."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in whole | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}} - {""}


def test_torch_is_pinned_to_the_release_the_tests_ran_with() -> None:
    assert pins()["torch"] == "2.13.0"


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert all(f"{number}. " in text for number in range(1, 10))


def test_importing_loratools_imports_no_torch() -> None:
    heavy = {"torch", "numpy", "huggingface_hub", "rich", "transformers"}
    script = f"import sys, loratools, loratools.cli; print(*{heavy} & set(sys.modules))"
    seen = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert seen.split() == []


def test_every_public_name_is_there() -> None:
    for name in loratools.__all__:
        assert getattr(loratools, name) is not None
    assert dir(loratools) == sorted(loratools.__all__)
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        loratools.mrege  # noqa: B018
