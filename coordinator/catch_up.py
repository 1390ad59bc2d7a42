"""What late agents get: a snapshot in a message, one to be fetched, or a slice of the log; whichever is less.

Knows log, replica and checkpoint file. Does not know who asks, nor how an answer travels.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from coordinator.scalar_log import ScalarLog
from edge_agent.offer import Offer, encode_offer
from edge_agent.replay import Replica
from edge_agent.state import replica_bytes, save_replica
from edge_agent.wire import MAX_MESSAGE, RoundRecord, Slice, Snapshot, encode

__all__ = ["CatchUp"]

_OFFERS = 3
_SLICE_BYTES = 200_000
_SLICE_RECORDS = 512
_SLICE_BURST = 64.0
_SLICES_A_SECOND = 4.0


class CatchUp:
    """Answers agents that lack records.

    Args:
        log: Of the run.
        run: Its name.
        epoch: Of the coordinator.
        identities: of a family of bundles, the narrowest first and what is trained last, or of that alone.
        checkpoint: File for the replica; None keeps it in memory alone.
        web: Port of the web server that hands out the file, and whether it wants certificates; None for none.

    Attributes:
        stored: What can be fetched from the web server now.
    """

    def __init__(
        self,
        log: ScalarLog,
        *,
        run: str,
        epoch: int,
        identities: Sequence[str],
        checkpoint: Path | None,
        web: tuple[int, bool] | None,
    ) -> None:
        self.stored: Offer | None = None
        self._log = log
        self._run = run
        self._epoch = epoch
        self._identities = list(identities)
        self._checkpoint = checkpoint
        self._web = web
        self._snapshots: dict[int, tuple[int, bytes]] = {}  # by level: its round, the message
        self._offered: Counter[str] = Counter()
        self._tokens: dict[str, tuple[float, float]] = {}  # by agent: slices left, and when that was

    def take_snapshot(self, replica: Replica) -> None:
        """Keep the replica as it is, where a message can hold it and on the disk.

        Raises:
            StateError: The disk does not take it; the message is there all the same.
        """
        for level, identity in enumerate(self._identities):
            one = replica.at_level(level) if replica.stops else replica
            if one.weights.nbytes < MAX_MESSAGE:
                state = replica_bytes(one, bundle_identity=identity, run=self._run)
                message = encode(Snapshot(self._epoch, state))
                if len(message) <= MAX_MESSAGE:
                    self._snapshots[level] = (replica.round, message)
        if self._checkpoint is not None:
            save_replica(self._checkpoint, replica, bundle_identity=self._identities[-1], run=self._run)
            if self._web is not None:
                self.stored = self._offer(self._checkpoint, replica.round, self._web)
                self._offered.clear()

    def may_ask(self, name: str, now: float) -> bool:
        """Take a token from the agent's bucket, if there is one: a short question has a long answer."""
        tokens, at = self._tokens.get(name, (_SLICE_BURST, now))
        tokens = min(_SLICE_BURST, tokens + _SLICES_A_SECOND * (now - at))
        self._tokens[name] = (max(0.0, tokens - 1.0), now)
        return tokens >= 1.0

    def answer(self, name: str, first: int, *, level: int = -1) -> bytes:
        """Return what an agent gets that lacks the records from ``first`` on.

        An offer is made three times for each checkpoint: whoever cannot fetch it gets records in the end.

        Args:
            name: Of the agent.
            first: The round of the first record.
            level: Which width of a family it holds; the widest in place of -1.
        """
        widest = len(self._identities) - 1
        level = widest if level < 0 else level
        round_, snapshot = self._snapshots.get(level, (0, b""))
        if first < round_ and len(snapshot) < self._log.bytes_between(first, round_):
            return snapshot
        stored = self.stored if level == widest else None
        if stored is not None and first < stored.round and self._offered[name] < _OFFERS:
            saves = stored.size < self._log.bytes_between(first, stored.round)
            if saves:
                self._offered[name] += 1
                return encode_offer(stored)
        records: list[RoundRecord] = []
        size = 0
        for record in self._log.records(first, first + _SLICE_RECORDS):
            records.append(record)
            size += 64 + record.scalars.nbytes
            if size >= _SLICE_BYTES:
                break
        return encode(Slice(self._epoch, first, tuple(records)))

    def _offer(self, path: Path, round_: int, web: tuple[int, bool]) -> Offer:
        told = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                told.update(piece)
            return Offer(self._epoch, round_, file.tell(), *web, told.digest())
