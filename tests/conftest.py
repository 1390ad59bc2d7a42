"""What holds for every test: the tests' own imports of ONNX Runtime tell nobody either."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see profiles/runtime.py
