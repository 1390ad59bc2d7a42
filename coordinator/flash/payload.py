"""What a board installs without a network: wheels for its Python, the bundle, the installer, hashes.

The same files go onto a card, into an image and over SSH. Wheels of others come from the package index once
and are kept in a cache; our own is made here from the two lower floors, which is all that a board runs.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import profiles
from coordinator.flash.settings import Settings
from edge_agent.bundle import read_bundle
from edge_agent.native.build import SOURCES, build
from profiles.errors import FlashError

__all__ = [
    "REQUIREMENTS",
    "Payload",
    "Target",
    "board_kernel",
    "cache_folder",
    "fetch_wheels",
    "kernel_path",
    "make_payload",
    "make_update",
    "own_wheel",
]

REQUIREMENTS = ("numpy>=1.26", "onnxruntime>=1.20", "paho-mqtt>=2.1,<3", "psutil>=5.9")
"""What the agent imports; the same as in ``pyproject.toml``."""

_TEMPLATES = Path(__file__).parent / "board"
_FLOORS = ("edge_agent", "profiles")
_GLIBC = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34", "2_35", "2_36")
_SCRIPTS = (
    *("install.sh", "guard.sh", "care.sh"),
    *("scalarfed-agent.service", "scalarfed-care.service", "scalarfed-care.path"),
)
_OLDEST_GLIBC = 28  # of numpy's and onnxruntime's wheels too
_EPOCH = (2020, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Target:
    """What wheels must fit.

    Attributes:
        python: Such as ``3.13``.
        arch: ``aarch64`` or ``x86_64``, as ``uname -m`` says.

    Raises:
        FlashError: There are no wheels for it.
    """

    python: str
    arch: str = "aarch64"

    def __post_init__(self) -> None:
        match = re.fullmatch(r"3\.(\d{1,2})", self.python)
        if match is None or int(match[1]) < 10:
            raise FlashError(
                f"Python {self.python or 'of the board is not known'}: wheels are needed for 3.10 or newer",
                hint="Say the board's with --python: Raspberry Pi OS Trixie and Debian 13 have 3.13, "
                "Bookworm 3.11, Ubuntu 24.04 3.12, JetPack 6 and Ubuntu 22.04 3.10.",
            )
        if self.arch not in ("aarch64", "x86_64"):
            raise FlashError(
                f"{self.arch}: there are no wheels of numpy and onnxruntime for it",
                hint="Boards need a 64-bit system: aarch64 or x86_64.",
            )


@dataclass(frozen=True)
class Payload:
    """The files of the folder ``scalarfed`` on a boot partition.

    Attributes:
        files: Bytes by path below the folder.
        release: Names what will be installed: our version, and a hash over the wheels.
    """

    files: Mapping[str, bytes]
    release: str

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(data) for data in self.files.values())


def cache_folder() -> Path:
    """Return where fetched wheels are kept; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home())
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scalarfed" / "wheels"


def fetch_wheels(target: Target, *, cache: Path | None = None) -> list[Path]:
    """Return the wheels of others that the agent needs, fetched by pip where the cache lacks them.

    Raises:
        FlashError: pip cannot get them.
    """
    known = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:8]
    folder = (cache or cache_folder()) / f"{target.arch}-cp{target.python.replace('.', '')}-{known}"
    if folder.is_dir():
        return sorted(folder.glob("*.whl"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    platforms = [f"manylinux_{glibc}_{target.arch}" for glibc in _GLIBC] + [f"manylinux2014_{target.arch}"]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as fetching:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        command += ["--only-binary=:all:", "--python-version", target.python, "--implementation", "cp"]
        command += [word for platform in platforms for word in ("--platform", platform)]
        done = subprocess.run(
            [*command, "-d", fetching, *REQUIREMENTS],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["pip failed"]
            raise FlashError(
                f"no wheels for Python {target.python} on {target.arch}: {last[0].strip()}",
                hint="This one step needs the internet, once per kind of board. Is the Python version right, "
                "and does `pip download numpy` work here?",
            )
        whole = Path(fetching) / "whole"
        whole.mkdir()
        for wheel in Path(fetching).glob("*.whl"):
            wheel.rename(whole / wheel.name)
        try:
            whole.rename(folder)
        except OSError:  # another flash was faster
            shutil.rmtree(whole, ignore_errors=True)
    return sorted(folder.glob("*.whl"))


def board_kernel(arch: str, *, cache: Path | None = None) -> bytes | None:
    """Return the compiled kernel for a board's processor, or None where nothing here can compile for it.

    Compiled once, by the zig of the package ``ziglang`` or by ``ARCH-linux-gnu-gcc``, and kept in the cache.
    A kernel that would need a newer C library than the oldest supported board has is not used.

    Args:
        arch: As ``uname -m`` says there.
        cache: Of the wheels, beside which it is kept; :func:`cache_folder` where left out.
    """
    kept = kernel_path(arch, cache=cache)
    if not kept.is_file():
        compiler = _compiler_for(arch)
        if not compiler:
            return None
        try:
            build(kept, compiler=compiler, machine=arch)
        except (OSError, subprocess.CalledProcessError):
            return None
    found = kept.read_bytes()
    needs = max((int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", found)), default=0)
    return found if needs <= _OLDEST_GLIBC else None


def kernel_path(arch: str, *, cache: Path | None = None) -> Path:
    """Return where the kernel of these sources is kept for a processor; it need not be there."""
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    told = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    return (cache or cache_folder()).parent / "kernels" / f"{arch}-{told}.so"


def _compiler_for(arch: str) -> list[str]:
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.2.17"]
    found = shutil.which(f"{arch}-linux-gnu-gcc")
    return [found] if found else []


def own_wheel(arch: str = "", *, cache: Path | None = None) -> tuple[str, bytes]:
    """Return the name and the bytes of a wheel with all that a board runs; equal sources, equal bytes.

    Args:
        arch: The board's processor, for the compiled kernel; without one, or where it cannot be compiled, the
            board computes the same bits with numpy.
        cache: For :func:`board_kernel`.
    """
    try:
        version = importlib.metadata.version("scalarfed")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    root = Path(profiles.__file__ or "").parent.parent
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for floor in _FLOORS
        for path in sorted((root / floor).rglob("*"))
        if path.is_file() and path.suffix not in (".pyc", ".so", ".o") and "__pycache__" not in path.parts
    }
    kernel = board_kernel(arch, cache=cache) if arch else None
    tag = f"py3-none-manylinux_2_{_OLDEST_GLIBC}_{arch}" if kernel else "py3-none-any"
    if kernel:
        files["edge_agent/native/libscalarfed.so"] = kernel
    info = f"scalarfed-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIREMENTS)
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: scalarfed\nVersion: {version}\n{needs}".encode()
    )
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: scalarfed\n"
        f"Root-Is-Purelib: {'false' if kernel else 'true'}\nTag: {tag}\n"
    ).encode()
    rows = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    return f"scalarfed-{version}-{tag}.whl", out.getvalue()


def make_payload(
    target: Target, settings: Settings, *, bundle: Path, data: Path | None = None, cache: Path | None = None
) -> Payload:
    """Return one board's payload.

    Args:
        target: The board's Python and architecture.
        settings: What the board is told; ``board.json`` is among the files, with its token.
        bundle: The bundle folder; checked.
        data: The board's samples, where they travel with it.
        cache: Where wheels are kept; :func:`cache_folder` where left out.

    Raises:
        BundleError: The bundle is damaged.
        FlashError: Wheels cannot be had, or there is no such data file.
    """
    files, release = _release(target, cache)
    files |= _bundle_files(bundle)
    if data is not None:
        if not data.is_file():
            raise FlashError(
                f"there is no data file {data}",
                hint="Give this board's .npz, or --data board:/path/on/the/board for samples that are there.",
            )
        files["data.npz"] = data.read_bytes()
    files["board.json"] = settings.to_json()
    files["MANIFEST"] = "".join(f"{_sha256(files[key])}  {key}\n" for key in sorted(files)).encode()
    return Payload(files, release)


def make_update(
    target: Target, *, bundle: Path | None = None, run: str = "", cache: Path | None = None
) -> Payload:
    """Return what a board takes over that has been flashed before: no settings of its own, no samples.

    Args:
        target: The boards' Python and architecture.
        bundle: Another bundle; the boards keep theirs where left out.
        run: The run of that bundle; the boards stay in theirs where left out.
        cache: Where wheels are kept; :func:`cache_folder` where left out.

    Raises:
        BundleError: The bundle is damaged.
        FlashError: Wheels cannot be had.
    """
    files, release = _release(target, cache)
    if bundle is not None:
        files |= _bundle_files(bundle)
    if run:
        files["settings.json"] = (json.dumps({"run": run}) + "\n").encode()
    return Payload(files, release)


def _release(target: Target, cache: Path | None) -> tuple[dict[str, bytes], str]:
    """Return the files that are the same for every board of a kind, and the release's name."""
    wheels = {wheel.name: wheel.read_bytes() for wheel in fetch_wheels(target, cache=cache)}
    name, own = own_wheel(target.arch, cache=cache)
    wheels[name] = own
    digest = hashlib.sha256("".join(_sha256(wheels[key]) for key in sorted(wheels)).encode()).hexdigest()
    release = f"{name.split('-')[1]}-{digest[:8]}"
    unpacked = sum(_unpacked(content) for content in wheels.values())
    files = {f"wheels/{key}": content for key, content in sorted(wheels.items())}
    files |= {file: (_TEMPLATES / file).read_bytes() for file in _SCRIPTS}
    files["release"] = f"{release} {target.arch} {target.python}\n".encode()
    files["unpacked_kib"] = f"{unpacked // 1024 + len(own) // 1024}\n".encode()
    return files, release


def _bundle_files(bundle: Path) -> dict[str, bytes]:
    read_bundle(bundle)
    return {f"bundle/{path.name}": path.read_bytes() for path in sorted(bundle.iterdir()) if path.is_file()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unpacked(wheel: bytes) -> int:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return sum(entry.file_size for entry in archive.infolist())
