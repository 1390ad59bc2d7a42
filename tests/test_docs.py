"""What the docs say is so: links lead somewhere, commands exist, the file tree is the real one."""

import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import coordinator.cli
from edge_agent import wire

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = {"sh", "bash", "console", "powershell"}
OTHER_COMMANDS = {
    *(
        "apt",
        "brew",
        "cd",
        "git",
        "mkdir",
        "mosquitto",
        "mosquitto_sub",
        "pip",
        "python",
        "python3",
        "scp",
        "ssh",
        "sudo",
        "systemctl",
    ),
}


@functools.cache
def text(page: str) -> str:
    """Return a page."""
    return (ROOT / page).read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------- links


def prose(page: str) -> str:
    """Return a page without what stands in code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text(page)))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings, made as the code hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number = 0
        while (name := slug if number == 0 else f"{slug}-{number}") in found:
            number += 1
        found.add(name)
    return found


def links(page: str) -> list[str]:
    """Return what the links and pictures of a page point at."""
    inline = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(page))
    return [*inline, *re.findall(r"<img[^>]* src=\"([^\"]+)\"", prose(page))]


def test_pages_and_links_are_found():
    """The checks below look at something."""
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/glossary.md", "docs/log.md"} <= set(PAGES)
    assert sum(len(links(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Every link within the project names a file that is there, and a heading that is in it."""
    broken = []
    for link in links(page):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        inside = path.exists() and path.resolve().is_relative_to(ROOT)
        if not inside or (anchor and anchor not in anchors(path.resolve().relative_to(ROOT).as_posix())):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_a_page_is_reached_from_the_readme(page):
    """From README.md, link by link, a reader comes to every page."""
    reached, pending = set(), ["README.md"]
    while pending:
        here = pending.pop()
        if here in reached:
            continue
        reached.add(here)
        for link in links(here):
            path = ((ROOT / here).parent / link.partition("#")[0]).resolve()
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix() in PAGES:
                pending.append(path.relative_to(ROOT).as_posix())

    assert page in reached


# -------------------------------------------------------------------------------------------- commands


@functools.cache
def command_tree() -> Any:
    """Return the command line of ``scalarfed`` as an object with ``commands`` and ``params``."""
    apps = [value for value in vars(coordinator.cli).values() if isinstance(value, typer.Typer)]
    assert apps, "coordinator.cli has no typer app"
    return typer.main.get_command(apps[0])


def leaves(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Return every command that does something, by its words."""
    below = getattr(command, "commands", {})
    found = {} if below and not getattr(command, "invoke_without_command", False) else {path: command}
    for name, inner in below.items():
        if not inner.hidden:
            found |= leaves(inner, (*path, name))
    return found


def leaf_names() -> list[str]:
    """Return the words of every command, for the names of tests."""
    return [" ".join(path) for path in leaves(command_tree()) if path]


def test_commands_are_found():
    """The checks below look at something, the main job among it."""
    assert {"testbed run", "replay", "report", "log show", "log verify"} <= set(leaf_names())


@pytest.mark.parametrize("name", leaf_names())
def test_a_command_has_help(name):
    """Each command, and each of its options, says in a sentence what it does."""
    command = leaves(command_tree())[tuple(name.split())]

    assert len(command.help or "") > 10
    unexplained = [
        param.name
        for param in command.params
        if param.param_type_name == "option" and not getattr(param, "help", "")
    ]
    assert unexplained == []


@pytest.mark.parametrize("name", leaf_names())
def test_a_command_stands_in_the_docs(name):
    """Each command is named in README.md or a page below docs/, the lab notebook not counted."""
    said = [text(page) for page in PAGES if page not in ("docs/log.md", "CHANGELOG.md")]

    assert any(re.search(rf"scalarfed {re.escape(name)}\b", page) for page in said)


def shell_lines(page: str) -> list[str]:
    """Return the commands of a page: lines of its shell blocks, and code spans that begin like one."""
    found = []
    for language, block in FENCE.findall(text(page)):
        if language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    found.append(line.strip().removeprefix("$ ").removeprefix(".venv/bin/"))
    spans = re.findall(r"`((?:scalarfed|scalarfed-agent|make) [^`\n]+)`", FENCE.sub("", text(page)))
    return found + spans


def words(line: str) -> list[str]:
    """Return the words of a shell line, without its comment and without what is piped further."""
    return shlex.split(line.partition(" | ")[0].replace("...", ""), comments=True)


def fault_of_scalarfed(given: list[str]) -> str:
    """Return what is wrong with a use of ``scalarfed``; empty if it could be run."""
    command = command_tree()
    rest = list(given)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    if getattr(command, "commands", {}) and rest and not rest[0].startswith("-"):
        return f"there is no command {rest[0]!r}"
    known = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for word in rest:
        if word.startswith("--") and word.partition("=")[0] not in known | {"--help", "--version"}:
            return f"there is no option {word!r}"
        if word.startswith(("examples/", "benchmarks/", "docs/")) and not (ROOT / word).exists():
            return f"there is no file {word!r}"
    return ""


@functools.cache
def agent_help() -> str:
    """Return what ``scalarfed-agent --help`` prints."""
    command = [sys.executable, "-m", "edge_agent", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_lines_are_found():
    """The check below looks at something: README's two commands, and uses of both programs."""
    lines = [line for page in PAGES for line in shell_lines(page)]

    assert {"make demo", "make test"} <= {" ".join(words(line)) for line in shell_lines("README.md")}
    assert sum(line.startswith("scalarfed ") for line in lines) > 5
    assert any(line.startswith("scalarfed-agent ") for line in lines)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_docs_exist(page):
    """What a page tells to type has the commands, targets, options and files that it names."""
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile") + text("native.mk"), re.MULTILINE))
    for line in shell_lines(page):
        first, *rest = words(line)
        if first == "make":
            assert {word for word in rest if "=" not in word and not word.startswith("-")} <= targets, line
        elif first == "scalarfed":
            assert not fault_of_scalarfed(rest), f"{line}: {fault_of_scalarfed(rest)}"
        elif first == "scalarfed-agent":
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert options <= set(re.findall(r"--[\w-]+", agent_help())), line
        else:
            assert first in OTHER_COMMANDS, f"{page}: {line!r} is checked by nobody"


def test_every_option_of_the_agent_is_explained():
    """The how-to page on fleets names each option of ``scalarfed-agent``."""
    options = set(re.findall(r"--[a-z][\w-]+", agent_help()))
    assert len(options) > 10

    assert options - set(re.findall(r"--[a-z][\w-]+", text("docs/howto/fleet-by-hand.md"))) == set()


# ------------------------------------------------------------------------------------------- the pages


def file_tree() -> dict[str, Any]:
    """Return the names of ``docs/file_tree.py``."""
    return runpy.run_path(str(ROOT / "docs" / "file_tree.py"))


def test_the_file_tree_is_the_real_one():
    """The tree in README.md is what `make tree` would write there now."""
    assert file_tree()["with_tree"](text("README.md")) == text("README.md")


def test_the_file_tree_names_every_module():
    """The tree holds as many Python files as the four floors do."""
    modules = [
        path
        for floor in ("profiles", "edge_agent", "pruning", "coordinator")
        for path in (ROOT / floor).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(modules) > 20

    assert len(re.findall(r"(?m)^ +\S+\.py\b(?= )", file_tree()["file_tree"]())) == len(modules)


def test_every_message_stands_in_the_wire_page():
    """Each message class of the wire, and the record, has its place in docs/wire.md."""
    messages = [
        name for name in wire.__all__ if name[0].isupper() and not name.isupper() and name != "Cohort"
    ]
    assert {"RoundOpen", "Reply", "RoundRecord"} <= set(messages)

    assert [name for name in messages if name not in text("docs/wire.md")] == []


def test_the_changelog_knows_this_version():
    """CHANGELOG.md has a section for the version in pyproject.toml, below the one for unreleased changes."""
    version = re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)
    assert version
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", text("CHANGELOG.md"), re.MULTILINE)

    assert sections[0] == "Unreleased"
    assert version[1] in sections


def test_the_notebook_is_dated():
    """Each entry of docs/log.md begins with its date, the newest first."""
    headings = re.findall(r"^## (.+)$", text("docs/log.md"), re.MULTILINE)
    dates = [heading[:10] for heading in headings]

    assert dates
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)
