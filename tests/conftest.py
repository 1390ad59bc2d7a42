"""What holds for every test: ONNX Runtime tells nobody, and Ctrl-C works even in a job in the background."""

import os
import signal
import threading

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see profiles/runtime.py

# A job in the background is born with SIGINT ignored, and so are all processes that it starts.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)
