"""The agent's side of a masked round: puts its replies under masks, and tells afterwards what undoes them.

Stands between the state machine (``agent``) and the link. Tells the undoing once a round: to another cohort
or another set of survivors it keeps silent, since two sums that differ by one agent would show that agent.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from edge_agent.masked_wire import MaskedReply, Unmask, Unmasked
from edge_agent.masking import Masked, majority, mask, open_share, session_of, tell_masks, to_fixed
from edge_agent.wire import Reply, RoundOpen

__all__ = ["Key", "Veil"]

_FEWEST = 3


class Key(Protocol):
    """What agrees on a key with every other agent; see ``agreement.PrivateKey``."""

    public: bytes

    def agree(self, public: bytes, context: bytes) -> bytes:
        """Return what both owners know."""


class Veil:
    """Masks the replies of one agent.

    Args:
        run: Name of the run.
        key: The agent's.
        secret: Returns so many random bytes that nobody can guess.

    Attributes:
        dropped: Count of requests that got no answer, by reason.
    """

    def __init__(self, run: str, key: Key, secret: Callable[[int], bytes]) -> None:
        self.dropped: Counter[str] = Counter()
        self._run = run
        self._key = key
        self._secret = secret
        self._public: dict[int, bytes] = {}
        self._pairs: dict[bytes, bytes] = {}
        self._sent: tuple[MaskedReply, Masked, dict[int, bytes], int] | None = None
        self._told: tuple[int, frozenset[int], Unmasked] | None = None

    @property
    def public(self) -> bytes:
        """The agent's public key."""
        return self._key.public

    def on_control(self, control: Mapping[str, Any]) -> None:
        """Take in the public keys of the fleet; a malformed list changes nothing."""
        try:
            keys = [bytes.fromhex(key) for key in control["keys"]]
        except (KeyError, TypeError, ValueError):
            return
        self._public = {number: key for number, key in enumerate(keys) if len(key) == 32}

    def cover(self, reply: Reply, opened: RoundOpen, number: int) -> MaskedReply | None:
        """Return a reply under masks; None where a key is missing or the cohort is too small to hide in.

        Args:
            reply: With scalars.
            opened: What it answers.
            number: The agent's.
        """
        members = self._public.keys() if opened.cohort.members is None else opened.cohort.members
        keys = {member: self._public[member] for member in members if member in self._public}
        if len(keys) < max(_FEWEST, len(members)) or keys.get(number) != self.public:
            self.dropped["a key is missing"] += 1
            return None
        session = session_of(self._run, reply.round, keys)
        if self._sent is None or self._sent[0].session != session:
            pairs = {member: self._pair(key) for member, key in keys.items() if member != number}
            vector = to_fixed(np.append(reply.scalars, np.float32(reply.loss)), reply.samples)
            masked = mask(vector, agent=number, session=session, keys=pairs, secret=self._secret)
            message = MaskedReply(
                epoch=reply.epoch,
                round=reply.round,
                session=session,
                attempt=reply.attempt,
                samples=reply.samples,
                peak_kib=reply.peak_kib,
                digest=reply.digest,
                values=masked.values,
                shares=masked.shares,
            )
            self._sent = (message, masked, pairs, number)
        return replace(self._sent[0], epoch=reply.epoch, attempt=reply.attempt, peak_kib=reply.peak_kib)

    def tell(self, request: Unmask) -> Unmasked | None:
        """Return what undoes the masks of those who answered; None where that would say too much."""
        if self._sent is None or self._sent[0].session != request.session:
            self.dropped["another session"] += 1
            return None
        sent, masked, pairs, number = self._sent
        if self._told is not None and self._told[0] == sent.round:
            if self._told[1] != request.survivors or self._told[2].session != request.session:
                self.dropped["asked twice for different sums"] += 1
                return None
            return replace(self._told[2], epoch=request.epoch)
        members = {number, *pairs}
        fewest = max(_FEWEST, majority(len(members)))
        if number not in request.survivors or not request.survivors <= members:
            self.dropped["survivors of another cohort"] += 1
            return None
        if len(request.survivors) < fewest:
            self.dropped["too few to hide among"] += 1
            return None
        shares = {number: masked.own_share}
        for other, sealed in request.shares.items():
            if other in request.survivors and other in pairs:
                share = open_share(sealed, pairs[other], sent.session, sender=other, receiver=number)
                if share is not None:
                    shares[other] = share
        missing = members - request.survivors
        count = sent.values.size if missing else 0
        values = tell_masks(number, missing, pairs, sent.session, count)
        answer = Unmasked(request.epoch, sent.round, sent.session, values, shares)
        self._told = (sent.round, request.survivors, answer)
        return answer

    def _pair(self, public: bytes) -> bytes:
        if public not in self._pairs:
            self._pairs[public] = self._key.agree(public, self._run.encode())
        return self._pairs[public]
