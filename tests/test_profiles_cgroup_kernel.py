"""The cgroup rungs on a real kernel: a user-mode Linux that runs on this machine's own files, read-only.

Needs the program ``linux.uml`` (Debian: ``apt install user-mode-linux``).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UML = shutil.which("linux.uml")
GUEST = """
import sys
import numpy as np, psutil, paho.mqtt.client
from profiles.limit import enforce
from profiles.memory import cgroup_memory, current_rss_mib

budget = current_rss_mib() + 40 if sys.argv[1] == "own" else 90
limit = enforce(budget, rungs=("cgroup",))
limit.stop()  # the kernel alone
print("RUNG", limit.rung, round(limit.limit_mib), cgroup_memory().folder.name, flush=True)
kept = [np.ones(20 * 2**20, np.uint8)]
print("WITHIN", cgroup_memory().current_mib > 20, flush=True)
kept.append(np.ones(100 * 2**20, np.uint8))
print("NOT ENFORCED", flush=True)
"""
INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t cgroup2 cg /sys/fs/cgroup; mount -t tmpfs run /run
cd /sys/fs/cgroup
echo +memory > cgroup.subtree_control; mkdir user.slice; echo +memory > user.slice/cgroup.subtree_control
mkdir user.slice/own.scope user.slice/preset.scope; echo 94371840 > user.slice/preset.scope/memory.max
export PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1 HOME=/run
for case in own preset own; do
  echo "CASE $case"
  sh -c "echo \\$\\$ > user.slice/$case.scope/cgroup.procs; exec {python} {guest} $case"
  echo "EXIT $?"
done
echo "LEFT $(ls -d user.slice/*/ | wc -l)"
exec halt -f -p
"""


@pytest.fixture(scope="module")
def guest_log(tmp_path_factory) -> list[str]:
    """Boot the guest once and return the lines that its processes printed."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.py").write_text(GUEST)
    init = folder / "init"
    init.write_text(
        INIT.format(path=Path(__file__).parents[1], python=sys.executable, guest=folder / "guest.py")
    )
    init.chmod(0o755)
    words = [UML, "rootfstype=hostfs", "rootflags=/", "ro", "mem=700M", "panic=-1", f"init={init}"]
    words += ["con=null", "con0=null,fd:1", "con1=null"]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )
    return re.findall(r"^(?:CASE|RUNG|WITHIN|EXIT|LEFT|NOT) ?.*", done.stdout.replace("\r", ""), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(UML is None, reason="linux.uml is not installed")
def test_the_kernel_kills_what_exceeds_its_cgroup(guest_log):
    """A cgroup of its own, and one set from outside: 20 MiB are fine, 120 are not; leftovers are removed."""
    own, preset, again = guest_log[:4], guest_log[4:8], guest_log[8:12]

    for lines in (own, again):
        assert re.fullmatch(r"RUNG cgroup v2 root 40 scalarfed-agent-\d+", lines[1])
    assert preset[1] == "RUNG cgroup v2 root 90 preset.scope"
    for lines in (own, preset, again):
        assert lines[2:] == ["WITHIN True", "EXIT 137"]
    assert guest_log[12] == "LEFT 3"
