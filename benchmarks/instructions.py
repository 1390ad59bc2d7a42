"""Instructions of a forward on an emulated aarch64: weights as inputs against weights as constants.

    make board-test                                  # or: sh tests/board/build.sh build/board
    python -m benchmarks.instructions build/board --out benchmarks/results/bench-aarch64.json

Boots the emulated board's kernel with qemu's ``-icount shift=0``: its clock then advances a nanosecond with
every instruction, so that a time measured in the guest is a number of instructions. The plain graph runs,
without the compiled kernel's operators. Needs qemu-system-aarch64, mtools and cpio, and takes five minutes.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_CASES = (("lenet", (1, 28, 28), 32), ("resnet20", (3, 32, 32), 8), ("resnet20", (3, 32, 32), 32))
_FAT = "@@8M"  # where build.sh puts the boot partition
_BOOT = "/boot/firmware"
_RUN = f"""\
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /root/site /root/here
for wheel in {_BOOT}/wheels/*.whl; do python3 -m zipfile -e $wheel /root/site; done
tar -xf {_BOOT}/here.tar -C /root/here
cd /root/here && PYTHONPATH=/root/site:/root/here python3 benchmarks/instructions.py --guest
"""
_INIT = (
    f"mount -t proc p /proc; mount -t sysfs s /sys; mount -t tmpfs t /tmp; mount /dev/vda1 {_BOOT}; "
    f"sh {_BOOT}/run.sh; echo o > /proc/sysrq-trigger; sleep 20"
)


def measure() -> None:
    """Print a line of JSON for each case; runs in the guest."""
    import numpy as np

    from edge_agent.bundle import read_bundle
    from edge_agent.forward import Forward
    from edge_agent.session import open_session

    for model, shape, batch_size in _CASES:
        bundle = read_bundle(Path(model))
        forward = Forward(bundle, bundle.replica().weights)
        session = open_session(Path(f"{model}-constant.onnx"))
        rng = np.random.default_rng(1)
        x = rng.normal(size=(batch_size, *shape)).astype(np.float32)
        y = rng.integers(0, bundle.classes, batch_size)
        passes = {
            "own": lambda: forward.loss(x, y),  # noqa: B023 (called within the turn)
            "constant": lambda: session.run(["loss"], {"x": x, "y": y}),  # noqa: B023
        }
        counts: dict[str, list[int]] = {name: [] for name in passes}
        for turn in range(7):
            for name, run in passes.items():
                begun = time.perf_counter_ns()
                run()
                if turn >= 2:
                    counts[name].append(time.perf_counter_ns() - begun)
        own, constant = (float(np.median(counts[name])) for name in passes)
        found = {"model": model, "batch_size": batch_size, "variant": forward.variant}
        found |= {"own_millions": round(own / 1e6, 3), "constant_millions": round(constant / 1e6, 3)}
        print("RESULT " + json.dumps({**found, "own_over_constant": round(own / constant, 4)}), flush=True)


def boot(board: Path, work: Path, *, limit_s: float) -> list[dict[str, Any]]:
    """Return what the guest measured.

    Args:
        board: The folder that ``tests/board/build.sh`` made.
        work: Gets a copy of the card.
        limit_s: The guest is ended then.
    """
    from coordinator.flash.payload import Target, fetch_wheels

    card = work / "card.img"
    subprocess.run(["cp", "--sparse=always", board / "card.img", card], check=True)
    (work / "run.sh").write_text(_RUN, encoding="ascii")
    _pack(work / "here.tar", work)
    environment = os.environ | {"MTOOLS_SKIP_CHECK": "1"}
    wheels = [path for path in fetch_wheels(Target("3.13")) if path.name.startswith(("numpy", "onnxruntime"))]
    drive = f"{card}{_FAT}"
    subprocess.run(["mmd", "-i", drive, "::wheels"], check=True, env=environment)
    subprocess.run(["mcopy", "-i", drive, *wheels, "::wheels/"], check=True, env=environment)
    files = [work / "run.sh", work / "here.tar"]
    subprocess.run(["mcopy", "-i", drive, *files, "::"], check=True, env=environment)
    words = "-M virt -cpu cortex-a72 -smp 1 -m 1024 -accel tcg,thread=single,tb-size=256 -no-reboot"
    words += (
        " -icount shift=0,sleep=off -net none -display none -monitor none -device virtio-blk-pci,drive=d0"
    )
    done = subprocess.run(
        [
            *("qemu-system-aarch64", *words.split(), "-serial", "stdio"),
            *("-drive", f"file={card},if=none,id=d0,format=raw,cache=unsafe"),
            *("-kernel", board / "vmlinuz", "-initrd", _initrd(board / "initrd.img", work)),
            *("-append", "console=ttyAMA0 root=LABEL=rootfs rootwait quiet"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    said = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    if len(said) < len(_CASES):
        sys.exit(
            f"the guest measured {len(said)} of {len(_CASES)} nets; its last words:\n{done.stdout[-2000:]}"
        )
    return [json.loads(line) for line in said]


def _pack(path: Path, work: Path) -> None:
    """Write the nets and the sources that the guest needs."""
    from pruning.peers import build_peer, constant_graph, write_peer

    with tarfile.open(path, "w") as tar:
        for model in sorted({model for model, _, _ in _CASES}):
            bundle = write_peer(build_peer(model), model, work / model)
            tar.add(bundle.folder, model)
            graph = constant_graph(bundle.folder)
            entry = tarfile.TarInfo(f"{model}-constant.onnx")
            entry.size = len(graph)
            tar.addfile(entry, io.BytesIO(graph))
        for name in ("edge_agent", "profiles"):
            for source in sorted((_ROOT / name).rglob("*.py")):
                tar.add(source, source.relative_to(_ROOT))
        tar.add(__file__, "benchmarks/instructions.py")


def _initrd(source: Path, work: Path) -> Path:
    """Return the board's initrd, but for what it starts."""
    folder = work / "initrd"
    folder.mkdir()
    with subprocess.Popen(["gzip", "-dc", source], stdout=subprocess.PIPE) as plain:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=plain.stdout, cwd=folder, check=True)
    init = folder / "init"
    text = init.read_text(encoding="ascii").replace("/root /sbin/init", f"/root /bin/bash -c '{_INIT}'")
    init.write_text(text, encoding="ascii")
    names = "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*"))
    made = work / "initrd.img"
    with made.open("wb") as file:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), stdout=file, cwd=folder, check=True
        )
    return made


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("board", type=Path, nargs="?", help="what tests/board/build.sh made")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    parser.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, default=1200.0, help="end the guest after this (1200)")
    given = parser.parse_args()
    if given.guest:
        measure()
        return
    if given.board is None or not (given.board / "card.img").is_file():
        parser.error("name the folder with card.img; `sh tests/board/build.sh build/board` makes it")
    if shutil.which("qemu-system-aarch64") is None:
        parser.error("qemu-system-aarch64 is missing: apt install qemu-system-arm mtools cpio")
    with tempfile.TemporaryDirectory(prefix="instructions-") as scratch:
        rows = boot(given.board.resolve(), Path(scratch), limit_s=given.limit_s)
    for row in rows:
        print(f"{row['model']:10} batch {row['batch_size']:3}  {row['own_over_constant']:.4f}")
    if given.out:
        machine = "qemu-system-aarch64, Cortex-A72, -icount shift=0, one instruction a nanosecond"
        given.out.write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
