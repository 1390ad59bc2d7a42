"""What an agent says of itself, checked field by field.

A status is JSON, so that any MQTT tool can read it, and anybody may have written it: unknown fields are left
out, known ones have their type and size, and whatever else comes is a :class:`~profiles.errors.WireError`.
"""

import json
from typing import Any

from profiles.errors import WireError

__all__ = ["LARGEST_STATUS", "STATES", "TRAFFIC", "read_status"]

LARGEST_STATUS = 16_384
"""No status is longer, in bytes."""

STATES = ("starting", "ready", "closed", "refused", "offline", "safe mode")
"""What an agent can be; ``offline`` is also its last will."""

TRAFFIC = ("payload_up", "payload_down", "packet_up", "packet_down", "messages_up", "messages_down")
"""What an agent counts of its link."""

_LARGEST = 2**63 - 1
_TEXTS = (
    *("name", "version", "profile", "digest", "enforcement", "text", "last_words", "key"),
    *("machine", "python", "release", "update", "update_state"),
)
_WHOLES = ("pid", "epoch", "round", "samples", "estimates", "forwards", "starts", "update_number")
_COUNTS = ("flops", "counted", "uncounted")
_NUMBERS = ("rss_mib", "peak_rss_mib", "pss_mib", "budget_mib", "temperature_c", "battery_percent")
_TELEMETRY = (
    *(
        "temperature_c",
        "battery_percent",
        "power_w",
        "gpu_load",
        "gpu_mib",
        "ram_mib",
        "available_mib",
        "swap_used_mib",
    ),
    *("load_1min", "uptime_s", "disk_free_mib"),
)
_MEASURED = ("fp32_gflops", "bandwidth_gbs", "ram_mib", "cores", "clock_ghz", "temperature_c")
_THROTTLING = ("throttled", "throttled_since_boot")
_LONGEST_TEXT = 200
_MOST_TEXTS = 8
_MOST_REASONS = 32


def read_status(payload: bytes) -> dict[str, Any]:
    """Return the known fields of a status; ``state`` is always there.

    Raises:
        WireError: It is no JSON object, too long, or a field is not what it must be.
    """
    if len(payload) > LARGEST_STATUS:
        raise WireError(f"a status of {len(payload)} bytes is longer than {LARGEST_STATUS}")
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a status is no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("state") not in STATES:
        raise WireError(f"a status must be a JSON object with a state of {', '.join(STATES)}")
    status: dict[str, Any] = {"state": found["state"]}
    for key in _TEXTS:
        if key in found:
            status[key] = _text(key, found[key])
    for key in (*_WHOLES, *_COUNTS):
        if key in found:
            status[key] = _whole(key, found[key])
    for key in _NUMBERS:
        if found.get(key) is not None:
            status[key] = _number(key, found[key])
    if "traffic" in found:
        status["traffic"] = {key: _whole(key, _table(found["traffic"]).get(key)) for key in TRAFFIC}
    if "measured" in found:
        measured = _table(found["measured"])
        status["measured"] = {key: _number(key, measured[key]) for key in _MEASURED if key in measured}
    if "telemetry" in found:
        status["telemetry"] = _telemetry(_table(found["telemetry"]))
    if "dropped" in found:
        reasons = list(_table(found["dropped"]).items())[:_MOST_REASONS]
        status["dropped"] = {_text("reason", key): _whole(key, count) for key, count in reasons}
    return status


def _telemetry(found: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {key: _number(key, found[key]) for key in _TELEMETRY if key in found}
    for key in _THROTTLING:
        if key in found:
            if not isinstance(found[key], list):
                raise WireError(f"the {key} of a status must be a list")
            told[key] = [_text(key, reason) for reason in found[key][:_MOST_TEXTS]]
    return told


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WireError("a status holds traffic, telemetry or dropped that is no object")
    return value


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise WireError(f"the {key} of a status must be at most {_LONGEST_TEXT} printable characters")
    return value


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise WireError(f"the {key[:40]} of a status must be a whole number")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e18 <= value <= 1e18:
        raise WireError(f"the {key} of a status must be a finite number")
    return float(value)
