"""ONNX Runtime, kept from telling its vendor what it runs: the one place that imports it.

From release 1.29 on it sends records of its sessions and keeps an identifier of the device in ``~/.cache``,
unless the environment forbids it before the import. Data shall not leave a board, nor word of what it runs.
The import takes 19 MiB and a quarter of a second: import this module where it is needed. Knows nothing of
how sessions are opened.

Sources: docs/Privacy.md of onnxruntime 1.31; its pull request 29843.
"""

import os
from typing import Any

__all__ = ["ort"]

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

ort: Any = onnxruntime
"""The package."""

ort.disable_telemetry_events()  # all that can be done where somebody has imported it before
