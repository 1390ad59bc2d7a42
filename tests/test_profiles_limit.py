"""Memory budgets bind: real processes that exceed theirs are stopped, and others are left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cgroup_tree import V2_MOUNT, fake_root

from profiles.limit import EXIT_OVER_BUDGET, scope_command

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
AGENT_IMPORTS = "import numpy as np, onnxruntime, paho.mqtt.client, psutil\n"


def limited(more: float, *rungs: str) -> str:
    """Return the beginning of a script that imports what an agent does, then limits itself to ``more``.

    Tests name the rungs that they are about: where a cgroup can be had, the kernel would kill instead.
    """
    return AGENT_IMPORTS + (
        "from profiles.limit import enforce\nfrom profiles.memory import *\n"
        f"held = current_rss_mib(); limit = enforce(held + {more}, rungs={rungs})\n"
    )


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process, which has to end by itself."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )


@linux
def test_numpy_gets_a_memory_error_above_the_budget():
    """With RLIMIT_DATA, asking for more than the rest of the budget raises; the process lives on."""
    done = run(
        limited(40, "rlimit") + "try: np.ones(80 * 2**20, np.uint8)\n"
        "except MemoryError: print(limit.rung, 'refused')\n"
    )
    assert done.stdout == "RLIMIT_DATA refused\n"
    assert done.returncode == 0


@linux
def test_many_small_requests_add_up():
    """A leak of 1 MiB at a time is stopped when its sum exceeds the budget and the spare stacks."""
    done = run(
        limited(40, "rlimit") + "limit.stop(); kept = []\n"
        "try:\n    while len(kept) < 400: kept.append(np.ones(2**20, np.uint8))\n"
        "except MemoryError: print(len(kept))\n"
    )
    assert 38 <= int(done.stdout) <= 40 + 4 * 8 + 2


@linux
@pytest.mark.parametrize("threads", [1, 4])
def test_a_process_within_its_budget_is_left_alone(threads):
    """Onnxruntime and numpy at 24 MiB below the limit, with threads of their own, run to the end."""
    done = run(
        limited(64, "rlimit") + "import threading\n"
        f"gate = threading.Barrier({threads} + 1)\n"
        "def work():\n    a = np.ones(2**20, np.float32); gate.wait(); a += 1; gate.wait()\n"
        f"crew = [threading.Thread(target=work) for _ in range({threads})]\n"
        "for one in crew: one.start()\n"
        "gate.wait(); gate.wait(); a = np.ones((1024, 1024), np.float32); (a @ a).sum()\n"
        "for one in crew: one.join()\n"
        "for _ in range(20): np.ones(24 * 2**20, np.uint8)\n"
        "print('done', current_rss_mib() - held < 64)\n"
    )
    assert done.stdout == "done True\n", done.stderr
    assert done.returncode == 0


def test_the_sampler_ends_a_process_with_a_last_line():
    """Above the budget the process ends by itself, with its own exit code, and says why on its last line."""
    done = run(
        limited(40) + "print(limit.rung, flush=True)\n"
        "kept = np.ones(80 * 2**20, np.uint8)\nimport threading; threading.Event().wait(60)\nprint('alive')\n"
    )
    assert done.returncode == EXIT_OVER_BUDGET
    assert done.stdout == "sampler\n"
    last = done.stderr.splitlines()[-1]
    assert last.startswith("scalarfed: ended by its own memory limit:")
    assert "the budget allows" in last


def test_the_sampler_leaves_a_process_below_its_budget_alone():
    """20 MiB below a budget of 40 more, twenty samples long."""
    done = run(
        limited(40) + "kept = np.ones(20 * 2**20, np.uint8)\n"
        "import time\nend = time.monotonic() + 1\n"
        "while time.monotonic() < end: kept += 1\nprint('alive')\n"
    )
    assert done.stdout == "alive\n", done.stderr


def test_a_stopped_sampler_ends_nobody():
    """After stop() the process may hold what the kernel allows."""
    done = run(
        limited(10) + "limit.stop(); kept = np.ones(40 * 2**20, np.uint8)\n"
        "import time\nend = time.monotonic() + 0.5\n"
        "while time.monotonic() < end: kept += 1\nprint('alive')\n"
    )
    assert done.stdout == "alive\n", done.stderr


def test_a_budget_below_the_imports_is_refused():
    """Nothing starts that could not even hold its libraries; the message has both numbers."""
    done = run(
        AGENT_IMPORTS + "from profiles.limit import enforce\nfrom profiles.errors import BudgetError\n"
        "try: enforce(20)\nexcept BudgetError as error: print(error, error.hint)\n"
    )
    assert "imports alone hold" in done.stdout
    assert "allows 20 MiB" in done.stdout


@linux
def test_the_first_report_names_rung_and_numbers():
    """Enforcement.detail can be printed as it is."""
    done = run(limited(40, "rlimit") + "print(limit.detail)\n")

    assert " MiB by RLIMIT_DATA (" in done.stdout
    assert "32 of it for stacks) and a sampler every 50 ms" in done.stdout


def enforced_in(root: Path, budget: float, *, before: str = "") -> list[str]:
    """Return rung, limit and pid of a real process that is limited where the file tree lies."""
    script = AGENT_IMPORTS + (
        "import os\nfrom pathlib import Path\nfrom profiles.limit import enforce\n"
        f"root = Path({str(root)!r})\n{before}\n"
        f"limit = enforce({budget}, rungs=('cgroup',), root=root)\n"
        "print(limit.rung, limit.limit_mib, os.getpid(), sep='|')"
    )
    return run(script).stdout.strip().split("|")


@linux
@pytest.mark.parametrize(
    ("folder", "rung"),
    [
        ("user.slice/user@7.service/run.scope", "cgroup v2 delegated"),
        ("system.slice/a.service", "cgroup v2 root"),
    ],
)
def test_a_limit_set_from_outside_is_recognised(folder, rung, tmp_path):
    """A scope or a unit with MemoryMax at the budget is the rung."""
    account = {"memory.current": "1048576", "memory.max": str(200 * 2**20)}
    root = fake_root(
        tmp_path, membership=f"0::/{folder}\n", mount=V2_MOUNT, files={f"sys/fs/cgroup/{folder}": account}
    )
    assert enforced_in(root, 200)[:2] == [rung, "200.0"]


@linux
@pytest.mark.parametrize("outside", ["max", str(500 * 2**20)])
def test_its_own_cgroup_gets_the_rest_of_the_budget(outside, tmp_path):
    """Without a tight limit from outside it makes a cgroup beside its own, for what is still to come."""
    files = {"sys/fs/cgroup/app.slice/term.scope": {"memory.current": "1048576", "memory.max": outside}}
    root = fake_root(tmp_path, membership="0::/app.slice/term.scope\n", mount=V2_MOUNT, files=files)
    left_over = tmp_path / "sys/fs/cgroup/app.slice/scalarfed-agent-1"
    left_over.mkdir()
    rung, allowed, pid = enforced_in(root, 200)
    leaf = tmp_path / f"sys/fs/cgroup/app.slice/scalarfed-agent-{pid}"

    assert rung == ("cgroup v2 delegated" if os.geteuid() else "cgroup v2 root")
    assert 100 < float(allowed) < 180  # 200 less the imports
    assert int((leaf / "memory.max").read_text()) == int(float(allowed) * 2**20)
    assert (leaf / "memory.swap.max").read_text() == "0"
    assert (leaf / "cgroup.procs").read_text() == pid
    assert not left_over.exists()


@linux
def test_where_no_cgroup_can_be_made_no_rung_is_claimed(tmp_path):
    """If its folder cannot be made, the process stays where it was, and says so."""
    files = {"sys/fs/cgroup/a/b": {"memory.current": "1048576", "memory.max": "max"}}
    root = fake_root(tmp_path, membership="0::/a/b\n", mount=V2_MOUNT, files=files)
    before = "os.makedirs(root / f'sys/fs/cgroup/a/scalarfed-agent-{os.getpid()}/x')"

    assert enforced_in(root, 200, before=before)[:2] == ["sampler", "None"]


@linux
def test_a_scope_is_offered_only_where_systemd_can_limit_memory(tmp_path, monkeypatch):
    """With the user's manager and its memory controller: the words; without either: none."""
    user = os.geteuid()
    slices = f"sys/fs/cgroup/user.slice/user-{user}.slice/user@{user}.service" if user else "sys/fs/cgroup"
    manager = tmp_path / (f"run/user/{user}/systemd/private" if user else "run/systemd/private")
    program = tmp_path / "bin" / "systemd-run"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    (tmp_path / slices).mkdir(parents=True)
    controllers = tmp_path / slices / "cgroup.controllers"
    controllers.write_text("cpu pids\n")
    manager.parent.mkdir(parents=True)
    manager.touch()
    assert scope_command(64, root=tmp_path) == []

    controllers.write_text("cpu memory pids\n")
    words = scope_command(64, root=tmp_path)
    assert words[0] == "systemd-run"
    assert f"MemoryMax={64 * 2**20}" in words
    assert words[-1] == "--"
    assert ("--user" in words) == (user != 0)

    manager.unlink()
    assert scope_command(64, root=tmp_path) == []
