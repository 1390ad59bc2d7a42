"""The first boot: which of its formats a boot partition speaks, and our lines merged into its files.

An image does not declare its format, and settings in the wrong one are ignored in silence. So the format
is found by evidence, and refused when the evidence is thin or contradicts itself. What Raspberry Pi Imager
or a person wrote stays; only lines are added. Pure: texts in, texts out.

Sources: raspberrypi/rpi-imager (firstrun.sh, ds=nocloud), RPi-Distro/raspberrypi-sys-mods (firstboot,
imager_custom), raspberrypi/linux issue 6980 (memory cgroup), cloud-init's NoCloud and runcmd.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.flash.settings import Wifi
from coordinator.flash.volume import BootVolume
from profiles.errors import FlashError

__all__ = ["FORMATS", "FirstBoot", "detect", "merge", "texts_of"]

FORMATS = ("systemd", "cloud-init")

_FILES = ("cmdline.txt", "firstrun.sh", "user-data", "meta-data", "network-config", "issue.txt")
_THIRTY_TWO = ("kernel.img", "kernel7.img", "kernel7l.img")
_NEVER_BOOTED = ("init=/usr/lib/raspberrypi-sys-mods/firstboot", "init=/usr/lib/raspi-config/init_resize.sh")
_RUN = (
    "systemd.run=/boot/firstrun.sh systemd.run_success_action=reboot systemd.unit=kernel-command-line.target"
)
_INSTALL = (
    "for d in /boot/firmware /boot; do "
    "test -f $d/scalarfed/install.sh && sh $d/scalarfed/install.sh && break; done"
)
_RELEASES = (("2025-10-01", "3.13", "Trixie"), ("2023-10-10", "3.11", "Bookworm"))


@dataclass(frozen=True)
class FirstBoot:
    """What a boot partition is.

    Attributes:
        format: One of :data:`FORMATS`.
        python: The system's Python, such as ``3.13``; empty where the partition does not tell.
        booted: Whether it has been booted before, as far as the partition tells.
        evidence: Why, for people.
    """

    format: str
    python: str
    booted: bool
    evidence: tuple[str, ...]


def texts_of(volume: BootVolume) -> dict[str, str]:
    """Return the first-boot files that are there, as texts.

    Raises:
        FlashError: One of them is no UTF-8.
    """
    texts = {}
    for name in _FILES:
        if volume.exists(name):
            try:
                texts[name] = volume.read(name).decode()
            except UnicodeDecodeError:
                raise FlashError(
                    f"{name} on the boot partition is no UTF-8 text", hint="Write the card again."
                ) from None
    return texts


def detect(volume: BootVolume, texts: Mapping[str, str], *, forced: str = "") -> FirstBoot:
    """Return what first boot a partition has.

    Args:
        volume: The boot partition.
        texts: Its first-boot files, from :func:`texts_of`.
        forced: One of :data:`FORMATS`, where a person knows better.

    Raises:
        FlashError: It is no boot partition we know, it is 32-bit, or the evidence contradicts itself.
    """
    names = {name.lower() for name in volume.names()}
    if "cmdline.txt" not in names and "user-data" not in names:
        raise FlashError(
            f"{volume.label or 'this'} is no boot partition that we know: "
            "it has neither cmdline.txt nor user-data",
            hint="Give the card's small FAT partition (bootfs, system-boot). Boards without one: boot them, "
            "then `scalarfed flash ssh USER@HOST`.",
        )
    old = sorted(names & set(_THIRTY_TWO))
    if old and "issue.txt" in names:
        raise FlashError(
            f"{', '.join(old)} on the partition: this is a 32-bit system, and there are no 32-bit wheels of "
            "numpy and onnxruntime",
            hint="Write the 64-bit Raspberry Pi OS with Imager.",
        )
    evidence = []
    python, release = _release_of(texts.get("issue.txt", ""))
    if release:
        evidence.append(f"issue.txt is of {release}")
    cloud = bool(names & {"user-data", "meta-data"})
    if cloud:
        evidence.append("user-data or meta-data is there, which cloud-init reads")
    systemd = "firstrun.sh" in texts or release == "Bookworm"
    if "firstrun.sh" in texts:
        evidence.append("firstrun.sh is there, which Imager writes for systemd's first run")
    if "rpi-preseed.toml" in names:
        raise FlashError(
            "rpi-preseed.toml on the partition: a first-boot format that is not settled yet",
            hint="Write a released Raspberry Pi OS (Bookworm or Trixie), or use `scalarfed flash ssh`.",
        )
    if not forced and cloud == systemd:
        why = (
            "both cloud-init's and systemd's first run"
            if cloud
            else "neither cloud-init nor Imager's firstrun.sh"
        )
        raise FlashError(
            f"the evidence on the partition names {why}; the settings could be ignored in silence",
            hint="Write the card again with a current Raspberry Pi Imager, or say --format systemd or "
            "--format cloud-init if you know which.",
        )
    chosen = forced or ("cloud-init" if cloud else "systemd")
    cmdline = texts.get("cmdline.txt", "")
    booted = chosen == "systemd" and bool(release) and not any(word in cmdline for word in _NEVER_BOOTED)
    if booted:
        evidence.append("cmdline.txt no longer asks for the very first boot")
    return FirstBoot(chosen, python, booted, tuple(evidence))


def merge(
    texts: Mapping[str, str], format_: str, *, name: str, instance: str, wifi: Wifi | None = None
) -> dict[str, str]:
    """Return the first-boot files with our lines, in the order in which they must be written.

    Args:
        texts: The files as they are, without our lines.
        format_: One of :data:`FORMATS`.
        name: The board's.
        instance: Names this flashing; another one makes cloud-init's first boot run again.
        wifi: Where Imager was not told one.

    Raises:
        FlashError: A file has a shape into which nothing can be merged safely.
    """
    if format_ == "systemd":
        line = _cmdline(texts, required=True)
        if "systemd.run=" in line and "firstrun.sh" not in line:
            raise FlashError(
                "cmdline.txt runs something else at first boot already",
                hint="Boot the card once, then `scalarfed flash ssh`; or write it again with Imager.",
            )
        line = _with_cgroup(line)
        line = line if "systemd.run=" in line else f"{line} {_RUN}"
        return {
            "firstrun.sh": _firstrun(texts.get("firstrun.sh", ""), name, wifi),
            "cmdline.txt": line + "\n",
        }
    merged: dict[str, str] = {}
    if wifi is not None:
        merged["network-config"] = _network_config(texts.get("network-config", ""), wifi)
    merged["meta-data"] = _meta_data(texts.get("meta-data", ""), instance)
    merged["user-data"] = _user_data(texts.get("user-data", ""), name)
    if "cmdline.txt" in texts:
        line = _with_cgroup(_cmdline(texts, required=False))
        words = [word for word in line.split(" ") if not word.startswith("ds=nocloud")]
        merged["cmdline.txt"] = " ".join([*words, f"ds=nocloud;i={instance}"]) + "\n"
    return merged


def _release_of(issue: str) -> tuple[str, str]:
    match = re.search(r"Raspberry Pi reference (\d{4}-\d\d-\d\d)", issue)
    if match is None:
        return "", ""
    for since, python, release in _RELEASES:
        if match[1] >= since:
            return python, release
    raise FlashError(
        f"issue.txt is of {match[1]}: a Raspberry Pi OS before Bookworm, whose Python has no wheels",
        hint="Write the current 64-bit Raspberry Pi OS with Imager.",
    )


def _cmdline(texts: Mapping[str, str], *, required: bool) -> str:
    lines = texts.get("cmdline.txt", "").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) > 1:
        raise FlashError(
            f"cmdline.txt has {len(lines)} lines; the firmware reads the first one only",
            hint="Join them to one line, each word once, and run the same command again.",
        )
    if required and not lines:
        raise FlashError("cmdline.txt is missing or empty", hint="Write the card again with Imager.")
    return lines[0].strip() if lines else ""


def _with_cgroup(line: str) -> str:
    """Return the line with the memory cgroup switched on: the Pi's device tree has it off.

    It must stand before ``systemd.run``: Imager's firstrun.sh cuts the line from there on.
    """
    if "cgroup_enable=memory" in line.split(" "):
        return line
    before, run, after = line.partition(" systemd.run")
    return f"{before} cgroup_enable=memory{run}{after}".strip()


def _firstrun(text: str, name: str, wifi: Wifi | None) -> str:
    if "\r" in text:
        raise FlashError(
            "firstrun.sh has Windows line endings, which its shell does not take",
            hint="Write the card again.",
        )
    ours = ["# scalarfed: install the agent from this partition", _INSTALL + " || true"]
    if wifi is not None:
        if "set_wlan" in text or "wpa_supplicant" in text:
            raise _wifi_is_set("firstrun.sh")
        tool = "/usr/lib/raspberrypi-sys-mods/imager_custom"
        words = " ".join(_quoted(word) for word in (wifi.ssid, wifi.key, wifi.country))
        ours.insert(0, f"{tool} set_wlan {words}")
    if not text:
        ours.insert(0, f"raspi-config nonint do_hostname {name} || echo {name} >/etc/hostname")
        end = ["rm -f /boot/firstrun.sh /boot/firmware/firstrun.sh"]
        end += [f"test -f {place} && sed -i 's| systemd.run.*||g' {place}" for place in _CMDLINES]
        return "\n".join(["#!/bin/sh", "set +e", *ours, *end, "exit 0", ""])
    if "scalarfed/install.sh" in text:
        return text
    lines = text.split("\n")
    places = [n for n, line in enumerate(lines) if line.startswith("rm -f ") and "firstrun.sh" in line]
    if not places:
        raise FlashError(
            "firstrun.sh does not end as Imager's does, so that there is no safe place for our line",
            hint="Write the card again with Imager, or boot it and use `scalarfed flash ssh`.",
        )
    return "\n".join([*lines[: places[0]], *ours, *lines[places[0] :]])


_CMDLINES = ("/boot/firmware/cmdline.txt", "/boot/cmdline.txt")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _meta_data(text: str, instance: str) -> str:
    kept = [line for line in text.splitlines() if not re.match(r"\s*instance[-_]id\s*:", line)]
    return "\n".join([*kept, f"instance-id: {instance}", ""])


def _user_data(text: str, name: str) -> str:
    lines = text.splitlines()
    says_something = any(line.strip() and not line.startswith("#") for line in lines)
    header = lines[0].strip() if lines else ""
    if (says_something or header.startswith(("#!", "##"))) and header != "#cloud-config":
        raise FlashError(
            f"user-data begins with {header[:40]!r}; lines can be merged into #cloud-config only",
            hint="Write the card again with Imager, or boot it and use `scalarfed flash ssh`.",
        )
    if "scalarfed/install.sh" in text:
        return text
    if header != "#cloud-config":
        lines = ["#cloud-config", *lines]
    keys = [n for n, line in enumerate(lines) if re.match(r"runcmd\s*:", line)]
    item = f"- [sh, -c, {json.dumps(_INSTALL)}]"
    if not any(re.match(r"hostname\s*:", line) for line in lines):
        lines.append(f"hostname: {name}")
    if not keys:
        return "\n".join(
            [*lines, "# scalarfed: install the agent from this partition", "runcmd:", f"  {item}", ""]
        )
    if not re.fullmatch(r"runcmd\s*:\s*(#.*)?", lines[keys[0]]):
        raise FlashError(
            "runcmd in user-data is written on one line, into which nothing can be merged safely",
            hint="Write its commands as a list, one line each beginning with `  - `, and try again.",
        )
    last, indent = keys[0], "  "
    for number in range(keys[0] + 1, len(lines)):
        line = lines[number]
        if line[:1] not in ("", " ", "\t", "-", "#"):
            break
        if line.strip() and not line.startswith("#"):
            indent = line[: len(line) - len(line.lstrip())] if last == keys[0] else indent
            last = number
    return "\n".join([*lines[: last + 1], f"{indent}{item}", *lines[last + 1 :], ""])


def _network_config(text: str, wifi: Wifi) -> str:
    if any(line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()):
        raise _wifi_is_set("network-config")
    return (
        "network:\n  version: 2\n  ethernets:\n    eth0:\n      dhcp4: true\n      optional: true\n"
        "  wifis:\n    wlan0:\n      dhcp4: true\n      optional: true\n"
        f"      regulatory-domain: {wifi.country}\n      access-points:\n"
        f"        {json.dumps(wifi.ssid)}:\n          password: {json.dumps(wifi.key)}\n"
    )


def _wifi_is_set(where: str) -> FlashError:
    return FlashError(
        f"{where} on the card sets up a network already",
        hint="Leave --wifi-ssid out: what Imager was told stays. Or write the card again without a network.",
    )
