"""What is installed: every file that a package needs, and nothing that its floor did not ask for."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("profiles", "edge_agent", "pruning", "coordinator")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {"paho-mqtt": "paho", "tomli-w": "tomli_w"}  # where they differ from the distribution's


def names(requirements: list[str]) -> set[str]:
    """Return the distributions that requirements name."""
    return {normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def normal(name: str) -> str:
    """Return a distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(roots: set[str]) -> set[str]:
    """Return the distributions that installing ``roots`` brings, themselves included."""
    found: set[str] = set()
    pending = list(roots)
    while pending:
        if (name := pending.pop()) in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        pending += names([requirement for requirement in requirements if "extra ==" not in requirement])
    return found


# ------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the files of a wheel built from a copy of the tree, without network."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "setup.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for floor in FLOORS:
        shutil.copytree(
            ROOT / floor,
            tree / floor,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll"),
        )
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    """Modules, board facts, templates, kernel sources: what lies in a package is in the wheel, unchanged."""
    files = {
        path.relative_to(ROOT).as_posix(): path.read_bytes()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.is_file()
        and path.suffix not in (".pyc", ".so", ".dylib", ".dll")
        and not path.name.startswith(".")
    }
    assert any(name.startswith("profiles/devices/") for name in files)

    assert [name for name, data in files.items() if wheel.get(name) != data] == []


def test_the_wheel_holds_nothing_else(wheel):
    """No test, no cache and no document slips into the wheel, and the licence does."""
    tops = {name.partition("/")[0] for name in wheel}

    assert {top for top in tops if not top.endswith(".dist-info")} == set(FLOORS)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert not [name for name in wheel if "__pycache__" in name]


# -------------------------------------------------------------------------------------- what it needs


def test_the_base_install_is_the_agent():
    """A board installs four things and what they bring, no more."""
    assert names(PROJECT["dependencies"]) == {"numpy", "onnxruntime", "paho-mqtt", "psutil"}


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_what_its_install_declares(floor):
    """Each third-party import is declared by the base install or an extra of that floor or one below it."""
    extras = {
        "profiles": [],
        "edge_agent": ["torch-agent", "masks"],
        "pruning": ["prune"],
        "coordinator": ["coordinator", "prune", "privacy"],
    }
    declared = names(PROJECT["dependencies"])
    for extra in extras[floor]:
        declared |= names(PROJECT["optional-dependencies"][extra])
    allowed = {IMPORT_NAMES.get(name, name).replace("-", "_") for name in declared}

    found = set()
    for path in (ROOT / floor).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    found -= {*sys.stdlib_module_names, *FLOORS}
    if floor == "profiles":
        found -= {"onnx"}  # inside functions of cost.py, and never on a board
    if floor == "edge_agent":
        found -= {"cryptography"}  # in short-lived processes, where openssl does instead

    assert found <= allowed


def test_the_board_imports_without_the_extras(tmp_path):
    """With only the base install and what it brings, every module of the two lower floors imports."""
    have = needed(names(PROJECT["dependencies"]))
    top_levels = metadata.packages_distributions()
    allowed = {top for top, owners in top_levels.items() if have & {normal(owner) for owner in owners}}
    assert {"numpy", "onnxruntime", "paho", "psutil"} <= allowed
    refused = sorted(set(top_levels) - allowed - set(FLOORS) - set(sys.stdlib_module_names))
    assert {"torch", "onnx", "typer"} <= set(refused)
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for floor in FLOORS[:2]
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__init__.py" and not path.name.startswith("torch_")
    ]
    script = tmp_path / "imports.py"
    script.write_text(
        f"""
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(name + " is not part of the base install", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(ROOT)!r})
for name in {modules!r}:
    importlib.import_module(name)
""",
        encoding="utf-8",
    )

    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_the_make_targets_install_exact_versions():
    """Whatever the declared extras name is pinned, for every Python version, in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    declared = names(PROJECT["dependencies"])
    for extra in ("coordinator", "prune", "torch-agent", "dev"):
        declared |= names(PROJECT["optional-dependencies"][extra])

    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; python_version (<|>=) '3\.\d+')?", pin) for pin in pins)
    assert declared <= {pin.partition("==")[0] for pin in pins}


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_a_command_leads_to_a_function(command):
    """Each installed command names a function that is there."""
    module, _, function = PROJECT["scripts"][command].partition(":")

    code = f"import {module} as module; assert callable(module.{function})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
