"""A small web server for what is too large or too rare for MQTT: enrolment, snapshots, releases.

Knows HTTP/1.1 (RFC 9110, one request a connection), TLS, ranges and limits. Does not know what its routes
are for: they are functions from a request to an answer, and whoever serves something adds one.

Nothing that a stranger sends may cost much: a request has a size and a deadline, an address has a few
connections, and the number of threads is fixed.
"""

import hashlib
import io
import logging
import os
import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from profiles.errors import BrokerError

__all__ = ["Answer", "Handler", "Request", "WebServer", "folder_files"]

_HEAD_BYTES = 32 << 10
_PIECE = 64 << 10
_PART = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]*")
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What somebody asks.

    Attributes:
        rest: The path behind the route's prefix, decoded.
        body: What was posted.
        peer: The address it came from.
        device: Common name of the client's certificate, checked by TLS; None without one.
        serial: That certificate's number; None without one.
        headers: Names in lower case.
    """

    rest: str
    body: bytes
    peer: str
    device: str | None
    serial: int | None
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What is sent back when it is not a file."""

    status: int = 200
    body: bytes = b""
    type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Request], Answer | Path | None]
"""Answers a request: with bytes, with a file (ranges, ETag and hash come by themselves), or None for 404."""


def folder_files(folder: Path) -> Handler:
    """Return a handler that serves the files below a folder, and nothing that lies elsewhere."""
    root = folder.resolve()

    def handler(request: Request) -> Path | None:
        parts = request.rest.split("/")
        if not all(_PART.fullmatch(part) for part in parts):
            return None
        path = root.joinpath(*parts).resolve()
        return path if path.is_relative_to(root) and path.is_file() else None

    return handler


class WebServer:
    """Serves routes from threads of its own until it is closed; also a context manager.

    Args:
        host: Address to listen on.
        port: 0 for any free one.
        tls: Makes the context for a new connection, so that certificates and revocations may change; None
            for plain HTTP.
        workers: Connections at a time; one more is turned away at once.
        per_peer: Of these, connections of one address.
        timeout_s: For the handshake and the whole request; also for each piece that is sent.

    Attributes:
        url: ``https://HOST:PORT`` or ``http://HOST:PORT``.
        turned_away: Connections that found no free place.

    Raises:
        BrokerError: The address cannot be had.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Callable[[], ssl.SSLContext] | None = None,
        workers: int = 32,
        per_peer: int = 8,
        timeout_s: float = 30.0,
    ) -> None:
        try:
            self._server = _Server(host, port, tls, workers, per_peer, timeout_s)
        except OSError as error:
            raise BrokerError(
                f"Port {port} of {host} cannot be had for the web server: {error.strerror or error}.",
                hint="Choose another address or port for it, or end what runs there.",
            ) from error
        self.port = int(self._server.server_address[1])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{shown}:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="web", daemon=True
        )
        self._thread.start()

    @property
    def turned_away(self) -> int:
        """Connections that found no free place so far."""
        return self._server.turned_away

    def add_get(self, prefix: str, handler: Handler) -> None:
        """Answer GET and HEAD of all paths that begin with ``prefix``; the longest prefix wins."""
        self._server.routes["GET", prefix] = (handler, 0)

    def add_post(self, path: str, handler: Handler, *, most_bytes: int = 16 << 10) -> None:
        """Answer POST to ``path``; a longer body is refused before it is read."""
        self._server.routes["POST", path] = (handler, most_bytes)

    def close(self) -> None:
        """Take no more connections; those that are open end with the process or by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def __enter__(self) -> "WebServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = not hasattr(socket, "SO_EXCLUSIVEADDRUSE")  # on Windows it would share the port
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        tls: Callable[[], ssl.SSLContext] | None,
        workers: int,
        per_peer: int,
        timeout_s: float,
    ) -> None:
        self.routes: dict[tuple[str, str], tuple[Handler, int]] = {}
        self.timeout_s = timeout_s
        self.turned_away = 0
        self.hashes: dict[tuple[int, int, int, int], str] = {}
        self.hashing = threading.Lock()
        self._tls = tls
        self._workers = workers
        self._per_peer = per_peer
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection to a thread, or close it when there are enough."""
        peer = str(client_address[0])
        with self._lock:
            full = self._busy.total() >= self._workers or self._busy[peer] >= self._per_peer
            self.turned_away += full
            self._busy[peer] += not full
        if full:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Shake hands and answer, in the connection's thread: a slow stranger keeps nobody waiting."""
        peer = str(client_address[0])
        try:
            request.settimeout(self.timeout_s)
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                request = self._tls().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                request.do_handshake()
            self.finish_request(request, client_address)
        except (OSError, ValueError) as error:  # ValueError: a TLS connection that ended while we looked
            _LOG.debug("%s: %s", peer, error)
        finally:
            with suppress(OSError):
                self.shutdown_request(request)
            with self._lock:
                self._busy[peer] -= 1
                if not self._busy[peer]:
                    del self._busy[peer]

    def sha256(self, file: io.BufferedReader) -> tuple[int, str]:
        """Return an open file's size and SHA-256; the hash is remembered as long as the file is the same."""
        told = os.fstat(file.fileno())
        key = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns)
        with self.hashing:
            if key not in self.hashes:
                digest = hashlib.sha256()
                while piece := file.read(1 << 20):
                    digest.update(piece)
                if len(self.hashes) >= 1024:
                    self.hashes.clear()
                self.hashes[key] = digest.hexdigest()
            return told.st_size, self.hashes[key]


class _Bounded(io.RawIOBase):
    """Reads from a socket until a deadline and no more bytes than allowed."""

    def __init__(self, sock: socket.socket, *, allowed: int, timeout_s: float) -> None:
        self._sock = sock
        self._deadline = time.monotonic() + timeout_s
        self.allowed = allowed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0 or self.allowed <= 0:
            raise TimeoutError("the request is too slow or its head too long")
        self._sock.settimeout(left)
        view = memoryview(buffer)
        count = self._sock.recv_into(view[: min(len(view), self.allowed)])
        self.allowed -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "scalarfed"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._web = cast(_Server, self.server)
        self._raw = _Bounded(self.connection, allowed=_HEAD_BYTES, timeout_s=self._web.timeout_s)
        self.rfile.close()
        self.rfile = io.BufferedReader(self._raw)

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: what passes here may hold a secret."""

    def _serve(self, method: str) -> None:
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        prefixes = [
            prefix
            for verb, prefix in self._web.routes
            if verb == method and (path.startswith(prefix) if method == "GET" else path == prefix)
        ]
        if not prefixes:
            self._send(Answer(404, b'{"error": "there is nothing here"}\n'))
            return
        prefix = max(prefixes, key=len)
        handler, most_bytes = self._web.routes[method, prefix]
        body = self._body(most_bytes) if method == "POST" else b""
        if body is None:
            return
        device, serial = _identity(self.connection)
        request = Request(
            rest=path[len(prefix) :],
            body=body,
            peer=str(self.client_address[0]),
            device=device,
            serial=serial,
            headers={name.lower(): value for name, value in self.headers.items()},
        )
        try:
            answer = handler(request)
        except Exception:  # whatever it is, it ends this request and not the server
            _LOG.exception("%s %s failed", method, prefix)
            answer = Answer(500, b'{"error": "the coordinator failed"}\n')
        self.connection.settimeout(self._web.timeout_s)
        if isinstance(answer, Path):
            self._send_file(answer)
        else:
            self._send(answer or Answer(404, b'{"error": "there is nothing here"}\n'))

    def _body(self, most_bytes: int) -> bytes | None:
        """Return what is posted, or None after having refused it."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,12}", length):
            self._send(Answer(411, b'{"error": "a Content-Length is needed"}\n'))
        elif int(length) > most_bytes:
            self._send(Answer(413, b'{"error": "the body is too long"}\n'))
        else:
            self._raw.allowed += int(length)
            body = self.rfile.read(int(length))
            if len(body) == int(length):
                return body
        return None

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Connection", "close")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _send_file(self, path: Path) -> None:
        try:
            file = path.open("rb")
        except OSError:
            self._send(Answer(404, b'{"error": "there is nothing here"}\n'))
            return
        with file:
            size, sha256 = self._web.sha256(file)
            start, stop, status = self._range(size, f'"{sha256}"')
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{sha256}"')
            digest = b64encode(bytes.fromhex(sha256)).decode()
            self.send_header("Repr-Digest", f"sha-256=:{digest}:")  # RFC 9530: of the whole file
            self.send_header("Connection", "close")
            if status == HTTPStatus.PARTIAL_CONTENT:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self.send_header("Content-Range", f"bytes */{size}")
            if status != HTTPStatus.NOT_MODIFIED:
                self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command == "HEAD":
                return
            file.seek(start)
            left = stop - start
            while left and (piece := file.read(min(_PIECE, left))):
                self.wfile.write(piece)
                left -= len(piece)

    def _range(self, size: int, etag: str) -> tuple[int, int, HTTPStatus]:
        """Return the bytes to be sent and the status (RFC 9110, sections 13 and 14).

        Only single ranges are cut out; a range for another version of the file (If-Range) gets all of it.
        """
        if self.headers.get("If-None-Match") == etag:
            return 0, 0, HTTPStatus.NOT_MODIFIED
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if wanted is None or not same or not any(wanted.groups()):
            return 0, size, HTTPStatus.OK
        first, last = (int(number) if number else None for number in wanted.groups())
        if first is None:
            start, stop = max(0, size - (last or 0)), size
        else:
            start, stop = first, size if last is None else min(size, last + 1)
        if start >= stop:
            return 0, 0, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        return start, stop, HTTPStatus.PARTIAL_CONTENT


def _identity(connection: Any) -> tuple[str | None, int | None]:
    """Return the common name and number of the client's certificate; (None, None) without one."""
    found: dict[str, Any] = {}
    if isinstance(connection, ssl.SSLSocket):
        found = cast(dict[str, Any], connection.getpeercert() or {})
    names = [value for entry in found.get("subject", ()) for key, value in entry if key == "commonName"]
    return (str(names[0]), int(found["serialNumber"], 16)) if len(names) == 1 else (None, None)
