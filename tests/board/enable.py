"""Enables units of an unpacked root file system, as systemctl would: ``enable.py ROOT UNIT...``."""

import re
import sys
from pathlib import Path

__all__ = ()

root = Path(sys.argv[1])
for unit in sys.argv[2:]:
    text = (root / "usr/lib/systemd/system" / unit).read_text()
    for key, suffix in (("WantedBy", "wants"), ("RequiredBy", "requires")):
        for targets in re.findall(rf"^{key}=(.*)$", text, re.MULTILINE):
            for target in targets.split():
                link = root / "etc/systemd/system" / f"{target}.{suffix}" / unit
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(f"/usr/lib/systemd/system/{unit}")
