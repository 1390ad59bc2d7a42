"""How the board is: temperature, throttling, voltage, power, memory, disk; read from sysfs and procfs.

Needs no root and no service. A figure that a board does not have is left out, never guessed. Knows nothing
of the agent's own memory (``profiles.memory``).

Sources: the kernel's thermal, hwmon and procfs documentation; raspberrypi/linux, raspberrypi-hwmon and
soc's get_throttled; rbonghi/jetson_stats for the INA3221 and NvMap names.
"""

import contextlib
import os
import shutil
from pathlib import Path

__all__ = ["read_telemetry"]

_THROTTLE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}


def read_telemetry(*, root: Path = Path("/"), disk: Path | None = None) -> dict[str, float | list[str]]:
    """Return what the board tells about itself now.

    Args:
        root: Where ``proc`` and ``sys`` lie.
        disk: A folder whose disk's free space is wanted.

    Returns:
        Of these, what there is: ``temperature_c`` (the hottest zone), ``battery_percent`` (the emptiest),
        ``throttled`` (what holds now), ``throttled_since_boot``, ``power_w``, ``gpu_load`` (0 to 1),
        ``gpu_mib``, ``ram_mib``, ``available_mib``, ``swap_used_mib``, ``load_1min``, ``uptime_s``,
        ``disk_free_mib``.
    """
    told: dict[str, float | list[str]] = {}
    zones = [_number(zone / "temp") for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))]
    hot = [zone / 1000 for zone in zones if zone is not None and -40_000 < zone < 150_000]
    if hot:
        told["temperature_c"] = round(max(hot), 1)
    charge = [_number(supply / "capacity") for supply in (root / "sys/class/power_supply").glob("*")]
    charged = [percent for percent in charge if percent is not None and 0 <= percent <= 100]
    if charged:
        told["battery_percent"] = min(charged)
    told |= _throttling(root)
    told |= _power(root)
    told |= _memory(root)
    with contextlib.suppress(OSError, ValueError):
        told["load_1min"] = float((root / "proc/loadavg").read_text().split()[0])
    with contextlib.suppress(OSError, ValueError):
        told["uptime_s"] = float((root / "proc/uptime").read_text().split()[0])
    if disk is not None:
        with contextlib.suppress(OSError):
            told["disk_free_mib"] = round(shutil.disk_usage(disk).free / 2**20)
    return told


def _throttling(root: Path) -> dict[str, float | list[str]]:
    places = sorted((root / "sys/devices/platform").glob("soc*/soc*:firmware/get_throttled"))
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            bits = int(place.read_text().strip(), 16)
            return {
                "throttled": [name for bit, name in _THROTTLE_BITS.items() if bits >> bit & 1],
                "throttled_since_boot": [
                    name for bit, name in _THROTTLE_BITS.items() if bits >> bit + 16 & 1
                ],
            }
    for monitor in _monitors(root, "rpi_volt"):  # kernels without that file still raise this alarm
        alarm = _number(monitor / "in0_lcrit_alarm")
        if alarm is not None:
            return {"throttled": ["under-voltage"] if alarm else []}
    return {}


def _power(root: Path) -> dict[str, float | list[str]]:
    """Return the power of the board's main rail: on a Jetson the first channel of its INA3221."""
    told: dict[str, float | list[str]] = {}
    for monitor in _monitors(root, "ina3221"):
        millivolts, milliamperes = _number(monitor / "in1_input"), _number(monitor / "curr1_input")
        if millivolts is not None and milliamperes is not None:
            told["power_w"] = round(millivolts * milliamperes / 1e6, 3)
            break
    for load in sorted((root / "sys/class/devfreq").glob("*gpu*/device/load")) + sorted(
        (root / "sys/class/devfreq").glob("*gv11b*/device/load")
    ):
        value = _number(load)
        if value is not None:
            told["gpu_load"] = value / 1000
            break
    return told


def _memory(root: Path) -> dict[str, float | list[str]]:
    rows: dict[str, float] = {}
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, value = line.partition(":")
        with contextlib.suppress(ValueError, IndexError):
            rows[name] = int(value.split()[0]) / 1024
    told: dict[str, float | list[str]] = {}
    for name, key in (
        ("MemTotal", "ram_mib"),
        ("MemAvailable", "available_mib"),
        ("NvMapMemUsed", "gpu_mib"),
    ):
        if name in rows:
            told[key] = round(rows[name])
    if "SwapTotal" in rows and "SwapFree" in rows:
        told["swap_used_mib"] = round(rows["SwapTotal"] - rows["SwapFree"])
    return told


def _monitors(root: Path, kind: str) -> list[Path]:
    found = []
    for monitor in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        with contextlib.suppress(OSError):
            if (monitor / "name").read_text().strip() == kind:
                found.append(monitor)
    return found


def _number(path: os.PathLike[str]) -> int | None:
    try:
        return int(Path(path).read_text().strip())
    except (OSError, ValueError):
        return None
