"""A key with every other agent, from their public keys alone: X25519.

Needs the package ``cryptography``, which a board has only where its run masks replies; imported when a key is
made. Knows keys, not what they are for.

Source: Langley et al., RFC 7748, 2016.
"""

import hashlib
from typing import Any

from profiles.errors import ConfigError

__all__ = ["PrivateKey"]


class PrivateKey:
    """An agent's key pair, made anew for each process.

    Attributes:
        public: 32 bytes, for all to know.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self) -> None:
        try:
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        except ImportError:
            raise ConfigError(
                "masked replies need the package cryptography, and it is not installed",
                hint="Install it on the board: pip install 'scalarfed[masks]'.",
            ) from None
        self._key: Any = X25519PrivateKey.generate()
        self.public = bytes(self._key.public_key().public_bytes_raw())

    def agree(self, public: bytes, context: bytes) -> bytes:
        """Return the 32 bytes that only the owner of ``public`` and this key's owner know.

        Args:
            public: The other's public key, 32 bytes.
            context: What the key is for; another context gives another key.

        Raises:
            ValueError: The other key is none.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        shared = self._key.exchange(X25519PublicKey.from_public_bytes(public))
        both = b"".join(sorted((self.public, public)))
        return hashlib.blake2b(both + context, key=shared, digest_size=32).digest()
