"""Sessions of ONNX Runtime as a board opens them, and its import without a peak of memory.

Knows nothing of bundles or weights (``forward``).
"""

from pathlib import Path
from typing import Any

from edge_agent.footprint import giving_back
from profiles.errors import BundleError

with giving_back():
    from profiles.runtime import ort

__all__ = ["open_session"]


def open_session(graph: Path | bytes, *, threads: int = 1, operators: Path | None = None) -> Any:
    """Return an ``InferenceSession`` as a board runs it: arena on, no memory pattern, ``threads`` threads.

    Args:
        graph: The ONNX file or its bytes.
        threads: Threads of ONNX Runtime.
        operators: Library of the operators that the graph has beside ONNX Runtime's.

    Raises:
        BundleError: ONNX Runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # errors arrive as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        if operators is not None:
            options.register_custom_ops_library(str(operators))
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(f"ONNX Runtime {ort.__version__} refuses the graph: {error}") from None
