"""The coordinator's offer of a snapshot that is too large for a message: where it is, and its hash.

The host is the broker's, the scheme follows from the agent's own credentials: an offer can lead nowhere else.
"""

import struct
from dataclasses import dataclass

from edge_agent.wire import WIRE_VERSION
from profiles.errors import WireError

__all__ = ["Offer", "decode_offer", "encode_offer", "is_offer"]

_KIND_OFFER = 9
_OFFER = struct.Struct("<BBHIQHB32s")


@dataclass(frozen=True)
class Offer:
    """A snapshot that can be fetched.

    Attributes:
        epoch: Of the coordinator.
        round: At which the replica stands.
        size: Of the file, bytes.
        port: Of the web server on the broker's machine.
        secured: HTTPS.
        sha256: Of the file.
    """

    epoch: int
    round: int
    size: int
    port: int
    secured: bool
    sha256: bytes

    def url(self, host: str) -> str:
        """Return where the file is."""
        shown = f"[{host}]" if ":" in host else host
        return f"{'https' if self.secured else 'http'}://{shown}:{self.port}/snapshots/{self.sha256.hex()}"


def is_offer(payload: bytes) -> bool:
    """Return whether bytes claim to be an offer."""
    return len(payload) > 1 and payload[1] == _KIND_OFFER


def encode_offer(offer: Offer) -> bytes:
    """Return the bytes of an offer: 51."""
    rest = (offer.round, offer.size, offer.port, offer.secured, offer.sha256)
    return _OFFER.pack(WIRE_VERSION, _KIND_OFFER, offer.epoch, *rest)


def decode_offer(data: bytes) -> Offer:
    """Return the offer that ``data`` holds.

    Raises:
        WireError: The bytes are not exactly one offer of this version.
    """
    if len(data) != _OFFER.size:
        raise WireError(f"an offer has {_OFFER.size} bytes, not {len(data)}")
    version, kind, epoch, round_, size, port, secured, sha256 = _OFFER.unpack(data)
    if (version, kind) != (WIRE_VERSION, _KIND_OFFER) or secured > 1 or not port or not size:
        raise WireError("an offer of another version, or of nothing")
    return Offer(epoch, round_, size, port, bool(secured), sha256)
