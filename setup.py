"""Compiles the kernel during an install; everything else about the package is in pyproject.toml.

A failed build is no failed install: numpy computes the same bits, only slower. ``SCALARFED_MACHINE``
(``x86_64`` or ``aarch64``, with ``CC`` a compiler for it and glibc 2.17) makes a wheel for boards,
and there a failure counts.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path(__file__).parent / "edge_agent" / "native"
MACHINE = os.environ.get("SCALARFED_MACHINE", "")

sys.path.insert(0, str(Path(__file__).parent))
from edge_agent.native.build import build  # noqa: E402 - it needs nothing but the standard library
from edge_agent.native.library import library_name  # noqa: E402

LIBRARY = "libscalarfed.so" if MACHINE else library_name()  # boards run Linux


class BuildKernel(build_ext):
    """Compiles with the kernel's own flags, path by path, instead of Python's."""

    def get_ext_filename(self, fullname):
        """Return the path of the library; it carries no tag of a Python."""
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def build_extension(self, ext):
        """Compile; go on without a kernel where that fails, unless a wheel for boards is made."""
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            build(target, machine=MACHINE)
        except (OSError, subprocess.CalledProcessError) as error:
            if MACHINE:
                raise
            self.warn(f"no compiled kernel, numpy will do: {getattr(error, 'stderr', '') or error}")

    def copy_extensions_to_source(self):
        """Put the library beside its sources for an editable install."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            if built.exists():
                self.copy_file(str(built), str(NATIVE / built.name))

    def get_outputs(self):
        """Return what was really made."""
        return [output for output in super().get_outputs() if Path(output).exists()]


class PlatformWheel(bdist_wheel):
    """Tags the wheel for any Python 3 of the platform: the kernel is called, not imported."""

    def get_tag(self):
        """Return the tag: any Python 3, this platform or the one that was compiled for."""
        platform = f"manylinux_2_17_{MACHINE}" if MACHINE else super().get_tag()[2]
        return "py3", "none", platform


setup(
    ext_modules=[Extension("edge_agent.native.kernel_library", [], optional=True)],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": PlatformWheel},
)
