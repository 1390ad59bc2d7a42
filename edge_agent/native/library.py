"""What the compiled kernel's file is called; whoever builds it and whoever loads it must agree."""

import sys

__all__ = ["library_name"]


def library_name() -> str:
    """Return the file name of the kernel on this operating system."""
    return {"win32": "scalarfed.dll", "darwin": "libscalarfed.dylib"}.get(sys.platform, "libscalarfed.so")
