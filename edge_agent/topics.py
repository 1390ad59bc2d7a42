"""The topics of a run, on both sides.

``<namespace>/<run>/`` and then: ``r/<shard>`` the open round, retained · ``u/<shard>/<agent>`` replies ·
``st/<agent>`` presence, retained, last will · ``q/<agent>`` asks for a slice of the log ·
``a/<agent>`` answers · ``p/<collector>`` many replies in one · ``c/<agent>`` commands to a board ·
``ctl`` configuration of the run, retained.
"""

import re
import zlib
from dataclasses import dataclass

__all__ = ["Topics", "is_name", "shard_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def is_name(text: str) -> bool:
    """Return whether ``text`` can name an agent or a run: 1 to 63 letters, digits, dots, - or _."""
    return _NAME.fullmatch(text) is not None


def shard_of(agent: str, shards: int) -> int:
    """Return the shard of an agent, the same on every machine and for the whole life of a run."""
    return zlib.crc32(agent.encode()) % shards


@dataclass(frozen=True)
class Topics:
    """The topics of one run."""

    namespace: str
    run: str

    @property
    def base(self) -> str:
        """What all topics of the run begin with."""
        return f"{self.namespace}/{self.run}/"

    @property
    def control(self) -> str:
        """Configuration of the run, retained."""
        return f"{self.base}ctl"

    def round(self, shard: int) -> str:
        """Return where the open round of a shard is announced."""
        return f"{self.base}r/{shard}"

    def reply(self, shard: int, agent: str) -> str:
        """Return where an agent replies."""
        return f"{self.base}u/{shard}/{agent}"

    def pack(self, collector: int) -> str:
        """Return where a collector hands up replies to the coordinator."""
        return f"{self.base}p/{collector}"

    def status(self, agent: str) -> str:
        """Return where an agent says how it is."""
        return f"{self.base}st/{agent}"

    def request(self, agent: str) -> str:
        """Return where an agent asks for records."""
        return f"{self.base}q/{agent}"

    def answer(self, agent: str) -> str:
        """Return where an agent gets the records that it asked for."""
        return f"{self.base}a/{agent}"

    def command(self, agent: str) -> str:
        """Return where an operator tells a board what to do."""
        return f"{self.base}c/{agent}"

    def is_coordinators(self, topic: str) -> bool:
        """Return whether a topic of the run is one on which only the coordinator speaks."""
        rest = topic.removeprefix(self.base)
        return rest != topic and (rest == "ctl" or rest.startswith(("r/", "a/")))
