"""How this machine's tools reach boards and brokers: as the operator, with a certificate of the authority.

Knows the authority's folder and TLS settings. Does not know what is said over the connection.
"""

import ssl
import time
from collections.abc import Callable

from coordinator.authority import OPERATOR, Authority, Identity, default_folder
from coordinator.enrolment import server_context
from edge_agent.credentials import client_context

__all__ = ["operator_tls", "server_tls"]

_KEPT_S = 30 * 86400.0


def operator_tls(broker: str) -> ssl.SSLContext | None:
    """Return TLS settings for a broker, or None where its address begins with mqtt://.

    Raises:
        SecurityError: This user has no authority, so that no broker of a fleet would let it in.
    """
    if not broker.startswith("mqtts://"):
        return None
    authority = Authority(default_folder())
    identity = Identity(authority.folder / "operator.crt", authority.folder / "operator.key")
    try:
        fresh = time.time() - identity.certificate.stat().st_mtime < _KEPT_S and identity.key.is_file()
    except OSError:
        fresh = False
    if not fresh:
        identity = authority.role_identity(OPERATOR)
    return client_context(authority.ca, identity.certificate, identity.key)


def server_tls(broker: str, address: str) -> Callable[[], ssl.SSLContext] | None:
    """Return what a web server beside that broker shows, or None beside one without TLS.

    Args:
        broker: Of the boards that will ask the server.
        address: Under which they ask it.
    """
    if not broker.startswith("mqtts://"):
        return None
    authority = Authority(default_folder())
    identity = authority.server_identity([address])
    return lambda: server_context(authority, identity)
