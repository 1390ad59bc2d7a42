"""Fetches a file over HTTP or HTTPS: goes on where it was cut off, and believes nothing but the hash.

Knows ranges (RFC 9110, section 14) and patience. Does not know what the file is, nor who may be asked: a
promise of size and SHA-256 comes from elsewhere. What HTTP needs is imported only when something is fetched,
since an agent that fetches nothing must not pay its memory.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from profiles.errors import FetchError

if TYPE_CHECKING:
    import http.client
    import ssl

__all__ = ["fetch"]

_PIECE = 64 << 10
_SLOWEST_PAUSE_S = 30.0


def fetch(
    url: str,
    path: Path,
    *,
    sha256: str,
    size: int,
    tls: "ssl.SSLContext | None" = None,
    attempts: int = 5,
    timeout_s: float = 20.0,
    wait: Callable[[float], object] = time.sleep,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Path:
    """Return ``path`` once it holds the promised bytes; it is never there with others.

    What has come so far lies in ``path`` with ``.part`` added: a later call, also after a power cut, goes on
    from there. A server that knows no ranges begins anew. Redirections are not followed.

    Args:
        url: ``http://`` or ``https://``.
        path: Where the file goes, in a folder that exists; a file that fits the promise already is kept.
        sha256: Of the whole file, hexadecimal.
        size: Of the whole file, in bytes; a server that sends more is cut off there.
        tls: For ``https``; the system's authorities where left out.
        attempts: Failures in a row without a byte after which it gives up.
        timeout_s: Of each wait for the network.
        wait: Called between attempts with 1, 2, 4, ... 30 seconds.
        on_bytes: Told after each piece how many bytes are there.

    Raises:
        FetchError: The server does not answer or refuses, the bytes are not those promised, or the disk is
            full.
    """
    if not _is_address(url):
        raise FetchError(f"{url!r} is no address to fetch from", hint="It begins with http:// or https://.")
    if path.is_file() and path.stat().st_size == size and _hash_of(path).hexdigest() == sha256:
        return path
    part = path.with_name(f"{path.name}.part")
    failures, clean = 0, False
    while True:
        try:
            before = part.stat().st_size if part.exists() else 0
            clean = clean or before == 0
            trouble = _go_on(url, part, size=size, tls=tls, timeout_s=timeout_s, on_bytes=on_bytes)
            after = part.stat().st_size if part.exists() else 0
            if after == size and not trouble:
                if _hash_of(part).hexdigest() == sha256:
                    os.replace(part, path)
                    return path
                part.unlink()
                if clean:  # all of it came from this server, so that asking again would change nothing
                    raise FetchError(f"{url} is not what was promised: its SHA-256 is another one")
                continue
        except OSError as error:
            raise FetchError(
                f"{part} cannot be written: {error.strerror or error}",
                hint="Free some space on the board's disk.",
            ) from error
        failures = 1 if after > before else failures + 1
        if failures >= attempts:
            raise FetchError(f"{url}: {trouble}; {after} of {size} bytes are there")
        wait(min(2.0 ** (failures - 1), _SLOWEST_PAUSE_S))


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _go_on(
    url: str,
    part: Path,
    *,
    size: int,
    tls: "ssl.SSLContext | None",
    timeout_s: float,
    on_bytes: Callable[[int], None],
) -> str:
    """Add to ``part`` what is still missing; return what went wrong, empty if nothing did.

    Raises:
        FetchError: The server says no, so that asking again is of no use.
        OSError: The part cannot be written.
    """
    import http.client

    with part.open("ab") as file:
        there = file.tell()
        if there > size:
            file.truncate(0)
            there = 0
        if there == size:
            return ""
        parts = urlsplit(url)
        connection = _connection(url, tls, timeout_s)
        try:
            with _network():
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                asked = {"Range": f"bytes={there}-", "Connection": "close"}
                connection.request("GET", target, headers=asked)
                answer = connection.getresponse()
            if answer.status == 416 or (answer.status == 206 and not _fits(answer, there, size)):
                file.truncate(0)  # what lies here is no beginning of what lies there
                return f"the server has another file (status {answer.status})"
            if answer.status in (408, 429) or answer.status >= 500:
                return f"the server says {answer.status} {answer.reason}"
            if answer.status == 200:
                file.truncate(0)
                there = 0
            elif answer.status != 206:
                raise FetchError(f"{url}: the server says {answer.status} {answer.reason}")
            while there < size:
                with _network():
                    piece = answer.read(min(_PIECE, size - there))
                if not piece:
                    return "the connection ended early"
                file.write(piece)
                there += len(piece)
                on_bytes(there)
            file.flush()
            os.fsync(file.fileno())
        except (http.client.HTTPException, _NetworkError) as error:
            return str(error) or type(error).__name__
        finally:
            connection.close()
    return ""


class _NetworkError(ValueError):
    """The network failed, and not the disk, whose errors are of the same kind."""


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise _NetworkError(str(error) or type(error).__name__) from error


def _connection(url: str, tls: "ssl.SSLContext | None", timeout_s: float) -> "http.client.HTTPConnection":
    import http.client

    parts = urlsplit(url)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=timeout_s, context=tls)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)


def _fits(answer: "http.client.HTTPResponse", there: int, size: int) -> bool:
    return answer.getheader("Content-Range", "") == f"bytes {there}-{size - 1}/{size}"


def _hash_of(path: Path) -> "hashlib._Hash":
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found
