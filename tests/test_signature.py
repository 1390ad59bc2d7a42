"""Tests of edge_agent.signature and edge_agent.seal: by RFC 8032's vectors, and by an independent signer."""

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent import signature
from edge_agent.link import Connected, MemoryBroker, MemoryLink, Message
from edge_agent.seal import SEAL_BYTES, HearingLink, SayingLink, open_sealed, seal
from edge_agent.signature import is_signed, openssl
from edge_agent.topics import Topics

ROOT = Path(__file__).parent.parent
TOPICS = Topics("scalarfed", "run")
# RFC 8032, section 7.1, tests 1 to 3: public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd"
        "25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c3"
        "87b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594"
        "a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.fixture(params=["openssl", "child"])
def way(request, monkeypatch) -> str:
    """Check signatures by OpenSSL, and by the process that stands in where it cannot be found."""
    if request.param == "child":
        monkeypatch.setattr(signature, "openssl", lambda: None)
    elif openssl() is None:
        pytest.skip("this Python's OpenSSL cannot be asked directly")
    return str(request.param)


@pytest.mark.parametrize(("key", "message", "signed"), VECTORS)
def test_published_signatures_hold(way, key, message, signed):
    """The signatures that RFC 8032 prints are signatures of its messages by its keys, and of no others."""
    key, message, signed = bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signed)

    assert is_signed(message, signed, key=key)
    assert not is_signed(message + b"\0", signed, key=key)
    assert not is_signed(message, signed[:-1], key=key)
    assert not is_signed(message, signed[:5] + bytes([signed[5] ^ 1]) + signed[6:], key=key)


def test_the_agent_checks_without_the_package():
    """Where Python's OpenSSL is at hand, a check loads neither cryptography nor a further process."""
    if openssl() is None:
        pytest.skip("this Python's OpenSSL cannot be asked directly")
    key, message, signed = (bytes.fromhex(text) for text in VECTORS[1])
    script = (
        "import subprocess, sys; subprocess.run = subprocess.Popen = None\n"
        "from edge_agent.signature import is_signed\n"
        f"print(is_signed({message!r}, {signed!r}, key={key!r}), 'cryptography' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["True", "False"]


class Fleet:
    """A coordinator and an agent with sealed links over one broker in memory, and a bare link beside them."""

    def __init__(self, memory: Path | None = None) -> None:
        self.own = Ed25519PrivateKey.generate()
        self.key = self.own.public_key().public_bytes_raw()
        self.broker = MemoryBroker()
        self.numbers = count(100)
        self.coordinator = SayingLink(
            MemoryLink(self.broker), TOPICS, sign=self.own.sign, key=self.key, numbers=self.numbers
        )
        self.stranger = MemoryLink(self.broker)
        self.memory = memory
        self.agent = self.start_agent()

    def start_agent(self) -> HearingLink:
        """Return an agent's link, as after a restart."""
        agent = HearingLink(MemoryLink(self.broker), TOPICS, key=self.key, memory=self.memory)
        for topic in (TOPICS.control, TOPICS.round(0), TOPICS.answer("pi-1"), TOPICS.base + "c/pi-1"):
            agent.subscribe(topic)
        assert agent.receive(0) == Connected()
        return agent

    def heard(self, agent: HearingLink | None = None) -> list[bytes]:
        """Return the payloads that an agent was given."""
        found = []
        while isinstance(event := (agent or self.agent).receive(0.0 + 1e-3), Message):
            found.append(event.payload)
        return found


def test_what_the_coordinator_says_is_heard():
    """A sealed message arrives as it was said, 72 bytes longer on the way; the coordinator reads it too."""
    fleet = Fleet()
    fleet.coordinator.subscribe(TOPICS.control)
    fleet.coordinator.publish(TOPICS.control, b"running", retain=True)

    assert fleet.heard() == [b"running"]
    assert len(fleet.broker.retained[TOPICS.control]) == len(b"running") + SEAL_BYTES
    assert fleet.coordinator.receive(0) == Connected()
    assert fleet.coordinator.receive(0) == Message(TOPICS.control, b"running")


@pytest.mark.parametrize("topic", [TOPICS.control, TOPICS.round(0), TOPICS.answer("pi-1")])
def test_what_another_says_is_not_heard(topic):
    """On the coordinator's topics an agent hears no unsigned message and none of another's key."""
    fleet, other = Fleet(), Ed25519PrivateKey.generate()
    fleet.stranger.publish(topic, b"stop")
    fleet.stranger.publish(topic, b"stop" + bytes(SEAL_BYTES))
    fleet.stranger.publish(topic, seal(topic, b"stop", number=1 << 40, sign=other.sign))

    assert fleet.heard() == []
    assert fleet.agent.dropped["not signed"] == 3


def test_a_changed_message_is_not_heard():
    """One changed bit anywhere in a sealed message, its number and signature included, is noticed."""
    fleet = Fleet()
    sealed = seal(TOPICS.control, b"running", number=5, sign=fleet.own.sign)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        assert open_sealed(TOPICS.control, bytes(changed), key=fleet.key) is None

    assert open_sealed(TOPICS.control, sealed, key=fleet.key) == (b"running", 5)


def test_a_message_counts_on_its_own_topic():
    """What was said on one topic, or in one run, is not heard on another."""
    fleet = Fleet()
    sealed = seal(TOPICS.answer("pi-2"), b"records", number=5, sign=fleet.own.sign)
    fleet.stranger.publish(TOPICS.answer("pi-1"), sealed)

    assert fleet.heard() == []


def test_an_old_message_is_not_heard_again():
    """A message that was recorded and is played again after a newer one changes nothing."""
    fleet = Fleet()
    fleet.coordinator.publish(TOPICS.control, b"stopped", retain=True)
    old = fleet.broker.retained[TOPICS.control]
    fleet.coordinator.publish(TOPICS.control, b"running", retain=True)
    fleet.stranger.publish(TOPICS.control, old)

    assert fleet.heard() == [b"stopped", b"running"]
    assert fleet.agent.dropped["signed, but older than what was heard"] == 1


def test_a_repeat_of_the_newest_is_heard():
    """The broker may deliver the newest message twice, as it does after a reconnection."""
    fleet = Fleet()
    fleet.coordinator.publish(TOPICS.control, b"running", retain=True)
    fleet.stranger.publish(TOPICS.control, fleet.broker.retained[TOPICS.control])

    assert fleet.heard() == [b"running", b"running"]


def test_an_agent_remembers_over_a_restart(tmp_path):
    """An old control message is not heard either by an agent that was started anew."""
    fleet = Fleet(tmp_path / "heard.json")
    fleet.coordinator.publish(TOPICS.control, b"stopped", retain=True)
    old = fleet.broker.retained[TOPICS.control]
    fleet.coordinator.publish(TOPICS.control, b"running", retain=True)
    assert fleet.heard() == [b"stopped", b"running"]

    again = fleet.start_agent()
    fleet.stranger.publish(TOPICS.control, old)

    assert fleet.heard(again) == [b"running"]


def test_commands_that_bring_their_own_proof_pass():
    """A topic that is not the coordinator's own is left to whoever reads it."""
    fleet = Fleet()
    fleet.stranger.publish(TOPICS.base + "c/pi-1", b"an offer with a signature of its own")

    assert fleet.heard() == [b"an offer with a signature of its own"]


def test_a_forgery_comes_back_to_the_coordinator_as_it_is():
    """The coordinator sees that somebody else spoke: a forged announcement is not taken for its own."""
    fleet = Fleet()
    fleet.coordinator.subscribe(TOPICS.base + "#")
    assert fleet.coordinator.receive(0) == Connected()
    fleet.stranger.publish(TOPICS.round(0), b"forged")
    fleet.stranger.publish(TOPICS.reply(0, "pi-1"), b"an agent's reply")

    assert fleet.coordinator.receive(0) == Message(TOPICS.round(0), b"forged")
    assert fleet.coordinator.receive(0) == Message(TOPICS.reply(0, "pi-1"), b"an agent's reply")


def test_forgetting_is_not_sealed():
    """An empty retained message, by which a broker forgets, stays empty."""
    fleet = Fleet()
    fleet.coordinator.publish(TOPICS.control, b"running", retain=True)
    fleet.coordinator.publish(TOPICS.control, b"", retain=True)

    assert TOPICS.control not in fleet.broker.retained
