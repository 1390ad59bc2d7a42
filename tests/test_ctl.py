"""Steering a run that goes on: pause, resume, stop, other constants; each order answered, changes logged."""

import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config import load_experiment
from coordinator.control import Control
from coordinator.log_schema import SCHEMA_VERSION
from coordinator.plans import CHANGED, Plans
from coordinator.rebuild import rebuild_run
from coordinator.scalar_log import ScalarLog
from edge_agent.replay import apply_records
from profiles.errors import LogError
from tests.fleet import FleetInMemory, fresh_replica, plan_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def experiment():
    return load_experiment(ROOT / "examples" / "digits.toml", ["method.learning_rate=0.01"])


class SteeredFleet(FleetInMemory):
    """A fleet in memory whose rate comes from an experiment that orders can change."""

    def __init__(self, folder, experiment, **options):
        self.experiment = experiment
        super().__init__(folder, **options)

    def start_coordinator(self):
        self.plans = Plans(self.experiment, None, self.log.texts_of(CHANGED))
        super().start_coordinator()
        self.control = Control(self.log, self.plans, self.service)

    def terms_of(self, round_):
        rate = self.plans.experiment(round_).method.learning_rate
        return replace(self.terms, plan_of=lambda r: replace(plan_of(r), learning_rate=rate))

    def ask(self, verb, *arguments):
        number = self.log.add_order(verb, json.dumps(arguments))
        self.control.poll()
        return json.loads(self.log.take_answer(number))


@pytest.fixture
def fleet(tmp_path, experiment):
    return SteeredFleet(tmp_path, experiment, rounds=12)


def test_a_changed_constant_stands_in_the_next_record(fleet):
    """The open round keeps its rate, the one after it has the new one, and a replay of the log agrees."""
    fleet.run(until=lambda: fleet.rounds.replica.round == 4)
    first = fleet.rounds.next_round
    assert fleet.ask("set", "learning_rate=0.002")["constants"]["learning_rate"] == 0.002
    fleet.run()
    rates = [record.plan.learning_rate for record in fleet.log.records()]
    assert rates == pytest.approx([0.01] * first + [0.002] * (12 - first))
    replica = fresh_replica()
    apply_records(replica, fleet.log.records())
    assert fleet.digests() == {replica.digest()}


def test_a_change_outlives_the_coordinator(fleet):
    """The next coordinator asks what the last one was told, from the same round on."""
    fleet.run(until=lambda: fleet.rounds.replica.round == 4)
    first = fleet.rounds.next_round
    fleet.ask("set", "learning_rate=0.002")
    fleet.crash_coordinator()
    fleet.start_coordinator()
    fleet.run()
    rates = [record.plan.learning_rate for record in fleet.log.records()]
    assert rates == pytest.approx([0.01] * first + [0.002] * (12 - first))


def test_a_paused_run_opens_no_round_and_loses_none(fleet):
    """While paused nothing is skipped however long it lasts; resumed, the run ends as one never paused."""
    fleet.run(until=lambda: fleet.rounds.replica.round == 4)
    assert fleet.ask("pause")["state"] == "paused"
    for _ in range(2000):
        fleet.turn()
    assert fleet.rounds.replica.round <= 5
    assert fleet.ask("resume")["state"] == "running"
    fleet.run()
    assert fleet.log.skipped() == 0
    assert len(fleet.digests()) == 1


def test_a_pause_keeps_deadlines_away(tmp_path, experiment):
    """A round that waits for somebody is neither extended nor skipped while the run is paused."""
    fleet = SteeredFleet(tmp_path, experiment, rounds=6, deadline_s=5.0)
    fleet.run(until=lambda: fleet.rounds.replica.round == 2)
    fleet.ask("pause")
    fleet.boards[0].kill()
    for _ in range(200):
        fleet.turn()
    fleet.boards[0].boot()
    fleet.ask("resume")
    fleet.run()
    assert fleet.log.skipped() == 0


def test_stop_is_heard(fleet):
    """Whoever runs the rounds sees that they shall end."""
    fleet.ask("stop")
    assert fleet.control.stopped


def test_status_says_how_the_run_is(fleet):
    """State, round, who is there, and the constants of the moment."""
    fleet.run(until=lambda: fleet.rounds.replica.round == 3)
    told = fleet.ask("status")
    assert (told["state"], told["round"], told["online"], told["agents"]) == ("running", 3, 3, 3)
    assert told["constants"]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    "wrong",
    [
        "learning_rate=-1",
        "learning_rate",
        "no_such=1",
        "model.name=lenet",
        "seed=3",
        "perturbations=0",
        "fleet.quorum=99",
        "method.name=hiso",
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(fleet, wrong):
    """What cannot change, or has no such value, is answered with what can be done."""
    told = fleet.ask("set", wrong)
    assert told["error"]
    assert told["hint"]
    assert fleet.log.texts_of(CHANGED) == []


def test_an_unknown_order_is_answered(fleet):
    """Whatever stands in the table of orders gets an answer and harms nothing."""
    assert "no order" in fleet.ask("explode")["error"]
    assert "error" in fleet.ask("set")


def test_a_log_of_the_first_schema_is_brought_up_to_date(fleet, tmp_path):
    """A log without the newer tables gets them, and keeps every record."""
    fleet.run()
    fleet.log.close()
    with sqlite3.connect(tmp_path / "log.sqlite") as db:
        for table in ("orders", "ledger", "abandoned"):
            db.execute(f"DROP TABLE {table}")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    db.close()
    with ScalarLog.open(tmp_path / "log.sqlite") as log:
        assert log.verify() == 12
        assert log.open_orders() == []
        assert log.meta()["schema"] == str(SCHEMA_VERSION)


@pytest.mark.parametrize("version", [str(SCHEMA_VERSION + 1), "0", "new", ""])
def test_a_log_of_another_time_is_refused(tmp_path, version):
    """A schema that this release does not know is named, and the file is left as it is."""
    with ScalarLog.create(tmp_path / "log.sqlite", {"bundle": "b"}) as log:
        log.set_meta("schema", version)
    with pytest.raises(LogError, match="schema version"):
        ScalarLog.open(tmp_path / "log.sqlite")


def scalarfed(*arguments):
    return [sys.executable, "-m", "coordinator.cli", *map(str, arguments)]


@pytest.mark.timeout(300)
def test_a_run_of_processes_is_steered_from_beside(tmp_path):
    """On a real run: a constant is changed, the run stopped in order, resumed to its end, and replayed."""
    run = tmp_path / "run"
    start = scalarfed(
        *("testbed", "run", ROOT / "examples" / "digits.toml", "--out", run),
        *("--set", "rounds=4000", "--set", "devices=[{profile='pi-4-2gb', count=2}]"),
        *("--set", "pruning.method=none"),
    )
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (run / "log.sqlite").exists() or _rounds(run) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
        ask = scalarfed("ctl", run, "set", "learning_rate=0.005", "--json", "--within", "60")
        told = json.loads(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)
        assert told["constants"]["learning_rate"] == 0.005
        subprocess.run(scalarfed("ctl", run, "stop", "--within", "60"), check=True, capture_output=True)
        assert process.wait(60) == 130
        assert "--resume" in process.stderr.read()
    with ScalarLog.open(run / "log.sqlite") as log:
        last = {"round": len(log), "settings": [f"rounds={len(log) + 3}"]}
        log.add_event(CHANGED, "", json.dumps(last))
    done = subprocess.run([*start, "--resume"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with ScalarLog.open(run / "log.sqlite") as log:
        rates = [record.plan.learning_rate for record in log.records()]
    assert (rates[0], rates[-1]) == pytest.approx((0.02, 0.005))
    rebuild_run(run)


def _rounds(run):
    try:
        with ScalarLog.open(run / "log.sqlite") as log:
            return len(log)
    except LogError:
        return 0


def test_an_order_that_nobody_takes_is_withdrawn(tmp_path):
    """Without a coordinator the command says so, fails, and leaves no order behind for a later one."""
    with ScalarLog.create(tmp_path / "log.sqlite", {"bundle": "b"}):
        pass
    ask = scalarfed("ctl", tmp_path, "pause", "--within", "0.2")
    done = subprocess.run(ask, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--resume" in done.stderr
    with ScalarLog.open(tmp_path / "log.sqlite") as log:
        assert log.open_orders() == []
