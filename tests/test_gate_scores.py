"""Tests of ``scalarfed gates``, ``python -m edge_agent.scores`` and ``scalarfed prune --scores``."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.cli import main
from coordinator.config import load_experiment
from coordinator.progress import Silence
from coordinator.rebuild import rebuild_run
from coordinator.simulate import simulate
from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from edge_agent.gates import GateScores, open_gates
from edge_agent.scores import read_scores
from pruning.federated import sum_gate_scores
from pruning.gates import split_scores
from pruning.models import model_structure
from pruning.plan import Allowance, widths_by_scores
from pruning.prune_module import find_structure, load_module
from pruning.shrink import masked_module

ROOT = Path(__file__).parent.parent
BOARD = [sys.executable, "-m", "edge_agent.scores"]
NETS = """
import torch
from torch import nn
from pruning.modules import Coupling

class Own(nn.Module):
    couplings = (
        Coupling("channels", 12, writes=("conv",), reads=("fc",)),
        Coupling("neurons", 20, writes=("fc",), reads=("head",)),
    )

    def __init__(self, seed=4):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.fc, self.head = nn.Conv2d(1, 12, 3), nn.Linear(432, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(torch.relu(self.fc(torch.relu(self.conv(x / 255)).flatten(1))))

def trained_further():
    return Own(seed=5)
"""


def images(path, n, seed, *, lit=8):
    """Write an .npz of n images of 8 x 8 in five classes, dark but for some columns; return its inputs."""
    x = np.random.default_rng(seed).integers(0, 255, (n, 8, 8)).astype(np.uint8)
    x[:, :, lit:] = 0
    y = np.arange(n) % 5
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return x


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a net, two boards' data, the union of both, and a gated bundle."""
    folder = tmp_path_factory.mktemp("scores")
    (folder / "nets.py").write_text(NETS, encoding="utf-8")
    both = np.concatenate([images(folder / "one.npz", 40, 1, lit=2), images(folder / "two.npz", 100, 2)])
    np.savez(folder / "both.npz", x_train=both, y_train=np.arange(140) % 5)
    words = ["gates", f"{folder}/nets.py:Own", "--shape", "1x8x8", "--classes", "5", "--draws", "2"]
    assert main([*words, "-o", str(folder / "gated")]) == 0
    for board in ("one", "two", "both"):
        score(folder, board)
    return folder


def score(folder, board):
    """Run the board's command on its own data, as a process of its own."""
    words = [*BOARD, "gated", f"{board}.npz", "-o", f"{board}.json"]
    subprocess.run(words, cwd=folder, env=environment(), check=True, capture_output=True)


def environment():
    """Return the environment of a process that finds this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def narrow(place, out, *files, budget=("--density", "0.4"), model="Own"):
    """Prune by files of scores; return the exit code."""
    scores = [word for file in files for word in ("--scores", str(place / file))]
    words = ["prune", f"{place}/nets.py:{model}", "--shape", "1x8x8", "--classes", "5", "--draws", "2"]
    return main([*words, *scores, *budget, "-o", str(out)])


def test_a_board_scores_without_torch(place, tmp_path):
    """The board's command loads no torch; its file holds a number per unit and names the bundle."""
    script = (
        "import sys; from edge_agent.scores import main; code = main(sys.argv[1:]); "
        "print({'torch', 'onnx', 'pruning'} & set(sys.modules)); sys.exit(code)"
    )
    out = tmp_path / "scores.json"
    words = [sys.executable, "-c", script, str(place / "gated"), str(place / "one.npz"), "-o", str(out)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert "100 %" in done.stderr
    content = json.loads(out.read_text())
    assert content.keys() == {"format", "gated", "model", "samples", "forwards", "scores"}
    assert (len(content["scores"]), content["samples"]) == (32, 40)
    assert content["gated"] == read_bundle(place / "gated").identity
    assert out.read_bytes() == (place / "one.json").read_bytes()


def test_fewer_samples_are_looked_at(place, tmp_path):
    """--samples bounds how many of the board's samples count, and --seed names which."""
    found = {}
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.json"
        words = [*BOARD, str(place / "gated"), str(place / "two.npz"), "-o", str(out), "--samples", "10"]
        subprocess.run([*words, "--seed", seed], env=environment(), check=True, capture_output=True)
        found[seed] = read_scores(out).found
    assert found["0"].samples == found["1"].samples == 10
    assert not np.array_equal(found["0"].scores, found["1"].scores)


@pytest.mark.parametrize("budget", [("--density", "0.4"), ("--params", "2500"), ("--macs", "9000")])
def test_two_boards_choose_as_their_union_does(budget, place, tmp_path):
    """Scores of two boards give the widths and the units that the scores of all their samples give."""
    assert narrow(place, tmp_path / "apart", "two.json", "one.json", budget=budget) == 0
    assert narrow(place, tmp_path / "union", "both.json", budget=budget) == 0
    apart, union = read_bundle(tmp_path / "apart"), read_bundle(tmp_path / "union")
    assert apart.pruning["widths"] == union.pruning["widths"] != union.pruning["widths_dense"]
    assert (apart.pruning["boards"], apart.pruning["samples_scored"]) == (2, 140)
    assert np.array_equal(apart.mapped_weights(), union.mapped_weights())
    unit, most = budget[0].removeprefix("--"), float(budget[1])
    spent = apart.pruning["params" if unit == "density" else unit]
    assert 0.9 * most <= spent / (apart.pruning["params_dense"] if unit == "density" else 1) <= most


def test_kept_units_keep_their_weights(place, tmp_path):
    """The bundle computes, within 1e-5, what the pretrained net does with its highest-scored units alone."""
    assert narrow(place, tmp_path / "bundle", "one.json", "two.json") == 0
    bundle = read_bundle(tmp_path / "bundle")
    own = load_module(f"{place}/nets.py:Own")
    structure = find_structure(own, sample_shape=(1, 8, 8)).structure
    boards = [read_scores(place / f"{board}.json").found for board in ("one", "two")]
    mean = (40 * boards[0].scores + 100 * boards[1].scores) / 140
    keep = {
        name: sorted(int(unit) for unit in np.argsort(-scores)[: bundle.pruning["widths"][name]])
        for name, scores in split_scores(structure, mean).items()
    }
    x = np.load(place / "two.npz")["x_train"][:, None].astype(np.float32)
    with torch.no_grad():
        expected = masked_module(own, structure, keep)(torch.from_numpy(x)).numpy()
        whole = own(torch.from_numpy(x)).numpy()
    found = Forward(bundle, bundle.replica().weights).logits(x)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(found - whole).max() > 1e-3


def test_a_folder_of_scores(place, tmp_path, capsys):
    """--scores takes the folder into which the boards' files were copied."""
    (tmp_path / "scores").mkdir()
    for board in ("one", "two"):
        (tmp_path / "scores" / f"{board}.json").write_bytes((place / f"{board}.json").read_bytes())
    words = ["prune", f"{place}/nets.py:Own", "--shape", "1x8x8", "--classes", "5", "--draws", "2"]
    assert main([*words, "--scores", str(tmp_path / "scores"), "-o", str(tmp_path / "bundle")]) == 0
    assert "scores of 2 boards, 140 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        (["one.json"], {"model": "trained_further"}, "one.json has the scores of another gated bundle"),
        (["one.json", "one.json"], {}, "one.json is given twice"),
        (["nets.py"], {}, "nets.py holds no gate scores"),
        (["three.json"], {}, "there is no file of scores"),
        (["one.json"], {"budget": ("--mode", "mask")}, "keep whole units"),
    ],
    ids=["another", "twice", "no-scores", "no-file", "mask"],
)
def test_scores_that_do_not_count(files, options, said, place, tmp_path, capsys):
    """Scores of another net's gated bundle, or of nothing, are refused by name, and nothing is written."""
    assert narrow(place, tmp_path / "bundle", *files, **options) in (3, 4)
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere", "one.npz"], 6, "not a whole bundle"),
        (["gated", "none.npz"], 4, "there is no data file"),
        (["gated", "one.npz", "--samples", "0"], 2, "no whole number from 1"),
    ],
)
def test_a_board_says_what_is_wrong(words, code, said, place):
    """A missing bundle, missing data and impossible options each have their message and exit code."""
    done = subprocess.run(
        [*BOARD, *words, "-o", "bad.json"], cwd=place, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, said in done.stderr) == (code, True)
    assert not (place / "bad.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a signal to one process needs POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing_behind(number, place, tmp_path):
    """A board's command that is stopped exits with 130, and neither a file nor a part of one is there."""
    images(tmp_path / "many.npz", 60_000, 3)
    words = [*BOARD, str(place / "gated"), "many.npz", "-o", "out/scores.json", "--samples", "60000"]
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert "forward passes" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read().endswith("nothing was written\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_is_scored_as_it_ended(tmp_path):
    """The gated bundle of a run of a pruned net has its last round's weights; by scores it gets narrower."""
    asked = load_experiment(ROOT / "examples" / "digits.toml", ["rounds=4", "pruning.method=uniform"])
    simulate(asked, out=tmp_path / "run", observer=Silence())
    assert main(["gates", str(tmp_path / "run"), "--draws", "1", "-o", str(tmp_path / "gated")]) == 0
    gated, (bundle, replica) = read_bundle(tmp_path / "gated"), rebuild_run(tmp_path / "run")
    x = np.load(ROOT / "examples" / "digits.npz")["x_test"].astype(np.float32)
    expected = Forward(bundle, replica.weights).logits(x)
    weights = gated.replica().weights
    found = Forward(gated, weights, others=open_gates(gated).inputs).logits(x)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(Forward(bundle, bundle.replica().weights).logits(x) - expected).max() > 1e-3

    words = [str(tmp_path / "gated"), str(ROOT / "examples" / "digits.npz"), "-o", str(tmp_path / "s.json")]
    subprocess.run([*BOARD, *words], env=environment(), check=True, capture_output=True)
    words = ["prune", str(tmp_path / "run"), "--scores", str(tmp_path / "s.json"), "--draws", "1"]
    assert main([*words, "--density", "0.5", "-o", str(tmp_path / "narrow")]) == 0
    narrow = read_bundle(tmp_path / "narrow")
    assert narrow.model == "mlp"
    assert 0.47 * bundle.params <= narrow.params <= 0.5 * bundle.params


def test_the_sum_is_exact():
    """The sum over boards has the same bits in every order, also where scores cancel."""
    boards = [("a", 3e7, 5), ("b", 1e-3, 7), ("c", -3e7, 5), ("d", 2e-9, 11)]
    replies = [(name, GateScores(np.array([v, -v], np.float32), n, 1)) for name, v, n in boards]
    one, other = sum_gate_scores(replies), sum_gate_scores(replies[::-1])
    assert np.array_equal(one, other)
    exact = (7 * float(np.float32(1e-3)) + 11 * float(np.float32(2e-9))) / 28
    assert one[0] == np.float32(exact) == -one[1]


def test_units_that_are_worth_more_for_their_cost_stay():
    """Widths lean to the group with the higher scores; a unit that costs more must be worth more."""
    structure = model_structure("mlp", sample_shape=(20,), classes=4)
    even = {"hidden1": np.ones(64, np.float32), "hidden2": np.ones(32, np.float32)}
    rising = {name: scores * np.linspace(1, 2, len(scores)) for name, scores in even.items()}
    widths = {}
    for group in even:
        raised = {**rising, group: rising[group] * 10}
        allowance = Allowance("params", 1500)
        widths[group] = widths_by_scores(structure, raised, name="mlp", allowance=allowance)
        assert 0.95 * 1500 <= structure.params(widths[group]) <= 1500
    assert widths["hidden1"]["hidden1"] > widths["hidden2"]["hidden1"]
    assert widths["hidden1"]["hidden2"] < widths["hidden2"]["hidden2"]
