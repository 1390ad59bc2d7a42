"""What a process uses is measured rightly, against the kernel's other accounts and recorded file trees."""

import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
from cgroup_tree import V2_MOUNT, fake_root

from profiles.memory import (
    cgroup_memory,
    current_rss_mib,
    data_mib,
    memory_use,
    peak_rss_mib,
    pss_mib,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's files are Linux's")


def child(script: str) -> str:
    """Run a script in a fresh process and return what it printed."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_resident_set_is_the_one_that_psutil_sees():
    """Within 1 MiB, here and for another process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        for pid in (None, other.pid):
            seen = psutil.Process(pid).memory_info().rss / 2**20
            assert current_rss_mib(pid) == pytest.approx(seen, abs=1)
        other.communicate(b"\n")


def test_the_peak_keeps_what_was_given_back():
    """200 MiB that were touched and freed are in the peak and no longer in the resident set."""
    script = (
        "import numpy as np; from profiles.memory import *\n"
        "before = current_rss_mib(); np.ones(200 * 2**20, np.uint8); after = current_rss_mib()\n"
        "print(after - before, peak_rss_mib() - before)"
    )
    kept, peak = map(float, child(script).split())

    assert kept < 10
    assert peak == pytest.approx(200, abs=10)


@linux
def test_a_childs_peak_does_not_start_at_its_parents():
    """The trap of ru_maxrss: a small child of a large process reports its own peak."""
    held = np.ones(300 * 2**20, np.uint8)
    peak = float(child("from profiles.memory import peak_rss_mib; print(peak_rss_mib())"))

    assert held[-1] == 1
    assert peak < 100


@linux
def test_shared_pages_are_shared_out():
    """Forked processes that all see 64 MiB each count a part of it in PSS, and all of it in RSS."""
    script = (
        "import os; from profiles.memory import *; block = b'x' * (64 * 2**20)\n"
        "gates = [os.pipe() for _ in range(2)]; pids = []\n"
        "ready, done = gates\n"
        "for _ in range(3):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os.close(done[1]); os.write(ready[1], b'.'); os.read(done[0], 1); os._exit(0)\n"
        "    pids.append(pid)\n"
        "for _ in pids: os.read(ready[0], 1)\n"
        "print(current_rss_mib() > 64, pss_mib() < 32, pss_mib(pids[0]) < 32)\n"
        "os.close(done[1])\n"
        "for pid in pids: os.waitpid(pid, 0)"
    )
    assert child(script) == "True True True"


@linux
def test_data_counts_what_was_asked_for():
    """100 MiB that nobody has touched are in VmData and not in the resident set."""
    before, resident = data_mib(), current_rss_mib()
    untouched = np.empty(100 * 2**20, np.uint8)

    assert data_mib() - before == pytest.approx(100, abs=2)
    assert current_rss_mib() - resident < 5
    assert untouched.size == 100 * 2**20


def test_a_process_that_is_gone_is_said_so():
    """Every figure of a finished process raises ProcessLookupError, not a number."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    figures = [current_rss_mib, peak_rss_mib, memory_use]
    if sys.platform == "linux":
        figures += [pss_mib, data_mib]

    for figure in figures:
        with pytest.raises(ProcessLookupError, match=str(gone.pid)):
            figure(gone.pid)


def test_all_figures_at_once_are_in_order():
    """PSS <= RSS <= peak."""
    use = memory_use()

    assert (use.pss_mib or 0) <= use.rss_mib + 1
    assert use.rss_mib <= use.peak_rss_mib + 1
    assert use.rss_mib == pytest.approx(current_rss_mib(), abs=5)


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path):
    """The scope says 600 MiB, its slice 512: the process has 512."""
    root = fake_root(
        tmp_path,
        membership="0::/user.slice/run-1.scope\n",
        mount=V2_MOUNT,
        files={
            "sys/fs/cgroup/user.slice": {"memory.max": str(512 * 2**20)},
            "sys/fs/cgroup/user.slice/run-1.scope": {
                "memory.current": str(60 * 2**20),
                "memory.peak": str(70 * 2**20),
                "memory.max": str(600 * 2**20),
            },
        },
    )
    account = cgroup_memory(root=root)

    assert (account.version, account.current_mib, account.peak_mib, account.limit_mib) == (2, 60, 70, 512)


def test_an_old_kernel_without_memory_peak_says_none(tmp_path):
    """JetPack's kernels keep no memory.peak."""
    files = {"sys/fs/cgroup/a": {"memory.current": "1048576", "memory.max": "max"}}
    account = cgroup_memory(root=fake_root(tmp_path, membership="0::/a\n", mount=V2_MOUNT, files=files))

    assert account.peak_mib is None
    assert account.limit_mib is None


def test_cgroup_v1_is_read_where_it_holds_the_memory(tmp_path):
    """With both hierarchies mounted, the one that accounts for memory counts; 2**63 is no limit."""
    root = fake_root(
        tmp_path,
        membership="4:memory:/job\n1:name=systemd:/\n0::/\n",
        mount="31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" + V2_MOUNT,
        files={
            "sys/fs/cgroup/memory/job": {
                "memory.usage_in_bytes": str(5 * 2**20),
                "memory.max_usage_in_bytes": str(9 * 2**20),
                "memory.limit_in_bytes": "9223372036854771712",
            }
        },
    )
    account = cgroup_memory(root=root)

    assert (account.version, account.current_mib, account.peak_mib, account.limit_mib) == (1, 5, 9, None)


def test_in_a_container_the_mounts_own_top_is_ours(tmp_path):
    """A membership above what is mounted is read at the mount point."""
    root = fake_root(
        tmp_path,
        membership="0::/../../system.slice\n",
        mount="30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup2 rw",
        files={"sys/fs/cgroup": {"memory.current": "2097152", "memory.max": "4194304"}},
    )
    account = cgroup_memory(root=root)

    assert (account.current_mib, account.limit_mib) == (2, 4)


def test_a_memory_cgroup_that_is_off_says_none(tmp_path):
    """Raspberry Pi OS as it comes: cgroup v2 is mounted, the memory controller is not."""
    files = {"sys/fs/cgroup/a": {"cgroup.procs": ""}}
    root = fake_root(tmp_path, membership="0::/a\n", mount=V2_MOUNT, files=files)

    assert cgroup_memory(root=root) is None
    assert cgroup_memory(root=tmp_path / "no-proc-at-all") is None


@linux
@pytest.mark.skipif(cgroup_memory() is None, reason="this machine's kernel keeps no account")
def test_the_real_cgroup_counts_at_least_this_process():
    """What is charged covers the anonymous memory that this process has just touched."""
    held = np.ones(64 * 2**20, np.uint8)

    assert cgroup_memory(os.getpid()).current_mib > 64
    assert held[-1] == 1
