"""Tests of coordinator.web: a real server on the loopback, and clients that behave and misbehave."""

import hashlib
import http.client
import socket
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from coordinator.web import Answer, Request, WebServer, folder_files
from profiles.errors import BrokerError

CONTENT = bytes(range(256)) * 1000
ETAG = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
PATIENCE_S = 20.0


@pytest.fixture
def serve(tmp_path) -> Iterator[Callable[..., WebServer]]:
    """Start servers of a folder with one file in it and a secret beside it."""
    begun: list[WebServer] = []
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "release.tar").write_bytes(CONTENT)
    (tmp_path / "secret").write_text("secret")

    def start(**limits: float) -> WebServer:
        server = WebServer(**limits)  # type: ignore[arg-type]
        server.add_get("/files/", folder_files(folder))
        server.add_post("/echo", lambda request: Answer(200, request.body), most_bytes=100)
        begun.append(server)
        return server

    yield start
    for server in begun:
        server.close()


def ask(
    server: WebServer, path: str, *, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Send one request and return the answer with its body; _ in a header's name stands for -."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer, found


def open_socket(server: WebServer) -> socket.socket:
    """Return a bare connection."""
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)


def test_a_file_comes_with_its_hash(serve):
    """A whole file carries its SHA-256 as ETag and as Repr-Digest."""
    answer, body = ask(serve(), "/files/deep/release.tar")

    assert (answer.status, body) == (200, CONTENT)
    assert answer.headers["ETag"] == ETAG
    said = answer.headers["Repr-Digest"].removeprefix("sha-256=:").removesuffix(":")
    assert b64decode(said) == hashlib.sha256(CONTENT).digest()


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [("bytes=1000-", 1000, 256_000), ("bytes=7-9", 7, 10), ("bytes=-5", 255_995, 256_000)],
)
def test_a_range_is_the_rest_of_the_file(serve, wanted, start, stop):
    """A download that was cut short goes on where it stopped."""
    answer, body = ask(serve(), "/files/deep/release.tar", Range=wanted, If_Range=ETAG)

    assert (answer.status, body) == (206, CONTENT[start:stop])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/256000"
    assert answer.headers["ETag"] == ETAG


def test_a_range_of_another_version_gets_the_whole_file(serve):
    """Who has the beginning of an older file does not glue the end of a newer one to it."""
    answer, body = ask(serve(), "/files/deep/release.tar", Range="bytes=1000-", If_Range='"older"')

    assert (answer.status, body) == (200, CONTENT)


@pytest.mark.parametrize("wanted", ["bytes=256000-", "bytes=-0", "bytes=9-5"])
def test_a_range_beyond_the_end_is_refused(serve, wanted):
    """A range that holds nothing is answered by 416 and the file's size."""
    answer, body = ask(serve(), "/files/deep/release.tar", Range=wanted)

    assert (answer.status, body) == (416, b"")
    assert answer.headers["Content-Range"] == "bytes */256000"


def test_what_is_there_already_is_not_sent(serve):
    """If-None-Match with the file's hash gets 304 and no body; HEAD never gets one."""
    server = serve()

    same, nothing = ask(server, "/files/deep/release.tar", If_None_Match=ETAG)
    head, empty = ask(server, "/files/deep/release.tar", method="HEAD")

    assert (same.status, nothing) == (304, b"")
    assert (head.status, head.headers["Content-Length"], empty) == (200, "256000", b"")


def test_a_replaced_file_has_another_hash(serve, tmp_path):
    """The remembered hash belongs to the file's content, not to its name."""
    server = serve()
    ask(server, "/files/deep/release.tar")
    beside = tmp_path / "new"
    beside.write_bytes(b"newer" * 51_200)
    beside.replace(tmp_path / "served" / "deep" / "release.tar")

    answer, body = ask(server, "/files/deep/release.tar")

    assert answer.headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()}"' != ETAG


@pytest.mark.parametrize(
    "path",
    [
        "/files/../secret",
        "/files/%2e%2e/secret",
        "/files/..%2fsecret",
        "/files/deep/../../secret",
        "/files//etc/passwd",
        "/files/deep%5c..%5c..%5csecret",
        "/files/c:secret",
        "/files/deep",
        "/files/",
        "/files/link",
        "/elsewhere",
    ],
)
def test_nothing_outside_the_folder_is_served(serve, tmp_path, path):
    """No spelling of a path, nor a link, leads out of the folder."""
    (tmp_path / "served" / "link").symlink_to(tmp_path / "secret")

    answer, body = ask(serve(), path)

    assert answer.status == 404
    assert b"secret" not in body


def test_a_post_has_a_largest_size(serve):
    """A body up to the limit is taken; a longer one, or one of unknown length, is refused unread."""
    server = serve()

    assert ask(server, "/echo", method="POST", body=b"x" * 100)[1] == b"x" * 100
    assert ask(server, "/echo", method="POST", body=b"x" * 101)[0].status == 413
    assert ask(server, "/echo", method="POST", Content_Length="-1")[0].status == 411
    assert ask(server, "/files/deep/release.tar", method="POST", body=b"x")[0].status == 404


def test_a_failing_route_fails_alone(serve):
    """An exception in a handler is an answer 500 that tells nothing, and the server goes on."""
    server = serve()

    def fail(_: Request) -> Answer:
        raise RuntimeError("the token is 1234")

    server.add_post("/fail", fail)

    answer, body = ask(server, "/fail", method="POST", body=b"")

    assert answer.status == 500
    assert b"1234" not in body
    assert ask(server, "/echo", method="POST", body=b"on")[1] == b"on"


def test_a_slow_request_is_cut_off(serve):
    """Who sends a byte now and then loses the connection at the deadline, not a deadline after each byte."""
    server = serve(timeout_s=1.0)
    with open_socket(server) as slow:
        slow.settimeout(0.05)
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < PATIENCE_S:
            try:
                slow.send(b"G")
                closed = slow.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True

    assert closed
    assert time.monotonic() - began < 10.0


def test_a_long_head_is_cut_off(serve):
    """Headers without end do not fill the memory: the connection is closed after some kilobytes."""
    sent = 0
    with open_socket(serve()) as greedy, suppress(OSError):
        while sent < 16 << 20:
            sent += greedy.send(b"X: " + b"x" * 8000 + b"\r\n")

    assert sent < 16 << 20


def test_connections_are_limited(serve):
    """One address gets no more than its share, and its place again once a connection ends."""
    server = serve(per_peer=2)
    idle = [open_socket(server), open_socket(server)]
    third = open_socket(server)
    third.settimeout(PATIENCE_S)
    assert third.recv(1) == b""
    assert server.turned_away == 1
    for one in (*idle, third):
        one.close()

    deadline = time.monotonic() + PATIENCE_S
    status = 0
    while status != 200 and time.monotonic() < deadline:
        try:
            status = ask(server, "/echo", method="POST", body=b"x")[0].status
        except (OSError, http.client.HTTPException):
            continue
    assert status == 200


def test_a_taken_port_is_named(serve):
    """A port that somebody has is an error that says which."""
    taken = serve()

    with pytest.raises(BrokerError, match=f"Port {taken.port} of 127.0.0.1"):
        WebServer(port=taken.port)


def test_no_file_no_answer(serve, tmp_path):
    """A handler's path that is gone meanwhile is a 404."""
    server = serve()
    server.add_get("/gone", lambda _: Path(tmp_path / "gone"))

    assert ask(server, "/gone")[0].status == 404
