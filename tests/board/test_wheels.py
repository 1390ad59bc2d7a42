"""A quick smoke of what a board gets, on an emulated processor alone: the wheels for Arm, and our kernel.

No board boots: qemu's user mode runs Python of the root file system that build.sh has unpacked.
"""

import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from coordinator.flash.payload import Target, fetch_wheels, own_wheel
from tests.made_run import make_replayable_run

pytestmark = [pytest.mark.board, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """\
import json, platform, sys
import numpy as np
import edge_agent.service
from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from edge_agent.native.kernel import kernel_name
from edge_agent.replay import apply_record
from edge_agent.wire import decode
bundle = read_bundle(__import__("pathlib").Path(sys.argv[1]) / "bundle")
replica = bundle.replica()
for line in open(sys.argv[1] + "/records"):
    (record,) = decode(bytes.fromhex(line)).records
    apply_record(replica, record)
x = np.arange(40, dtype=np.float32).reshape(10, 4) / 40
loss = Forward(bundle, replica.weights).loss(x, np.arange(10) % 3)
told = {"machine": platform.machine(), "kernel": kernel_name(), "loss": loss}
print(json.dumps(told | {"digest": f"{replica.digest():x}"}))
"""


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Return the command of a Python for Arm, and where it finds the wheels."""
    built = Path(os.environ.get("BOARD", ROOT / "build/board"))
    program = built / "qemu-aarch64"
    if not program.is_file() or not (built / "root.tar").is_file():
        pytest.skip("`make board-test` fetches the emulator first")
    root = tmp_path_factory.mktemp("root")
    paths = [
        "./usr/lib/python3*",
        "./usr/lib/aarch64-linux-gnu",
        "./usr/bin/python3*",
        "./usr/lib/ld-*",
        "./lib",
    ]
    command = ["tar", "-C", str(root), "-xf", str(built / "root.tar"), "--wildcards", *paths]
    subprocess.run(command, check=True)
    site = tmp_path_factory.mktemp("site")
    wheels = fetch_wheels(Target("3.13"))
    name, own = own_wheel("aarch64")
    (site / name).write_bytes(own)
    for wheel in [*wheels, site / name]:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    env = {"QEMU_CPU": "cortex-a72", "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HOME": "/tmp"}
    return [str(program), "-L", str(root), str(root / "usr/bin/python3.13")], env


def test_the_wheels_for_arm_compute_what_this_machine_computes(arm, tmp_path):
    """The wheels for cp313 import; replay ends in the same digest, a loss agrees to 1e-6."""
    from coordinator.scalar_log import ScalarLog
    from edge_agent.wire import Slice, encode

    make_replayable_run(tmp_path, rounds=5)
    with ScalarLog.open(tmp_path / "log.sqlite") as log:
        rows = [encode(Slice(1, n, (record,))).hex() for n, record in enumerate(log.records())]
    assert len(rows) == 5
    (tmp_path / "records").write_text("\n".join(rows))
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [str(tmp_path / "script.py"), str(tmp_path)]
    command, env = arm
    told = []
    for python, extra in ((command, env), ([sys.executable], {"PYTHONPATH": str(ROOT)})):
        done = subprocess.run(
            [*python, *words], capture_output=True, text=True, env=os.environ | extra, check=False
        )
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1]))
    there, here = told
    print(f"\n[board] {there}")

    assert (there["machine"], here["machine"]) == ("aarch64", platform.machine())
    assert there["digest"] == here["digest"]
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-6)
