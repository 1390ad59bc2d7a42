"""Checkpoints: a coordinator starts from one that its log bears out, and from the bundle otherwise."""

import json

import pytest
from made_run import make_replayable_run

from coordinator.cli import main
from coordinator.rebuild import CHECKPOINT, rebuild, resume_replica
from coordinator.scalar_log import ScalarLog
from edge_agent.bundle import read_bundle
from edge_agent.state import save_replica


@pytest.fixture
def made(tmp_path):
    """A run folder, its bundle and its log of five records."""
    run = make_replayable_run(tmp_path / "run")
    with ScalarLog.open(run / "log.sqlite") as log:
        yield run, read_bundle(run / "bundle"), log


def resumed(made):
    run, bundle, log = made
    name = log.meta().get("name", "")
    return resume_replica(bundle, log, checkpoint=run / CHECKPOINT, run=name)


def test_a_checkpoint_in_the_middle_leads_to_the_same_digest(made):
    """Two records after a checkpoint of round 3 give what five after the bundle give."""
    run, bundle, log = made
    middle = rebuild(bundle, log, 3)
    save_replica(run / CHECKPOINT, middle, bundle_identity=bundle.identity, run=log.meta().get("name", ""))
    assert resumed(made).digest() == rebuild(bundle, log).digest()


@pytest.mark.parametrize("fault", ["wrong weights", "beyond the log", "damaged", "none"])
def test_a_checkpoint_that_the_log_does_not_bear_out_is_left_aside(made, fault):
    """The whole log is replayed from the bundle instead."""
    run, bundle, log = made
    replica = bundle.replica() if fault == "wrong weights" else rebuild(bundle, log, 3)
    replica.round = 99 if fault == "beyond the log" else 3
    path = run / CHECKPOINT
    if fault != "none":
        save_replica(path, replica, bundle_identity=bundle.identity, run=log.meta().get("name", ""))
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    assert resumed(made).digest() == rebuild(bundle, log).digest()


def test_compact_keeps_every_record_and_the_last_replica(made, capsys):
    """After `log compact --drop-replies` the log still replays, and the checkpoint is its end."""
    run, bundle, log = made
    before = rebuild(bundle, log).digest()
    assert main(["log", "compact", str(run), "--drop-replies"]) == 0
    assert f"{before:016x}" in capsys.readouterr().out
    assert main(["log", "verify", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == f"{before:016x}"
    assert resumed(made).digest() == before
    assert log._db.execute("SELECT COUNT(*) FROM replies").fetchone() == (0,)
