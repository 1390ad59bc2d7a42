"""A loopback MQTT proxy that cuts, delays, repeats and reorders what passes through it.

Knows MQTT 3.1.1 packets as far as their length and kind. Lives in a thread of its own with one event loop;
the methods may be called from any other thread.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["FaultProxy"]

_PUBLISH = 3
_DUPLICATE_FLAG = 0x08


class FaultProxy:
    """Passes every connection on to one port of this machine.

    Args:
        target: Port of the broker.
        seed: Decides what a fault hits.

    Attributes:
        port: Where to connect.
        done: How many packets were duplicated, delayed or reordered, and connections cut.
    """

    def __init__(self, target: int, *, seed: int) -> None:
        self.port = 0
        self.done: Counter[str] = Counter()
        self._target = target
        self._random = random.Random(seed)
        self._until: dict[str, float] = {}
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._listen()).result(10)

    def disturb(self, kind: str, seconds: float) -> None:
        """Let packets be hit for a while: ``duplicate``, ``delay`` or ``reorder``."""
        self._until[kind] = time.monotonic() + seconds

    def cut(self, *, share: float) -> None:
        """Cut a share of the connections, without a word."""
        self._run(self._cut(share)).result(10)

    def close(self) -> None:
        """Cut everything and stop listening."""
        self.cut(share=1.0)
        self._server.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _run(self, work: Awaitable[None]) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self, share: float) -> None:
        alive = [writer for writer in self._writers if not writer.is_closing()]
        for writer in alive:
            if self._random.random() < share:
                writer.transport.abort()
                self.done["cut"] += 1
        self._writers = [writer for writer in self._writers if not writer.is_closing()]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: list[bytes] = []

        def send(packet: bytes) -> None:
            if not writer.is_closing():
                writer.write(packet)

        def release() -> None:
            while held:
                send(held.pop())

        try:
            while True:
                packet = await _read_packet(reader)
                self._fate(packet, send, held, release)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    def _fate(
        self, packet: bytes, send: Callable[[bytes], None], held: list[bytes], release: Callable[[], Any]
    ) -> None:
        now = time.monotonic()
        is_message = packet[0] >> 4 == _PUBLISH
        active = {kind for kind, until in self._until.items() if now < until} if is_message else set()
        if "delay" in active and self._random.random() < 0.5:
            self.done["delay"] += 1
            self._loop.call_later(self._random.uniform(0.05, 1.5), send, packet)
            return
        if "reorder" in active and not held:
            self.done["reorder"] += 1
            held.append(packet)  # the next packet overtakes it
            self._loop.call_later(0.3, release)
            return
        send(packet)
        if "duplicate" in active:
            self.done["duplicate"] += 1
            send(bytes([packet[0] | _DUPLICATE_FLAG]) + packet[1:])
        release()


async def _read_packet(reader: asyncio.StreamReader) -> bytes:
    """Return one MQTT packet; section 2.2.3 of the standard tells its length."""
    head = bytearray(await reader.readexactly(1))
    length = 0
    for shift in (0, 7, 14, 21):
        head += await reader.readexactly(1)
        length |= (head[-1] & 0x7F) << shift
        if not head[-1] & 0x80:
            return bytes(head) + await reader.readexactly(length)
    raise ValueError("a packet's length has more than four bytes")
