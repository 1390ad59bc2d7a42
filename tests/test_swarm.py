"""Tests of scalarfed swarm: protocol-true agents, over a real broker."""

import pytest

from coordinator.broker import find_mosquitto
from coordinator.swarm import Load, run_swarm
from coordinator.swarm_agents import packet, split
from profiles.errors import ConfigError


def test_packets_are_split_as_they_were_joined():
    """Lengths of one to three bytes, whole and cut anywhere, come back as kind, flags and body."""
    sent = [(3, 2, b"x" * size) for size in (0, 1, 127, 128, 16_383, 16_384)]
    data = b"".join(packet(kind, body, flags) for kind, flags, body in sent)
    found, left = [], b""
    for start in range(0, len(data), 1000):
        more, left = split(left + data[start : start + 1000])
        found += more
    assert found == sent
    assert left == b""


def test_a_swarm_loses_no_reply():
    """Thirty agents answer five rounds over a real broker; every reply is counted, the keys are there."""
    result = run_swarm(Load(30, 5, 60.0))
    assert result["rounds"] == 5
    assert result["replies_lost"] == 0
    assert result["connections_broken"] == 0
    assert 0 < result["p50_ms"] <= result["p99_ms"]
    assert result["coordinator_rss_mib"] > 10
    assert result["broker"].startswith(("mosquitto", "amqtt"))


@pytest.mark.parametrize("load", [Load(0, 5), Load(5, 0), Load(50_000, 5), Load(5, 50_000)])
def test_a_swarm_is_bounded(load):
    """Neither no agents nor an endless load."""
    with pytest.raises(ConfigError, match="at most"):
        run_swarm(load)


def test_a_swarm_stays_on_this_machine():
    """Another machine's broker is loaded only when that is said."""
    with pytest.raises(ConfigError, match="not this machine"):
        run_swarm(Load(5, 5), broker_url="mqtt://192.0.2.1:1883")


@pytest.mark.slow
@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_five_thousand_agents_lose_no_reply():
    """A coordinator of five thousand stays below 250 MiB and counts every reply at the first announcement."""
    result = run_swarm(Load(5000, 10, 200.0))
    assert result["rounds"] == 10
    assert result["replies_lost"] == 0
    assert result["coordinator_rss_mib"] <= 250
