"""The plan of the house, as tests: who may import whom, who may write what, how big a room is.

Everything here reads the source, so that a rule holds for a module from its first day.
"""

import ast
import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import profiles.errors

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("profiles", "edge_agent", "pruning", "coordinator")  # lowest first
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for floor in FLOORS for path in (ROOT / floor).rglob("*.py")
)
BOARD = [path for path in MODULES if path.startswith(FLOORS[:2])]

# Law 2. These hold a replica's weights to change them; everyone else only reads.
WRITERS = ("edge_agent/replay.py", "edge_agent/grid.py", "edge_agent/native/")
READERS = [p for p in MODULES if p.startswith(("edge_agent/", "coordinator/")) and not p.startswith(WRITERS)]
# Law 3. What these compute must have the same bits everywhere.
EXACT = [
    f"edge_agent/{name}.py" for name in ("curvature", "directions", "grid", "noise", "optimizer", "replay")
]
# Law 5. The state machines.
PURE = ["coordinator/rounds.py", "edge_agent/agent.py"]

WEIGHTS = {"weights", "curvature"}
INPLACE_METHODS = {"fill", "sort", "partition", "put", "itemset", "resize", "byteswap", "setfield"}
REDUCTIONS = {
    *("sum", "nansum", "fsum", "sumprod", "mean", "nanmean", "average", "median", "std", "var", "prod"),
    *("cumsum", "cumprod", "trace", "norm", "reduce", "reduceat", "accumulate", "convolve", "correlate"),
}
BLAS = {
    "dot",
    "vdot",
    "inner",
    "outer",
    "matmul",
    "einsum",
    "tensordot",
    "kron",
    "linalg",
    "vecdot",
    "matvec",
}
LIBM = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logaddexp", "pow", "power", "float_power"),
    *("sin", "cos", "tan", "sinh", "cosh", "tanh", "arctan", "arctan2", "atan", "atan2", "hypot", "cbrt"),
    *("erf", "erfc", "gamma", "lgamma", "fma"),
}
IO_MODULES = {
    *("asyncio", "http", "io", "logging", "multiprocessing", "os", "paho", "pathlib", "queue", "random"),
    *(
        "select",
        "shutil",
        "signal",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "tempfile",
        "threading",
        "time",
    ),
}


@functools.cache
def parsed(path: str) -> ast.Module:
    """Return the syntax tree of a module, named by its path from the root."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def dotted(path: str) -> str:
    """Return the import name of a module."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


NAMES = {dotted(path): path for path in MODULES}


@functools.cache
def imported(path: str) -> frozenset[str]:
    """Return the full names that a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def tops(path: str) -> set[str]:
    """Return the first parts of the names that a module imports."""
    return {name.partition(".")[0] for name in imported(path)}


def imported_at_load(path: str) -> set[str]:
    """Return the first parts of the names that a module imports outside of any function."""
    pending: list[ast.AST] = [parsed(path)]
    names = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return names


def own_modules(path: str) -> set[str]:
    """Return the paths of this project's modules that a module imports."""
    return {
        NAMES[name] for full in imported(path) for name in (full, full.rpartition(".")[0]) if name in NAMES
    }


def reachable(path: str) -> set[str]:
    """Return the modules that importing a module pulls in from this project, itself included."""
    found, pending = set(), [path]
    while pending:
        if (one := pending.pop()) not in found:
            found.add(one)
            pending += own_modules(one)
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield the last part of each called name, with the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr, node
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node


# ---------------------------------------------------------------------------------------------- floors


def test_the_house_is_found():
    """The checks below look at something: every floor holds modules."""
    assert {path.partition("/")[0] for path in MODULES} == set(FLOORS)
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_down(path):
    """A module imports its own floor or a lower one, never a higher one."""
    floor = FLOORS.index(path.partition("/")[0])

    assert not tops(path) & set(FLOORS[floor + 1 :])


@pytest.mark.parametrize("path", MODULES)
def test_imports_go_round_in_no_circle(path):
    """No module reaches itself through what it imports."""
    assert all(path not in reachable(other) for other in own_modules(path) - {path})


@pytest.mark.parametrize("path", BOARD)
def test_a_board_needs_only_the_base_install(path):
    """What runs on a board imports the standard library and the four base dependencies."""
    allowed = {*sys.stdlib_module_names, *FLOORS[:2], "numpy", "onnxruntime", "paho", "psutil"}
    if path in {f"profiles/{name}.py" for name in ("cost", "liveness", "rewrites", "sized")}:
        allowed |= {"onnx"}
        assert "onnx" not in imported_at_load(path)
    if path in ("edge_agent/enrol.py", "edge_agent/signature.py"):  # each a short-lived process
        allowed |= {"cryptography"}
        assert "cryptography" not in imported_at_load(path)
    if path == "edge_agent/agreement.py":  # for masked replies alone, by an extra
        allowed |= {"cryptography"}
        assert "cryptography" not in imported_at_load(path)
    if path.startswith("edge_agent/torch_"):
        allowed |= {"torch", "onnx"}

    assert tops(path) <= allowed


@pytest.mark.parametrize("path", [path for path in MODULES if path != "profiles/runtime.py"])
def test_onnxruntime_is_imported_where_it_is_kept_quiet(path):
    """No module but one imports ONNX Runtime: that one forbids it to report to its vendor."""
    assert "onnxruntime" not in tops(path)


@pytest.mark.parametrize("path", [path for path in MODULES if path.startswith("coordinator/")])
def test_torch_stays_in_pruning(path):
    """The coordinator asks pruning for a net and never touches torch itself."""
    assert "torch" not in tops(path)


def test_the_agent_process_is_light():
    """Importing the agent, and every module of its two floors, loads no torch, onnx or transformers."""
    names = [dotted(path) for path in BOARD if not path.startswith("edge_agent/torch_")]
    assert "edge_agent.__main__" in names
    script = f"import json, sys, {', '.join(names)}; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "onnxruntime" in loaded
    assert not loaded & {
        "torch",
        "onnx",
        "transformers",
        "matplotlib",
        "scipy",
        "rich",
        "cryptography",
        "pruning",
        "coordinator",
    }


# ------------------------------------------------------------------------------------------ laws 2 to 5


def weight_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Return the names that stand for a replica's arrays in a function, aliases included.

    An array that the function made itself is its own, whatever it is called.
    """
    bound = {leaf.id for leaf in ast.walk(function) if isinstance(leaf, ast.Name) and is_stored(leaf)}
    names = WEIGHTS - bound | WEIGHTS & {leaf.arg for leaf in ast.walk(function) if isinstance(leaf, ast.arg)}
    while True:
        found = {
            target.id
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and is_weights(node.value, names)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if found <= names:
            return names
        names |= found


def is_stored(name: ast.Name) -> bool:
    """Return whether a name is assigned to here."""
    return isinstance(name.ctx, ast.Store)


def is_weights(node: ast.AST, names: set[str]) -> bool:
    """Return whether an expression is a replica's array or a view of it."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Attribute):
        return node.attr in WEIGHTS
    if isinstance(node, ast.Subscript):
        return is_weights(node.value, names)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in {"view", "reshape", "ravel"} and is_weights(node.func.value, names)
    return False


def writes(tree: ast.AST) -> list[int]:
    """Return the lines that write into a replica's arrays: by index, in place, or as ``out``."""
    lines = []
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        names = weight_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                touched = [t.value for t in node.targets if isinstance(t, ast.Subscript)]
            elif isinstance(node, ast.AugAssign):
                touched = [node.target]
            elif isinstance(node, ast.Call):
                touched = [keyword.value for keyword in node.keywords if keyword.arg == "out"]
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if name in INPLACE_METHODS and isinstance(node.func, ast.Attribute):
                    touched.append(node.func.value)
                elif name in {"copyto", "put", "place", "putmask", "put_along_axis"}:
                    touched += node.args[:1]
            else:
                continue
            lines += [node.lineno for target in touched if is_weights(target, names)]
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "w = replica.weights\n    w += 1",
        "replica.weights[3] = 0",
        "replica.weights -= step",
        "np.add(step, step, out=replica.weights[2:])",
        "view = replica.weights.view(np.uint32)\n    view[:] = 0",
        "weights.fill(0)",
        "np.copyto(replica.curvature, ones)",
        "weights += step",
    ],
)
def test_the_check_of_the_writer_sees(source):
    """Each known way of writing into an array is found by the check below."""
    assert writes(ast.parse(f"def f(replica, weights, step, ones):\n    {source}\n"))


def test_the_check_of_the_writer_lets_pass():
    """Filling an array that a function made itself, and reading, are no writing of weights."""
    body = ["weights = np.empty(9)", "weights[:] = 1", "x = replica.weights + 1", "x += 1"]

    assert writes(ast.parse("\n    ".join(["def f(replica):", *body]))) == []


@pytest.mark.parametrize("path", READERS)
def test_only_replay_writes_weights(path):
    """Law 2: outside of replay and the kernels that it calls nothing writes into weights or curvature."""
    assert writes(parsed(path)) == []


def test_the_writers_exist():
    """The exception above is for modules that are there, and replay does write."""
    assert {"edge_agent/replay.py", "edge_agent/grid.py"} <= set(MODULES)
    assert writes(parsed("edge_agent/replay.py"))


@pytest.mark.parametrize("path", [path for path in EXACT if path in MODULES])
def test_replay_is_elementwise(path):
    """Law 3: no reduction, no BLAS, no libm where replicas must agree bit for bit.

    The built-in ``sum`` is refused too: since Python 3.12 it compensates, so its bits depend on the version.
    ``**`` is allowed for powers of two, which are exact.
    """
    tree = parsed(path)

    called = {name for name, _ in calls(tree)}
    assert not called & (REDUCTIONS | BLAS | LIBM)
    assert not {name.rpartition(".")[2] for name in imported(path)} & (REDUCTIONS | BLAS | LIBM)
    operators = [node for node in ast.walk(tree) if isinstance(node, (ast.BinOp, ast.AugAssign))]
    assert operators
    assert not [node.lineno for node in operators if isinstance(node.op, ast.MatMult)]
    powers = [node for node in operators if isinstance(node.op, ast.Pow)]
    assert not [
        node.lineno
        for node in powers
        if not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant) and node.left.value == 2)
    ]


def test_the_exact_modules_exist():
    """The check above looks at the modules that replay is made of."""
    assert {f"edge_agent/{name}.py" for name in ("grid", "noise", "replay")} <= set(EXACT) & set(MODULES)


@pytest.mark.parametrize("path", BOARD)
def test_noise_is_named_not_drawn(path):
    """Law 4: no generator with a state anywhere on a board; at the rim a client id may come by chance."""
    rim = {"edge_agent/link.py", "edge_agent/state.py", "edge_agent/__main__.py"}

    assert not tops(path) & ({"random"} if path in rim else {"random", "secrets", "uuid"})
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and node.attr in {"random", "default_rng", "RandomState"}:
            pytest.fail(f"{path}:{node.lineno} draws from numpy.random")
    assert not {name for name in imported(path) if name.startswith("numpy.random")}


@pytest.mark.parametrize("path", PURE)
def test_the_middle_is_pure(path):
    """Law 5: the state machines do no I/O, keep no thread and read no clock."""
    assert path in MODULES
    assert not tops(path) & IO_MODULES
    assert not {name for name, _ in calls(parsed(path))} & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize("path", PURE)
def test_nothing_below_the_middle_has_a_socket(path):
    """Law 5: not even through another module does a state machine reach a socket, a thread or a clock."""
    rim = {"asyncio", "paho", "select", "socket", "sqlite3", "ssl", "subprocess", "threading", "time"}

    assert {other: tops(other) & rim for other in reachable(path) if tops(other) & rim} == {}


# --------------------------------------------------------------------------------------------- manners


@pytest.mark.parametrize("path", MODULES)
def test_a_module_says_what_it_is(path):
    """A module begins with a docstring; a package's ``__init__`` of the four floors holds nothing else."""
    tree = parsed(path)

    assert ast.get_docstring(tree)
    if path in {f"{floor}/__init__.py" for floor in FLOORS}:
        assert len(tree.body) == 1


def public_names(tree: ast.Module) -> set[str]:
    """Return the names that a module defines at its top level without a leading underscore."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                leaf.id
                for target in targets
                for leaf in ast.walk(target)
                if isinstance(leaf, ast.Name) and is_stored(leaf)
            }
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("path", [path for path in MODULES if not path.endswith("__init__.py")])
def test_all_lists_the_public_names(path):
    """``__all__`` is what a module defines without an underscore, no more and no less, and in no disorder."""
    listed = [
        ast.literal_eval(node.value)
        for node in parsed(path).body
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]
    ]

    assert len(listed) == 1
    assert set(listed[0]) == public_names(parsed(path))
    assert len(listed[0]) == len(set(listed[0]))


@pytest.mark.parametrize("path", MODULES)
def test_a_module_is_read_in_one_sitting(path):
    """A module has at most 500 lines; split it by subject, not by size."""
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 500


TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS)
def test_a_test_makes_a_claim(path):
    """Each test says in its docstring, as a sentence, what it claims."""
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    assert tests

    silent = [
        test.name for test in tests if not (ast.get_docstring(test) or "").partition("\n")[0].endswith(".")
    ]
    assert silent == []


@pytest.mark.parametrize("path", TESTS)
def test_a_test_does_not_sleep(path):
    """No test hopes that things are done after a while: it looks, in a loop, for what it wants to see."""
    tree = parsed(path)
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    looking = {id(call) for loop in loops for name, call in calls(loop) if name == "sleep"}

    assert [call.lineno for name, call in calls(tree) if name == "sleep" and id(call) not in looking] == []


@pytest.mark.parametrize("path", MODULES)
def test_a_name_says_something(path):
    """No module is called after nothing in particular."""
    nothing = {
        "util",
        "utils",
        "helper",
        "helpers",
        "common",
        "manager",
        "types",
        "misc",
        "constants",
        "base",
    }

    assert not nothing & set(path.removesuffix(".py").split("/"))


def error_classes() -> list[type[profiles.errors.ScalarfedError]]:
    """Return every class of the error tree that :mod:`profiles.errors` defines."""
    found = [value for _, value in inspect.getmembers(profiles.errors, inspect.isclass)]
    return [value for value in found if issubclass(value, profiles.errors.ScalarfedError)]


def test_every_error_has_its_hint():
    """Each error class says its own next step, as sentences, and exits with its own code."""
    classes = error_classes()
    assert len(classes) > 10

    hints = [vars(error)["hint"] for error in classes]
    codes = [vars(error)["exit_code"] for error in classes]
    assert len(set(hints)) == len(hints)
    assert all(
        len(hint) > 20 and hint[0] in "`ABCDEFGHIJKLMNOPQRSTUVWXYZ" and hint.endswith(".") for hint in hints
    )
    assert len(set(codes)) == len(codes)
    assert all(2 <= code <= 125 for code in codes)


def test_every_error_is_in_the_one_tree():
    """What a user can cause is raised from :mod:`profiles.errors` alone, and each class there is used.

    Elsewhere a module may name a kind of ``ValueError`` for itself.
    """
    names = {error.__name__ for error in error_classes()}
    used = set()
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and path != "profiles/errors.py":
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                assert not {base for base in bases if base.endswith(("Error", "Exception"))} - {
                    "ValueError"
                }, path
        if path != "profiles/errors.py":
            used |= {name.rpartition(".")[2] for name in imported(path)} & names

    assert used == names
