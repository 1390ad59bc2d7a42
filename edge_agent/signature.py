"""Ed25519 signatures (RFC 8032), checked with as little memory as a board allows.

The OpenSSL that Python's own ``ssl`` brings along is asked directly; where it cannot be found, a short-lived
process with the package ``cryptography`` answers instead, so that the agent never holds it. Only checks:
nothing here can sign. What is signed is told apart by a context in front of it.
"""

import ctypes
import functools
import subprocess
import sys

from profiles.errors import SecurityError

__all__ = ["is_signed", "main", "openssl"]

_ED25519 = 1087  # NID_ED25519, openssl/obj_mac.h
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
_PATIENCE_S = 60.0


def is_signed(message: bytes, signature: bytes, *, key: bytes) -> bool:
    """Return whether ``signature`` is that of ``message`` by the owner of ``key``.

    Args:
        message: Any bytes.
        signature: 64 bytes; another length is no signature.
        key: The public key, 32 bytes.

    Raises:
        SecurityError: Neither OpenSSL nor ``cryptography`` can be used here.
    """
    if len(key) != _KEY_BYTES:
        raise ValueError(f"an Ed25519 key has {_KEY_BYTES} bytes, not {len(key)}")
    if len(signature) != _SIGNATURE_BYTES:
        return False
    library = openssl()
    if library is None:
        return _ask_child(message, signature, key)
    own = library.EVP_PKEY_new_raw_public_key(_ED25519, None, key, len(key))
    context = library.EVP_MD_CTX_new()
    try:
        return bool(
            own
            and context
            and library.EVP_DigestVerifyInit(context, None, None, None, own) == 1
            and library.EVP_DigestVerify(context, signature, len(signature), message, len(message)) == 1
        )
    finally:
        library.EVP_MD_CTX_free(context)
        library.EVP_PKEY_free(own)


@functools.cache
def openssl() -> ctypes.CDLL | None:
    """Return OpenSSL's library of cryptography, 1.1.1 or newer, or None if there is none to be had."""
    names = []
    try:
        import _ssl

        names.append(getattr(_ssl, "__file__", ""))  # what it is linked with is found through it
    except ImportError:
        pass
    names += ["libcrypto-3"] if sys.platform == "win32" else []
    names += ["libcrypto.so.3", "libcrypto.so.1.1"] if sys.platform == "linux" else []
    for name in filter(None, names):
        try:
            library = ctypes.CDLL(name)
            for function, result, *arguments in _FUNCTIONS:
                getattr(library, function).restype = result
                getattr(library, function).argtypes = arguments
        except (OSError, AttributeError):
            continue
        return library
    return None


_POINTER, _BYTES, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
_FUNCTIONS = (
    ("EVP_PKEY_new_raw_public_key", _POINTER, ctypes.c_int, _POINTER, _BYTES, _SIZE),
    ("EVP_MD_CTX_new", _POINTER),
    ("EVP_DigestVerifyInit", ctypes.c_int, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    ("EVP_DigestVerify", ctypes.c_int, _POINTER, _BYTES, _SIZE, _BYTES, _SIZE),
    ("EVP_MD_CTX_free", None, _POINTER),
    ("EVP_PKEY_free", None, _POINTER),
)


def _ask_child(message: bytes, signature: bytes, key: bytes) -> bool:
    command = [sys.executable, "-m", "edge_agent.signature"]
    try:
        done = subprocess.run(
            command, input=key + signature + message, capture_output=True, timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SecurityError(f"A signature cannot be checked: {error}.") from None
    if done.returncode not in (0, 1):
        raise SecurityError(
            "A signature cannot be checked: neither this Python's OpenSSL nor cryptography can be used.",
            hint="Install the package cryptography beside the agent.",
        )
    return done.returncode == 0


def main() -> int:
    """Check what comes on standard input (key, signature, message); return 0 if it is signed, 1 if not."""
    given = sys.stdin.buffer.read()
    key, signature, message = given[:32], given[32:96], given[96:]
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return 3
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
