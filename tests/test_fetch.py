"""Fetching over real sockets: cut off, gone on with, lied to, and never a wrong byte in the file's place."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_agent.fetch import fetch
from profiles.errors import FetchError

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(range(256)) * 1500  # 384,000 bytes: more than a socket's buffers swallow at once
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT, with faults: each request takes the next one of ``plan``; none left, it behaves."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self.asked: list[int] = []
        self.content = CONTENT
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                fault = outer.plan.pop(0) if outer.plan else "whole"
                first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                outer.asked.append(first)
                whole = outer.content
                if fault.isdigit():
                    self.send_error(int(fault))
                    return
                if fault == "no ranges":
                    first = 0
                body = whole[first:]
                self.send_response(200 if fault == "no ranges" else 206)
                self.send_header("Content-Length", str(len(body)))
                total = len(whole) + (7 if fault == "another size" else 0)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
                self.end_headers()
                self.wfile.write(body[:100_000] if fault == "cut" else body)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/file"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    """Return a server that does as it is told."""
    made = Server()
    yield made
    made.close()


def get(server: Server, path: Path, **more: object) -> Path:
    told = {"sha256": DIGEST, "size": len(CONTENT), "wait": lambda _: None} | more
    return fetch(server.url, path, **told)


def test_a_download_that_is_cut_goes_on_where_it_stopped(server, tmp_path):
    """Cut three times, every request asks for what is missing, and the file is whole."""
    server.plan = ["cut", "cut", "cut"]

    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [0, 100_000, 200_000, 300_000]
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_another_process_goes_on_too(server, tmp_path):
    """What a process left behind that lost its power is not fetched again."""
    server.plan = ["cut", "503"]
    with pytest.raises(FetchError, match="100000 of 384000 bytes are there"):
        get(server, tmp_path / "f", attempts=1)
    assert not (tmp_path / "f").exists()

    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked[-1] == 100_000


def test_what_is_there_is_not_fetched(server, tmp_path):
    """A file that fits its promise costs no request."""
    (tmp_path / "f").write_bytes(CONTENT)
    get(server, tmp_path / "f")

    assert server.asked == []


@pytest.mark.parametrize("left", [b"x" * 1000, CONTENT + b"more", CONTENT[:-1] + b"x"])
def test_a_spoilt_part_is_fetched_anew(server, tmp_path, left):
    """Wrong bytes, too many bytes, or all but the last one right: the hash finds it and it begins again."""
    (tmp_path / "f.part").write_bytes(left)

    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert 0 in server.asked


@pytest.mark.parametrize("fault", ["no ranges", "another size", "416", "500", "429"])
def test_a_clumsy_server_is_borne(server, tmp_path, fault):
    """No ranges, a file that changed, a server in trouble: the end is the same bytes."""
    server.plan = ["cut", fault]

    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_other_bytes_than_promised_never_get_the_name(server, tmp_path):
    """A file of the right size and the wrong hash is refused once it has come whole, and not kept."""
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(FetchError, match="not what was promised"):
        get(server, tmp_path / "f")

    assert list(tmp_path.iterdir()) == []
    assert len(server.asked) == 1


def test_a_server_that_sends_more_is_cut_off(server, tmp_path):
    """No more than the promised size is written, whatever comes."""
    server.content = CONTENT * 3
    server.plan = ["no ranges"] * 9
    heard: list[int] = []
    with pytest.raises(FetchError, match="not what was promised"):
        get(server, tmp_path / "f", sha256="0" * 64, size=150_000, on_bytes=heard.append)

    assert max(heard) == 150_000


def test_a_file_that_is_not_there_is_not_asked_for_again(server, tmp_path):
    """404 is final; the server's words are told."""
    server.plan = ["404"] * 5
    with pytest.raises(FetchError, match="404"):
        get(server, tmp_path / "f")

    assert len(server.asked) == 1


def test_patience_grows_and_ends(server, tmp_path):
    """Without a byte the pauses double; after the last attempt it says what happened."""
    server.plan = ["503"] * 9
    pauses: list[float] = []
    with pytest.raises(FetchError, match="503"):
        get(server, tmp_path / "f", attempts=5, wait=pauses.append)

    assert pauses == [1, 2, 4, 8]


def test_nobody_there_is_said(tmp_path):
    """A refused connection is told with its reason, as our error."""
    with pytest.raises(FetchError, match="refused"):
        fetch("http://127.0.0.1:9/f", tmp_path / "f", sha256=DIGEST, size=1, attempts=1)


@pytest.mark.parametrize("url", ["ftp://x/f", "file:///etc/passwd", "http://", "http://x:y/", "nonsense"])
def test_what_is_no_address_is_refused(tmp_path, url):
    """Only http and https, with a host."""
    with pytest.raises(FetchError, match="no address"):
        fetch(url, tmp_path / "f", sha256=DIGEST, size=1)


def test_a_full_disk_is_named(server, tmp_path):
    """A folder that takes no file gives our error with the disk as its subject, not the network."""
    with pytest.raises(FetchError, match="cannot be written") as told:
        get(server, tmp_path / "missing" / "f")
    assert "disk" in told.value.hint


def test_an_agent_that_fetches_nothing_pays_nothing():
    """Importing the module loads neither http.client nor ssl."""
    code = "import sys, edge_agent.fetch; print([m for m in ('http.client', 'ssl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)

    assert done.stdout.strip() == "[]"
