"""Writes the file tree of README.md: each module with the first line of its docstring.

Run it by ``make tree``; a test compares what it would write with what stands there.
"""

import ast
from pathlib import Path

__all__ = ["file_tree", "main", "with_tree"]

_ROOT = Path(__file__).resolve().parent.parent
_FLOORS = ("coordinator", "pruning", "edge_agent", "profiles")  # highest first, as in the README's drawing
_BESIDE = {
    "tests/": "one claim each",
    "benchmarks/": "ratios against a peer or a limit, measured in one run",
    "examples/": "experiments to start from, and their data",
    "docs/": "architecture, wire format, methods, how-to pages, the lab notebook",
    "Makefile": "`make help` lists what it does",
    "native.mk": "its part for the compiled kernel and wheels for boards",
    "setup.py": "compiles the kernel on install, where there is a compiler",
    "constraints.txt": "the exact versions that `make` installs",
}
_BEGIN, _END = "<!-- tree: written by `make tree` -->\n```text\n", "```\n<!-- end of tree -->\n"


def file_tree() -> str:
    """Return the tree: the four floors with all their modules, then what stands beside them."""
    rows: list[tuple[str, str]] = []
    for floor in _FLOORS:
        rows += [*_rows(_ROOT / floor, 0), ("", "")]
    rows += [(name, text) for name, text in _BESIDE.items() if (_ROOT / name).exists()]
    width = max(len(name) for name, _ in rows) + 2
    return "".join(f"{name:{width}}{text}".rstrip() + "\n" for name, text in rows)


def with_tree(readme: str) -> str:
    """Return the README with its tree written anew.

    Raises:
        ValueError: The marks around the tree are not there.
    """
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"the file tree must stand between {_BEGIN!r} and {_END!r}")
    return before + begin + file_tree() + end + after


def _rows(folder: Path, depth: int) -> list[tuple[str, str]]:
    indent = "  " * depth
    rows = [(f"{indent}{folder.name}/", _first_line(folder / "__init__.py") or _contents(folder))]
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__" and any(path.iterdir()):
            rows += _rows(path, depth + 1)
        elif path.suffix in (".py", ".c", ".h") and path.name != "__init__.py":
            rows.append((f"{indent}  {path.name}", _first_line(path)))
    return rows


def _first_line(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
        return text.partition("\n")[0].replace("``", "`")
    first = text.lstrip().partition("\n")[0]
    return first.removeprefix("/*").removesuffix("*/").strip() if first.startswith("/*") else ""


def _contents(folder: Path) -> str:
    """Return what a folder without modules holds, such as "21 x .toml"."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    kinds = sorted(path.suffix for path in files if path.suffix not in (".pyc", ".so"))
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def main() -> None:
    """Rewrite README.md in place."""
    readme = _ROOT / "README.md"
    readme.write_text(with_tree(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
