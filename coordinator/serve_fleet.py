"""The coordinator for boards elsewhere: a broker, a web server at which boards enrol, and the rounds.

Joins what it starts on this machine and takes it down again; ``serve`` runs the rounds, ``guard`` keeps the
broker shut. Starts no agents: they come by themselves, under the names that the experiment has for them.
"""

import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.authority import Authority
from coordinator.broker import Broker, open_broker
from coordinator.enrolment import add_enrolment, server_context
from coordinator.guard import Guard, connect, is_beyond_loopback
from coordinator.rebuild import CHECKPOINT
from coordinator.serve import serve_run
from coordinator.service import Service
from coordinator.web import Request, WebServer
from edge_agent.wire import RoundRecord

__all__ = ["Address", "Shelf", "serve_fleet"]


@dataclass(frozen=True)
class Address:
    """Where the fleet finds its coordinator.

    Attributes:
        host: Address to listen on; ``0.0.0.0`` for every network of this machine.
        broker_port: Of the broker.
        web_port: Of the web server.
    """

    host: str
    broker_port: int
    web_port: int


def serve_fleet(
    run: Path,
    *,
    address: Address,
    authority: Path | None,
    on_ready: Callable[[list[str]], None] = lambda lines: None,
    on_commit: Callable[[RoundRecord, float | None], None] = lambda record, loss: None,
) -> dict[str, Any]:
    """Serve what is left of a run's rounds to boards elsewhere, and return how it ended.

    Args:
        run: A folder that ``testbed.prepare`` made.
        address: Where to listen.
        authority: Folder of the authority, made if there is none; None serves everybody in the clear.
        on_ready: Told what people need to know, as lines, when boards may come.
        on_commit: Called after every record that is on the disk.

    Raises:
        ScalarfedError: As the parts raise it.
        KeyboardInterrupt: After everything was stopped in order.
    """
    with contextlib.ExitStack() as stack:
        guard: Guard | None = None
        if authority is not None:
            guard = Guard(Authority.create(authority), run)
            guard.sign_bundles(run)
            broker = stack.enter_context(guard.start(run, host=address.host, port=address.broker_port))
            web = stack.enter_context(_web(guard.authority, address))
            lines = _secured(broker, web, guard.authority, address)
        else:
            broker = stack.enter_context(open_broker(run, host=address.host, port=address.broker_port))
            web = stack.enter_context(WebServer(host=address.host, port=address.web_port))
            lines = [f"broker: {broker.kind}, {broker.agents_url} (in the clear, open to everybody)"]
        shelf = Shelf(run / CHECKPOINT)
        web.add_get("/snapshots/", shelf)
        on_ready(lines)

        def on_idle(service: Service) -> None:
            stored = service.late.stored
            shelf.sha256 = "" if stored is None else stored.sha256.hex()
            if not broker.alive():
                broker.restart()
            if guard is not None:
                service.shut_out(guard.watch())

        return serve_run(
            run,
            broker=broker.url,
            connect=lambda topics: connect(broker, topics, guard),
            on_commit=on_commit,
            on_idle=on_idle,
            web=(web.port, guard is not None),
            tls=() if guard is None else guard.files(),
        )


class Shelf:
    """Hands out the checkpoint to whoever knows its hash; it is replaced while the run goes on.

    Args:
        path: The file.

    Attributes:
        sha256: Of the file that is there now; empty for none.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = ""
        self._path = path

    def __call__(self, request: Request) -> Path | None:
        """Return the file, if it is the one that is asked for."""
        return self._path if self.sha256 and request.rest == self.sha256 else None


def _web(authority: Authority, address: Address) -> WebServer:
    identity = authority.server_identity(_names(address))
    server = WebServer(
        host=address.host, port=address.web_port, tls=lambda: server_context(authority, identity)
    )
    add_enrolment(server, authority)
    return server


def _secured(broker: Broker, web: WebServer, authority: Authority, address: Address) -> list[str]:
    port = broker.agents_url.rpartition(":")[2]
    host = address.host
    if host in ("0.0.0.0", "::"):
        host = f"{socket.gethostname().partition('.')[0]}.local"
    lines = [
        f"broker: {broker.kind}, mqtts://{host}:{port} (mutual TLS)",
        f"enrolment: https://{host}:{web.port}",
        f"authority: {authority.folder}, SHA-256 {authority.fingerprint}",
    ]
    if not is_beyond_loopback(address.host):
        lines.append("only this machine can reach it; --listen 0.0.0.0 opens it to others")
    return lines


def _names(address: Address) -> list[str]:
    return [] if address.host in ("0.0.0.0", "::") else [address.host]
