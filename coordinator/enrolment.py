"""The web routes by which a board becomes part of the fleet: ``/ca``, ``/enrol`` and ``/renew``.

Joins an authority to a web server. A request is JSON; a refusal says why, since whoever holds a token may
know, and is counted: who is refused too often is not heard for a while.
"""

import json
import logging
import ssl
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from coordinator.authority import Authority, Identity
from coordinator.certificates import validity
from coordinator.web import Answer, Request, WebServer
from edge_agent.topics import is_name
from profiles.errors import SecurityError

__all__ = ["add_enrolment", "server_context", "ticket"]

_REFUSALS = 10.0
_REFUSALS_A_SECOND = 0.1
_MOST_PEERS = 4096
_LOG = logging.getLogger(__name__)


def ticket(authority: Authority, name: str, *, url: str, valid_s: float) -> dict[str, str]:
    """Return what a board needs to enrol once, for its ``ticket.json``; it holds a secret.

    Args:
        authority: Issues the token.
        name: Of the device.
        url: ``https://HOST:PORT`` where the board will find the coordinator's web server.
        valid_s: How long the token counts.

    Raises:
        SecurityError: That is no device's name.
    """
    token = authority.new_token(name, valid_s=valid_s)
    return {"name": name, "url": url, "ca_sha256": authority.fingerprint, "token": token}


def server_context(authority: Authority, identity: Identity) -> ssl.SSLContext:
    """Return TLS settings for the web server: TLS 1.2 at least; a client may show a certificate of the fleet.

    Revoked certificates are refused, as of now: ask for a new context with each connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(identity.certificate, identity.key)
    context.load_verify_locations(authority.ca)
    context.load_verify_locations(authority.revocation_list)
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def add_enrolment(
    server: WebServer, authority: Authority, *, clock: Callable[[], float] = time.monotonic
) -> None:
    """Let a web server hand out certificates.

    Args:
        server: Must speak TLS.
        authority: Signs them.
        clock: Monotonic seconds.
    """
    refusals = _Refusals(clock)

    def enrol(asked: dict[str, Any], request: Request) -> bytes:
        name, token, signed = (str(asked[key]) for key in ("name", "token", "request"))
        if not is_name(name):
            raise ValueError("no name")
        return authority.enrol(name, token, signed.encode())

    def renew(asked: dict[str, Any], request: Request) -> bytes:
        if request.device is None or request.serial is None or asked["name"] != request.device:
            raise SecurityError("Only a device that shows its certificate can have it renewed.")
        return authority.renew(request.device, request.serial, str(asked["request"]).encode())

    def guarded(answer: Callable[[dict[str, Any], Request], bytes]) -> Callable[[Request], Answer]:
        def handler(request: Request) -> Answer:
            if refusals.too_many(request.peer):
                return _refuse(HTTPStatus.TOO_MANY_REQUESTS, "too many refusals; wait a minute")
            try:
                asked = json.loads(request.body)
                certificate = answer(asked, request)
            except SecurityError as error:
                refusals.count(request.peer)
                _LOG.warning("enrolment from %s refused: %s", request.peer, error)
                return _refuse(HTTPStatus.FORBIDDEN, str(error))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                refusals.count(request.peer)
                return _refuse(HTTPStatus.BAD_REQUEST, "the request is malformed")
            told = {
                "name": str(asked["name"]),
                "certificate": certificate.decode("ascii"),
                "signing_key": authority.signing_key,
                **dict(zip(("issued", "expires"), validity(certificate), strict=True)),
            }
            return Answer(body=json.dumps(told).encode())

        return handler

    server.add_get("/ca", lambda _: Answer(body=authority.ca.read_bytes(), type="application/x-pem-file"))
    server.add_post("/enrol", guarded(enrol))
    server.add_post("/renew", guarded(renew))


class _Refusals:
    """A bucket of refusals for each address: ten at once, then one in ten seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, float]] = {}

    def too_many(self, peer: str) -> bool:
        with self._lock:
            return self._level(peer) >= _REFUSALS

    def count(self, peer: str) -> None:
        with self._lock:
            if peer not in self._seen and len(self._seen) >= _MOST_PEERS:
                self._seen.clear()
            self._seen[peer] = (self._level(peer) + 1.0, self._clock())

    def _level(self, peer: str) -> float:
        level, at = self._seen.get(peer, (0.0, 0.0))
        return max(0.0, level - _REFUSALS_A_SECOND * (self._clock() - at))


def _refuse(status: int, reason: str) -> Answer:
    return Answer(status, json.dumps({"error": reason}).encode())
