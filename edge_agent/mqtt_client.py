"""The MQTT client with a buffer on its socket, in both directions.

paho-mqtt reads a packet in three or four system calls, waits for the socket again after each packet, and
writes each acknowledgement by itself. In a burst that is most of what a message costs. Here the bytes that
have arrived are read at once, a batch of packets is handled between two waits, and what they cause is
written together. Knows sockets and packets as bytes, not what they mean.
"""

from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import MQTTErrorCode

__all__ = ["BufferedClient", "BufferedSocket"]

_READ = 65536
_BATCH = 256


class BufferedSocket:
    """A socket that reads ahead, and that can hold back what is sent; non-blocking as the one it wraps.

    Args:
        sock: Plain or TLS.
    """

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._ahead = b""
        self._at = 0
        self._held = bytearray()
        self._corked = False

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped socket has."""
        return getattr(self._sock, name)

    def fileno(self) -> int:
        """Return the wrapped socket's descriptor, for ``select``."""
        return int(self._sock.fileno())

    def recv(self, size: int) -> bytes:
        """Return at most ``size`` bytes, none at the end; raise as the wrapped socket when none are there."""
        if self._at == len(self._ahead):
            self._ahead, self._at = self._sock.recv(max(size, _READ)), 0
        piece = self._ahead[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def ahead(self) -> int:
        """Return how many bytes were read and not yet asked for."""
        return len(self._ahead) - self._at

    def pending(self) -> int:
        """Return how many bytes can be had without waiting for the network."""
        below = getattr(self._sock, "pending", None)
        return self.ahead() + (0 if below is None else int(below()))

    def send(self, data: bytes) -> int:
        """Take data; return how much was taken."""
        if not self._corked and not self._held:
            return int(self._sock.send(data))
        self._held += data
        return len(data)

    def cork(self) -> None:
        """Hold back what is sent from now on."""
        self._corked = True

    def uncork(self) -> None:
        """Send what was held back; whatever the network does not take now stays for the next time.

        Raises:
            OSError: The connection is gone.
        """
        self._corked = False
        while self._held:
            try:
                sent = self._sock.send(self._held)
            except BlockingIOError:
                return
            del self._held[:sent]

    @property
    def holds(self) -> bool:
        """Whether something waits to be sent."""
        return bool(self._held)


class BufferedClient(mqtt.Client):
    """A paho client whose sockets are buffered; where a release makes them otherwise, it works as ever."""

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Handle the packets that have arrived, at most a batch of them."""
        for _ in range(_BATCH):
            code = super().loop_read(max_packets)
            sock = self._sock
            if code or not isinstance(sock, BufferedSocket) or not sock.ahead():
                return code
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def loop_write(self) -> MQTTErrorCode:
        """Write what waits, all packets together."""
        sock = self._sock
        if not isinstance(sock, BufferedSocket):
            return super().loop_write()
        sock.cork()
        code = super().loop_write()
        try:
            sock.uncork()
        except OSError:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        return code

    def want_write(self) -> bool:
        """Return whether something waits to be written."""
        sock = self._sock
        return super().want_write() or (isinstance(sock, BufferedSocket) and sock.holds)

    def _create_socket(self) -> Any:
        return BufferedSocket(super()._create_socket())
