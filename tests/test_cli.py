"""Tests of coordinator.cli and coordinator.rebuild."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import typer

from coordinator.cli import app, main
from coordinator.rebuild import rebuild_run
from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from profiles.errors import BudgetError, DigestError
from tests.made_run import make_replayable_run, make_run

ROOT = Path(__file__).parent.parent
EXPERIMENT = """
[data]
path = "rows.npz"
[method]
learning_rate = 0.01
[[devices]]
profile = "pi-zero-2w"
"""


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a small run folder that can be replayed."""
    return make_replayable_run(tmp_path / "run")


@pytest.fixture
def experiment(tmp_path) -> Path:
    """Return a sound experiment file."""
    path = tmp_path / "small.toml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture
def run_testbed(monkeypatch):
    """Put a recorder in the place of the testbed; set ``outcome`` to what it returns or raises."""

    class Recorder:
        outcome: object = {"rounds": 3, "final_digest": "ab" * 8, "digests_agree": True}

        def __call__(self, experiment, *, out, resume, observer):
            self.experiment, self.out, self.resume = experiment, out, resume
            print("a library chatters")
            observer.stage("training")
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

    recorder = Recorder()
    monkeypatch.setattr("coordinator.testbed.run_testbed", recorder)
    return recorder


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command below a group."""
    found = [(*path, command.name or command.callback.__name__) for command in group.registered_commands]
    for inner in group.registered_groups:
        found += commands(inner.typer_instance, (*path, inner.name))
    return found


def in_python(*code: str) -> "subprocess.CompletedProcess[str]":
    """Run a few lines in a fresh process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, env=env, check=False
    )


def test_every_command_teaches_by_example(capsys):
    """The help of each command says what it does and shows it at work."""
    found = commands(app)
    assert {("testbed", "run"), ("log", "show"), ("log", "verify"), ("replay",), ("report",)} <= set(found)
    for words in found:
        assert main([*words, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"scalarfed {' '.join(words)}" in said.partition("Example")[2], words


def test_help_imports_nothing_heavy():
    """Neither torch nor numpy nor matplotlib stands between a person and the help."""
    done = in_python(
        "import sys",
        "from coordinator.cli import main",
        "code = main(['--help'])",
        "heavy = {'torch', 'numpy', 'matplotlib', 'onnx', 'onnxruntime', 'paho', 'jinja2', 'sqlite3'}",
        "heavy &= set(sys.modules)",
        "sys.exit(code or ' '.join(sorted(heavy)) or 0)",
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "scalarfed testbed run examples/digits.toml" in done.stdout


def test_no_arguments_show_the_help(capsys):
    """Alone, the command tells what it can do, and that nothing was done."""
    assert main([]) == 2
    assert "testbed" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "words", [["nope"], ["testbed", "run"], ["log", "show", "x", "--last", "0"], ["replay", "--nope"]]
)
def test_wrong_option_is_code_2(words, capsys):
    """What the command line cannot mean is refused on stderr, with exit code 2."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err


def test_version_is_printed(capsys):
    """--version names the program."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("scalarfed")


def test_error_is_a_message_and_a_hint(capsys):
    """A fault of the user gives two lines on stderr, the error's exit code, and nothing on stdout."""
    assert main(["testbed", "run", "nowhere.toml"]) == 3

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: nowhere.toml cannot be read")
    assert "\nhint: " in said.err
    assert "Traceback" not in said.err
    assert "\x1b" not in said.err


def test_trouble_of_the_disk_is_code_1(run_testbed, experiment, capsys):
    """An OSError is told without a traceback."""
    run_testbed.outcome = OSError(28, "No space left on device", "log.sqlite")

    assert main(["testbed", "run", str(experiment)]) == 1
    assert "error: [Errno 28] No space left on device: 'log.sqlite'" in capsys.readouterr().err


def test_testbed_gets_what_was_asked(run_testbed, experiment, tmp_path):
    """Overrides, broker, folder and --resume reach the run; relative paths are made absolute."""
    words = [
        "--set",
        "rounds=9",
        "--set",
        "seed=3",
        "--broker",
        "mqtt://h:1",
        "--out",
        str(tmp_path / "o"),
        "--resume",
    ]

    assert main(["testbed", "run", str(experiment), *words]) == 0

    assert (run_testbed.experiment.rounds, run_testbed.experiment.seed) == (9, 3)
    assert run_testbed.experiment.broker.url == "mqtt://h:1"
    assert (run_testbed.out, run_testbed.resume) == (tmp_path / "o", True)


def test_folder_is_named_after_the_experiment(run_testbed, experiment, monkeypatch, tmp_path):
    """Without --out a run lies under runs in the working folder."""
    monkeypatch.chdir(tmp_path)

    assert main(["testbed", "run", str(experiment)]) == 0

    assert run_testbed.out == tmp_path / "runs" / "small"


def test_json_is_all_that_stdout_carries(run_testbed, experiment, capsys):
    """With --json stdout is one object, whatever libraries print."""
    assert main(["testbed", "run", str(experiment), "--json"]) == 0

    said = capsys.readouterr()
    assert json.loads(said.out) == run_testbed.outcome
    assert "chatters" in said.err


def test_summary_is_shown(run_testbed, experiment, capsys):
    """Without --json the end says where the report is, and warns of replicas that differ."""
    run_testbed.outcome = {
        "test_accuracy": 0.931,
        "rounds": 400,
        "params_dense": 6570,
        "params_pruned": 3284,
        "bytes_up_per_agent_round": 102.4,
        "bytes_down_per_agent_round": 331.0,
        "agents": [{"peak_rss_mib": 68.2}, {"peak_rss_mib": None}],
        "digests_agree": False,
        "final_digest": "ab" * 8,
    }

    assert main(["testbed", "run", str(experiment)]) == 0

    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "93.1% after 400 rounds",
        "3,284 of 6,570",
        "102 up, 331 down",
        "68 MiB",
        "not on every side",
    ):
        assert said in out
    assert str(Path("runs") / "small" / "report.html") in out


def test_ctrl_c_is_code_130_and_says_how_to_go_on(run_testbed, experiment, tmp_path, capsys):
    """After Ctrl-C a person knows whether and how the run can go on."""
    run_testbed.outcome = KeyboardInterrupt()
    words = ["testbed", "run", str(experiment), "--out", str(tmp_path / "out")]

    assert main(words) == 130
    assert "nothing is left behind" in capsys.readouterr().err

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.sqlite").touch()
    assert main(words) == 130
    assert "--resume" in capsys.readouterr().err


def test_budget_error_keeps_its_code(run_testbed, experiment, capsys):
    """Every error of the tree leaves with the code of its class."""
    run_testbed.outcome = BudgetError("Training needs 71 MiB, pi-zero-2w allows 64.")

    assert main(["testbed", "run", str(experiment)]) == BudgetError.exit_code
    assert "71 MiB" in capsys.readouterr().err


def test_sigterm_stops_as_ctrl_c_does():
    """A run that is asked to end by the system gets the chance to stop in order."""
    done = in_python(
        "import os, signal",
        "from coordinator.cli.testbed import stopping_in_order",
        "with stopping_in_order():",
        "    try:",
        "        os.kill(os.getpid(), signal.SIGTERM); signal.pause()",
        "    except KeyboardInterrupt:",
        "        print('in order')",
    )

    assert done.stdout == "in order\n"


def test_log_show_prints_the_last_rounds(run, capsys):
    """One line a round, with its digest."""
    assert main(["log", "show", str(run), "--last", "2"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["round", "3", "4"]
    assert lines[-1].split()[-1] == f"{rebuild_run(run)[1].digest():016x}"


def test_log_show_counts_replies_and_skips(tmp_path, capsys):
    """A skipped round has no loss, and the counted replies of each round are right."""
    run = make_run(tmp_path / "run", rounds=60, ended=False)

    assert main(["log", "show", str(run), "--json"]) == 0

    shown = {row["round"]: row for row in json.loads(capsys.readouterr().out)["shown"]}
    assert len(shown) == 20
    assert (shown[40]["skipped"], shown[40]["loss"], shown[40]["counted"]) == (True, None, 0)
    assert (shown[49]["counted"], shown[50]["counted"]) == (6, 5)


def test_verify_accepts_a_sound_log(run, capsys):
    """The chain and all digests are checked, and the last digest is told."""
    assert main(["log", "verify", str(run), "--json"]) == 0

    said = json.loads(capsys.readouterr().out)
    assert said == {"rounds": 5, "digest": f"{rebuild_run(run)[1].digest():016x}", "sound": True}


def test_verify_refuses_an_altered_row(run, capsys):
    """One flipped bit of a scalar is found, and its round is named."""
    with sqlite3.connect(run / "log.sqlite") as db:
        (blob,) = db.execute("SELECT record FROM records WHERE round = 2").fetchone()
        db.execute("UPDATE records SET record = ? WHERE round = 2", (blob[:-1] + bytes([blob[-1] ^ 1]),))

    assert main(["log", "verify", str(run)]) == DigestError.exit_code
    assert "round 2" in capsys.readouterr().err


def test_replay_refuses_another_bundle(run, tmp_path, capsys):
    """A log is replayed only from the bundle with which it began, and nothing is written."""
    manifest = run / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"linear"', '"other"'), encoding="utf-8")

    code = main(["replay", str(run), "--export", str(tmp_path / "m.onnx")])

    assert code == DigestError.exit_code
    assert "belongs to bundle" in capsys.readouterr().err
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("rounds", [0, 3, 5])
def test_replay_gives_the_digest_of_the_log(run, rounds, capsys):
    """After n rounds the digest is the one that record n - 1 holds."""
    with sqlite3.connect(run / "log.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM records").fetchone() == (5,)

    assert main(["replay", str(run), "--round", str(rounds), "--json"]) == 0

    said = json.loads(capsys.readouterr().out)
    bundle, replica = rebuild_run(run, rounds)
    assert (said["round"], said["digest"]) == (rounds, f"{replica.digest():016x}")
    assert (said["digest"] == f"{bundle.replica().digest():016x}") == (rounds == 0)


@pytest.mark.parametrize("rounds", ["6", "-1"])
def test_round_beyond_the_log_is_refused(run, rounds, capsys):
    """The error says how far the log reaches."""
    assert main(["replay", str(run), "--round", rounds]) == 12
    assert "0 to 5" in capsys.readouterr().err


def test_exported_model_answers_as_the_replica_does(run, tmp_path, capsys):
    """The exported logits give the loss that the bundle's graph has with the replica's weights."""
    path = tmp_path / "deep" / "model.onnx"
    assert main(["replay", str(run), "--round", "4", "--export", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)).astype(np.float32), rng.integers(0, 3, 7)

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": x})
    _, replica = rebuild_run(run, 4)
    loss, correct = Forward(read_bundle(run / "bundle"), replica.weights).evaluate(x, y)

    assert [value.name for value in session.get_inputs()] == ["x"]
    picked = logits[np.arange(7), y] - np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    assert -picked.mean() == pytest.approx(loss, rel=1e-5)
    assert int((logits.argmax(axis=1) == y).sum()) == correct


def test_report_tells_where_it_is(tmp_path, capsys):
    """The command writes the page and prints its path."""
    run = make_run(tmp_path / "run", rounds=3)

    assert main(["report", str(run)]) == 0

    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words", [["log", "show"], ["log", "verify"], ["log", "compact"], ["replay"], ["report"]]
)
def test_folder_without_a_run_is_refused(words, tmp_path, capsys):
    """Every verb that looks back says that there is no run, and leaves nothing behind."""
    assert main([*words, str(tmp_path / "none")]) == 12
    assert "log.sqlite" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_profiles_are_listed_and_shown(capsys):
    """The list has each board's budget, and show has every figure's source."""
    assert main(["profile", "list"]) == 0
    listed = capsys.readouterr().out
    assert main(["profile", "list", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(["profile", "show", "pi-zero-2w"]) == 0
    shown = capsys.readouterr().out

    assert len(listed.splitlines()) == len(figures) + 1 > 15
    assert figures["pi-zero-2w"]["memory_mib"]["value"] > 0
    assert "source = " in shown


def test_unknown_profile_is_named_with_the_nearest(capsys):
    """A misspelt board is an error with the right name in the hint."""
    assert main(["profile", "show", "pi-zero-2"]) == 7
    assert "pi-zero-2w" in capsys.readouterr().err


def test_measured_profile_can_be_imported(tmp_path, monkeypatch, capsys):
    """What measure writes is a sound profile, whose speed was measured here."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    path = tmp_path / "my-laptop.toml"

    assert main(["profile", "measure", "--seconds", "0.2", "--out", str(path), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert main(["profile", "import", str(path)]) == 0
    capsys.readouterr()
    assert main(["profile", "show", "my-laptop", "--json"]) == 0

    figure = json.loads(capsys.readouterr().out)["fp32_gflops"]
    assert (figure["value"], figure["kind"]) == (measured["fp32_gflops"], "measured")


def test_own_profile_can_be_imported(tmp_path, monkeypatch, capsys):
    """A profile of one's own is known by its name afterwards."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("APPDATA", str(tmp_path / "config"))
    main(["profile", "show", "pi-4-2gb"])
    (tmp_path / "my-board.toml").write_text(capsys.readouterr().out, encoding="utf-8")

    assert main(["profile", "import", str(tmp_path / "my-board.toml")]) == 0

    capsys.readouterr()
    assert main(["profile", "list"]) == 0
    assert "my-board" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("head") is None, reason="needs head")
def test_closed_pipe_is_no_traceback(run):
    """`scalarfed log show | head -1` ends quietly."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'"{sys.executable}" -m coordinator.cli log show "{run}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=env, check=False)

    assert done.stdout.startswith("  round")
    assert "Traceback" not in done.stderr
