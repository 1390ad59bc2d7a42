"""The amqtt broker as a program of its own: ``python -m coordinator.broker_amqtt PORT``.

For demonstrations where no mosquitto is installed. Knows how to run amqtt on the loopback for anybody on this
machine. Does not know who started it.
"""

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker

__all__ = ["main", "serve"]


async def serve(port: int) -> None:
    """Run the broker on 127.0.0.1 until SIGTERM or Ctrl-C."""
    stop = asyncio.Event()
    if sys.platform != "win32":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
    )
    await broker.start()
    await stop.wait()
    await broker.shutdown()


def main() -> None:
    """Serve the port given as the only argument."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(int(sys.argv[1])))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
