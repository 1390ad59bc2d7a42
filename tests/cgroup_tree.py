"""Recorded file trees of /proc and /sys/fs/cgroup, laid out below a folder."""

from pathlib import Path

V2_MOUNT = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def fake_root(top: Path, *, membership: str, mount: str, files: dict[str, dict[str, str]]) -> Path:
    """Lay out /proc/self and a cgroup mount below ``top``: files are folder -> name -> text."""
    proc = top / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(membership)
    (proc / "mountinfo").write_text(f"20 1 8:1 / / rw - ext4 /dev/root rw\n{mount}\n")
    for folder, contents in files.items():
        place = top / folder
        place.mkdir(parents=True)
        for name, text in contents.items():
            (place / name).write_text(text + "\n")
    return top
