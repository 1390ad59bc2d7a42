"""The fleet's books: what fits is asked, what does not is left out with the reason, and all survives."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coordinator.ledger import Ledger, Price, Work
from coordinator.report import write_report
from coordinator.scalar_log import ScalarLog
from edge_agent.wire import Reply
from profiles.budget import Budget
from tests.fleet import TOPICS, FleetInMemory, plan_of
from tests.made_run import make_run

ROOT = Path(__file__).resolve().parent.parent

NAMES = ["board-0", "board-1", "board-2"]
PLAN = plan_of(0, perturbations=8)


def price(work: Work) -> Price:
    """A sample takes 1 MiB above 60, and a perturbation of one sample 100 FLOPs; a message 500 bytes."""
    return Price(60.0 + work.batch_size, 100 * work.batch_size * work.plan.perturbations, 500)


def ledger(*budgets: Budget, day=lambda: "2026-11-21", stored=(), deadline_s=math.inf) -> Ledger:
    filled = [*budgets, *[Budget()] * (len(NAMES) - len(budgets))]
    return Ledger(NAMES, filled, price, today=day, stored=stored, deadline_s=deadline_s)


def fit(books: Ledger, plan=PLAN, needed: int = 1):
    return books.fit(plan, batch_size=16, central=True, agents=range(3), needed=needed)


def work(agent: int, batch_size: int = 16) -> Work:
    return Work(agent, PLAN, batch_size, central=True)


@pytest.mark.parametrize(
    ("budget", "batch"),
    [
        (Budget(memory_mib=70.0), 10),
        (Budget(memory_mib=76.0), None),
        (Budget(flops_per_round=100 * 8 * 5), 5),
        (Budget(flops_per_day=100 * 8 * 7), 7),
    ],
)
def test_the_largest_batch_that_fits_is_asked(budget, batch):
    """An agent that the whole batch does not fit gets the largest one that does, and nobody else does."""
    fitting = fit(ledger(budget))
    assert fitting.batches == ({} if batch is None else {0: batch})
    assert fitting.left_out == {}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(memory_mib=50.0), "61 MiB at its peak 50 are left"),
        (Budget(flops_per_round=700), "800 FLOPs in a round 700 are left"),
        (Budget(bytes_per_day=400), "500 bytes, and today 400 are left"),
    ],
)
def test_what_does_not_fit_is_left_out_with_the_reason(budget, words):
    """Where not even one sample fits, the reason has both figures."""
    fitting = fit(ledger(budget))
    assert list(fitting.left_out) == [0]
    assert words in fitting.left_out[0]


def test_perturbations_are_halved_where_that_makes_a_quorum():
    """Two boards that can pay four perturbations of a sample but not eight make the round ask four."""
    books = ledger(Budget(flops_per_round=500), Budget(flops_per_round=400))
    assert fit(books).plan.perturbations == 8
    assert fit(books, needed=3).plan.perturbations == 4
    assert fit(books, needed=3).left_out == {}


def test_perturbations_stay_where_fewer_do_not_help():
    """A board that can pay nothing at all does not cost the others their perturbations."""
    fitting = fit(ledger(Budget(flops_per_round=1)), needed=3)
    assert fitting.plan.perturbations == 8
    assert list(fitting.left_out) == [0]


def test_a_day_ends_with_smaller_batches_and_a_new_one_begins_whole():
    """What was spent shrinks the batch, then leaves the board out, and midnight gives it back."""
    day = ["2026-11-21"]
    books = ledger(Budget(flops_per_day=100 * 8 * 40), day=lambda: day[0])
    for expected in ({}, {}, {0: 8}):
        assert fit(books).batches == expected
        books.charge(work(0, expected.get(0, 16)), peak_mib=61.0)
    assert list(fit(books).left_out) == [0]
    assert books.left(0) == {"flops": 0}
    day[0] = "2026-11-22"
    assert fit(books).batches == {}
    assert fit(books).left_out == {}


def test_a_board_that_measures_too_much_gets_half_the_batch_before_it_is_left_out():
    """16, 8, 4, 2, 1, and only then nothing; a peak that does not rise lowers nothing."""
    books, seen = ledger(Budget(memory_mib=100.0)), []
    peak = 101.0
    while not fit(books).left_out:
        batch = fit(books).batches.get(0, 16)
        seen.append(batch)
        assert "allowed" in books.charge(work(0, batch), peak_mib=peak)[0]
        assert books.charge(work(0, batch), peak_mib=peak) == []
        peak += 5.0
    assert seen == [16, 8, 4, 2, 1]
    assert "measured" in fit(books).left_out[0]


def test_the_memory_that_is_held_against_a_board_is_what_it_measured():
    """Whatever a board says of its peak is in its account; the highest counts."""
    books = ledger()
    books.charge(work(1), peak_mib=70.0)
    books.note_status(1, {"state": "ready", "pid": 5, "peak_rss_mib": 81.5}, now=0.0)
    books.charge(work(1), peak_mib=75.0)
    assert books.account(1).peak_measured_mib == 81.5


def status(**told):
    return {"state": "ready", "pid": 7, **told}


def test_a_slow_board_gets_the_batch_that_it_can_finish():
    """Of the rate that it measured a board reaches a tenth, and is asked what that does in time."""
    books = ledger(deadline_s=8e-6)  # 6,400 FLOPs at 0.8 GFLOP/s
    assert fit(books).batches == {}
    books.note_status(0, {"state": "ready", "measured": {"fp32_gflops": 8.0}}, now=0.0)
    assert fit(books).batches == {0: 8}
    books.note_status(0, {"state": "ready", "measured": {"fp32_gflops": 0.8}}, now=1.0)
    assert "at the 0.8 GFLOP/s that it measured; the deadline is" in fit(books).left_out[0]


def test_heat_keeps_a_board_out_until_it_has_cooled_down():
    """Out above the ceiling, and in again three degrees below it, not at once."""
    books = ledger(Budget(temperature_c=70.0))
    found = []
    for heat in (65.0, 71.0, 69.0, 66.9):
        books.note_status(0, status(temperature_c=heat), now=0.0)
        found.append(0 in fit(books).left_out)
    assert found == [False, True, True, False]
    assert books.account(0).temperature_c == 71.0


def test_an_empty_battery_keeps_a_board_out():
    """Out below the floor; a board without a battery is never out for it."""
    books = ledger(Budget(battery_percent=20.0), Budget(battery_percent=20.0))
    books.note_status(0, status(telemetry={"battery_percent": 12.0}), now=0.0)
    books.note_status(1, status(), now=0.0)
    assert list(fit(books).left_out) == [0]
    assert "battery" in fit(books).left_out[0]


def test_energy_is_power_over_time():
    """Six watts for a hundred seconds are a sixth of a watt-hour; a gap of an hour is not counted."""
    books = ledger(Budget(energy_wh_per_day=0.1))
    for now in (0.0, 50.0, 100.0, 4000.0):
        books.note_status(0, status(telemetry={"power_w": 6.0}), now=now)
    assert books.account(0).energy_wh == pytest.approx(1 / 6)
    assert "Wh" in fit(books).left_out[0]


def test_counters_of_a_restarted_agent_begin_anew():
    """What each process counted is added up; a repeated status adds nothing."""
    books = ledger(Budget(bytes_per_day=1000))
    traffic = {"packet_up": 100, "packet_down": 200}
    for pid, flops in ((7, 50), (7, 50), (7, 80), (8, 30)):
        books.note_status(0, {"state": "ready", "pid": pid, "flops": flops, "traffic": traffic}, now=0.0)
    assert books.account(0).flops_measured == 110
    assert books.account(0).bytes_measured == 600
    assert books.left(0) == {"bytes": 400}


def test_the_books_outlive_the_coordinator(tmp_path):
    """Accounts that went through the log are as they were, counters too."""
    books = ledger(Budget(flops_per_day=20_000))
    books.charge(work(0), peak_mib=70.0)
    books.note_status(0, status(flops=10), now=0.0)
    saved = books.unsaved()
    assert books.unsaved() == []
    again = ledger(Budget(flops_per_day=20_000), stored=saved)
    assert again.account(0) == books.account(0)
    again.note_status(0, status(flops=15), now=0.0)
    assert again.account(0).flops_measured == 15


def test_the_report_shows_the_books(tmp_path):
    """A board's account, and the reason why it was left out, stand in the report's table."""
    run = make_run(tmp_path / "run")
    books = ledger(Budget(flops_per_day=20_000, temperature_c=70.0))
    books.charge(work(0), peak_mib=70.5)
    books.note_status(0, status(temperature_c=90.0), now=0.0)
    fit(books)
    with ScalarLog.open(run / "log.sqlite") as log, log._db:
        log._db.executemany("INSERT INTO ledger VALUES (?, ?, ?)", books.unsaved())
    page = write_report(run).read_text(encoding="utf-8")
    assert "<h3>Ledger</h3>" in page
    for figure in ("70.5", "12.8 k", "7.2 k", "90.0 °C of 70.0 °C allowed"):
        assert figure in page


@pytest.mark.timeout(300)
def test_real_boards_keep_to_their_budgets(tmp_path):
    """One of three processes has FLOPs for ten rounds: it answers no more than these, and status says so."""
    run, few = tmp_path / "run", "{profile='pi-4-2gb', name='few', flops_per_day=%d}"
    whole = 32 * 32 * 2 * 4458 * 1
    command = [sys.executable, "-m", "coordinator.cli", "testbed"]
    settings = [
        *("rounds=25", "pruning.method=none", "fleet.unfit=fit"),
        f"devices=[{few % (10.5 * whole)}, {{profile='pi-4-2gb', name='free', count=2}}]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    start = [*command, "run", str(ROOT / "examples" / "digits.toml"), "--out", str(run), "--json", *sets]
    done = subprocess.run(start, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digests_agree"]
    ask = [*command, "status", str(run), "--json"]
    told = json.loads(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)
    entries = {entry["agent"]: entry for entry in told["ledger"]}
    first = entries["few-1"]
    assert 0 < first["rounds"] < 25
    assert "FLOPs, and today" in first["refused"]
    assert first["flops_spent"] <= first["flops_allowed"] * 1.01
    assert entries["free-1"]["rounds"] == 25
    assert entries["free-1"]["flops_spent"] == pytest.approx(entries["free-1"]["flops_predicted"], rel=0.05)
    assert entries["free-1"]["peak_measured_mib"] == pytest.approx(
        entries["free-1"]["peak_predicted_mib"], rel=0.15
    )


class BudgetedFleet(FleetInMemory):
    """A fleet in memory with books; the day can be turned."""

    def __init__(self, folder, *budgets, **options):
        self.budgets, self.day = budgets, "2026-11-21"
        super().__init__(folder, **options)

    def ledger(self):
        return ledger(*self.budgets, day=lambda: self.day, stored=self.log.accounts())


def test_a_fleet_keeps_to_its_budgets(tmp_path):
    """A board with FLOPs for six rounds and a half answers six whole ones and half a one, then none."""
    spent = int(6.5 * 100 * 16 * 4)
    fleet = BudgetedFleet(tmp_path, Budget(flops_per_day=spent), rounds=10)
    fleet.run()
    with ScalarLog.open(tmp_path / "log.sqlite") as log:
        rows = log._db.execute("SELECT round, samples FROM replies WHERE agent = 'board-0' ORDER BY round")
        assert rows.fetchall() == [(n, 16) for n in range(6)] + [(6, 8)]
        told = {name: json.loads(text) for _, name, text in log.accounts()}
        reasons = log.texts_of("left out")
    assert told["board-0"]["flops_spent"] == spent
    assert told["board-0"]["flops_predicted"] == spent
    assert len(reasons) == 1
    assert "FLOPs, and today 0 are left" in reasons[0]
    assert len(fleet.digests()) == 1


def test_a_restarted_coordinator_does_not_give_the_budget_anew(tmp_path):
    """What was spent before the crash is spent after it."""
    fleet = BudgetedFleet(tmp_path, Budget(flops_per_day=6 * 100 * 16 * 4), rounds=10)
    fleet.run(until=lambda: fleet.rounds.replica.round == 4)
    fleet.crash_coordinator()
    fleet.start_coordinator()
    fleet.run()
    # The round that was open at the crash was paid for once, by the reply that is in the log.
    assert fleet.log.replies_of("board-0") <= 6
    assert len(fleet.digests()) == 1


def test_a_run_whose_budgets_are_spent_waits_for_the_next_day(tmp_path):
    """No round is opened, none is skipped, and the new day goes on."""
    budget = Budget(flops_per_day=4 * 100 * 16 * 4)
    fleet = BudgetedFleet(tmp_path, budget, budget, budget, rounds=6)
    fleet.run(until=lambda: fleet.rounds.replica.round == 4)
    for _ in range(500):
        fleet.turn()
    assert fleet.rounds.replica.round == 4
    fleet.day = "2026-11-22"
    fleet.run()
    assert fleet.log.skipped() == 0
    assert len(fleet.digests()) == 1


def test_an_agent_takes_the_batch_that_it_is_given(tmp_path):
    """A board with memory for ten samples answers with ten, and its reply counts by them."""
    fleet = BudgetedFleet(tmp_path, Budget(memory_mib=70.0), rounds=3)
    fleet.run()
    rows = fleet.log._db.execute("SELECT agent, samples, counted FROM replies WHERE round = 1 ORDER BY agent")
    assert rows.fetchall() == [("board-0", 10, 1), ("board-1", 16, 1), ("board-2", 16, 1)]


def test_a_reply_from_more_samples_than_were_given_is_refused(tmp_path):
    """The batch that was fitted to an agent binds it."""
    fleet = BudgetedFleet(tmp_path, Budget(memory_mib=70.0), rounds=3)
    fleet.run(until=lambda: fleet.rounds.replica.round == 1)
    opened = fleet.rounds._open
    assert opened.message.batch_of(0) == 10
    scalars = np.ones(4, np.float32)
    reply = Reply(fleet.rounds.epoch, 1, 0, 16, 1.0, 1, opened.digests[-1], scalars)
    fleet.rounds.on_reply(0, reply, fleet.now)
    assert fleet.rounds.dropped["wrong number of samples"] == 1


def test_status_of_a_board_reaches_the_books(tmp_path):
    """Over the link: a hot board is left out of the next round."""
    fleet = BudgetedFleet(tmp_path, Budget(temperature_c=70.0), rounds=8)
    fleet.run(until=lambda: fleet.rounds.replica.round == 2)
    told = {"state": "ready", "round": 2, "temperature_c": 90.0}
    fleet.boards[0].link.publish(TOPICS.status("board-0"), json.dumps(told).encode(), retain=True)
    fleet.run()
    assert "90.0 °C" in fleet.log.texts_of("left out")[0]
