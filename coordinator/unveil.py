"""The coordinator's side of a masked round: collects masked replies, asks for what undoes them, sums.

Knows messages and vectors. Does not know who is waited for, nor when a round is over (``rounds``).
"""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_agent.masked_wire import MaskedReply, Unmask, Unmasked, decode_masked, encode_masked
from edge_agent.masking import LARGEST, combine, from_fixed, majority, session_of
from edge_agent.wire import Reply, RoundOpen
from profiles.errors import WireError

__all__ = ["Unveiling", "Veils"]

_KEY_HEX = re.compile("[0-9a-f]{64}")


class Unveiling:
    """One masked round.

    Args:
        run: Name of the run.
        round_: Its number.
        epoch: Of the coordinator.
        keys: Public keys of the cohort, by agent number.
        scalars: How many scalars a reply has.
    """

    def __init__(self, run: str, round_: int, *, epoch: int, keys: Mapping[int, bytes], scalars: int) -> None:
        self.round = round_
        self._epoch = epoch
        self._keys = dict(keys)
        self._scalars = scalars
        self._session = session_of(run, round_, keys)
        self._replies: dict[int, MaskedReply] = {}
        self._survivors: frozenset[int] = frozenset()
        self._told: dict[int, Unmasked] = {}

    @property
    def session(self) -> bytes:
        """What names the cohort with its keys in this round."""
        return self._session

    def stand_in(self, agent: int, message: MaskedReply) -> Reply | None:
        """Return a reply with zeros for scalars, by which rounds know that an agent has answered.

        None if it was masked for another session, or has not the shares and values that it must have.
        """
        others = self._keys.keys() - {agent}
        fits = message.session == self._session and message.shares.keys() == others
        if agent not in self._keys or not fits or message.values.size != self._scalars + 1:
            return None
        self._replies.setdefault(agent, message)
        return Reply(
            epoch=message.epoch,
            round=message.round,
            attempt=message.attempt,
            samples=message.samples,
            loss=0.0,
            peak_kib=message.peak_kib,
            digest=message.digest,
            scalars=np.zeros(self._scalars, np.float32),
        )

    def requests(self, survivors: frozenset[int]) -> dict[int, Unmask]:
        """Return what to ask whom, once it is clear who answered; again for those who have not told yet."""
        self._survivors = survivors
        return {
            agent: Unmask(
                self._epoch,
                self.round,
                self._session,
                survivors,
                {other: self._replies[other].shares[agent] for other in survivors if other != agent},
            )
            for agent in sorted(survivors - self._told.keys())
        }

    def take(self, agent: int, message: Unmasked) -> bool:
        """Take in what a survivor told; return whether it belongs."""
        wanted = self._scalars + 1 if len(self._survivors) < len(self._keys) else 0
        fits = message.session == self._session and message.values.size == wanted
        if agent not in self._survivors or not fits or not message.shares.keys() <= self._survivors:
            return False
        self._told.setdefault(agent, message)
        return True

    def total(self) -> tuple[NDArray[np.float32], float] | None:
        """Return the mean scalars and the mean loss over all samples, None where more must be told first.

        Raises:
            ValueError: Somebody told a wrong share or mask: what comes out is chance.
        """
        needed = majority(len(self._keys))
        everybody = len(self._survivors) == len(self._keys)
        shares = {
            agent: {teller: told.shares[agent] for teller, told in self._told.items() if agent in told.shares}
            for agent in self._survivors
        }
        if not shares or min(map(len, shares.values())) < needed:
            return None
        if not everybody and self._told.keys() != self._survivors:
            return None
        masks = {} if everybody else {agent: told.values for agent, told in self._told.items()}
        values = {agent: self._replies[agent].values for agent in self._survivors}
        total = combine(values, masks, shares, self._session, needed)
        mean = from_fixed(total, sum(self._replies[agent].samples for agent in self._survivors))
        if not np.all(np.abs(mean) <= LARGEST):
            raise ValueError("the masks do not come off: an agent told what is not true")
        return mean[:-1], float(mean[-1])


class Veils:
    """The masked rounds of a run, one after the other.

    Args:
        run: Name of the run.
        agents: How many there are.
    """

    def __init__(self, run: str, agents: int) -> None:
        self._run = run
        self._keys: list[bytes] = [b""] * agents
        self._now: Unveiling | None = None

    @property
    def round(self) -> int:
        """The round that is open, -1 before the first."""
        return -1 if self._now is None else self._now.round

    def keys(self) -> list[str]:
        """Return all public keys as they stand in the control message."""
        return [key.hex() for key in self._keys]

    def learn(self, agent: int, key: str) -> bool:
        """Take in an agent's public key, hexadecimal; return whether it is another one than before."""
        if not _KEY_HEX.fullmatch(key) or self._keys[agent].hex() == key:
            return False
        self._keys[agent] = bytes.fromhex(key)
        return True

    def open(self, message: RoundOpen) -> None:
        """Take in that a round was announced; a second announcement of the same changes nothing."""
        if message.closing:
            return
        members = message.cohort.members or range(len(self._keys))
        keys = {agent: self._keys[agent] for agent in members}
        scalars = message.plan.steps * message.plan.scalars
        made = Unveiling(self._run, message.plan.round, epoch=message.epoch, keys=keys, scalars=scalars)
        if self._now is None or made.session != self._now.session:
            self._now = made

    def take(self, agent: int, payload: bytes) -> Reply | None:
        """Take in a masked message; return a stand-in for a reply, None for what undoes masks.

        Raises:
            WireError: It is neither, or belongs to another cohort, keys or set of survivors.
        """
        message = decode_masked(payload)
        if isinstance(message, MaskedReply) and self._now is not None:
            if reply := self._now.stand_in(agent, message):
                return reply
        elif isinstance(message, Unmasked) and self._now is not None and self._now.take(agent, message):
            return None
        raise WireError("masked for another cohort, or with other keys")

    def requests(self, survivors: frozenset[int]) -> dict[int, bytes]:
        """Return what to send whom to undo the masks; see :meth:`Unveiling.requests`."""
        if self._now is None:
            return {}
        return {agent: encode_masked(request) for agent, request in self._now.requests(survivors).items()}

    def total(self) -> tuple[NDArray[np.float32], float] | None:
        """Return the mean, if it is known; see :meth:`Unveiling.total`."""
        return None if self._now is None else self._now.total()
