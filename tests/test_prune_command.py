"""Tests of ``scalarfed prune``, coordinator.prune_command, coordinator.prune_picture and pruning.fit."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.cli import main
from coordinator.config import load_experiment
from coordinator.progress import Silence
from coordinator.prune_picture import BudgetLine, prune_picture
from coordinator.simulate import simulate
from edge_agent.bundle import read_bundle
from edge_agent.forward import Forward
from profiles.errors import ModelError
from pruning.fit import MemoryBudget, fit_memory, fit_structure
from pruning.models import model_structure
from pruning.modules import trace_structure
from pruning.prune import prune_model
from pruning.prune_module import load_module, prune_module
from pruning.shrink import narrow_module

ROOT = Path(__file__).parent.parent
FAST = ["--draws", "1"]
NETS = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(432, 5))
def number():
    return 7
def broken():
    raise RuntimeError("no weights here")
def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def images(tmp_path):
    """Return an .npz of 60 images of 8 x 8 in five classes."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    arrays = {f"x_{part}": rng.integers(0, 255, (60, 8, 8)).astype(np.uint8) for part in ("train", "test")}
    np.savez(path, **arrays, y_train=np.arange(60) % 5, y_test=np.arange(60) % 5)
    return path


@pytest.fixture
def nets(tmp_path):
    """Return a Python file with three functions."""
    path = tmp_path / "nets.py"
    path.write_text(NETS, encoding="utf-8")
    return path


def test_data_gives_the_shape(images, tmp_path, capsys):
    """With --data the net takes raw samples of the file, and the bundle runs on them."""
    out = tmp_path / "bundle"
    words = ["prune", "auto", "--data", str(images), "--density", "0.4", "--method", "ntk", *FAST]
    assert main([*words, "-o", str(out)]) == 0
    assert "parameters 3,669 -> 1,449 (39.5%)" in capsys.readouterr().out

    bundle = read_bundle(out)
    assert (bundle.model, bundle.sample_shape, bundle.classes) == ("lenet", (1, 8, 8), 5)
    assert bundle.params <= 0.4 * bundle.pruning["params_dense"]
    x = np.load(images)["x_test"][:, None].astype(np.float32)
    logits = Forward(bundle, bundle.replica().weights).logits(x)
    assert np.abs(logits).max() < 10  # 0 to 255 are standardised inside the graph


def test_json_is_one_object(tmp_path, capsys):
    """With --json stdout is the manifest's pruning and the predicted memory, nothing else."""
    words = ["lenet", "--shape", "1x14x14", "--classes", "10", "--macs", "20000", "--json", *FAST]
    assert main(["prune", *words, "-o", str(tmp_path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["macs"] <= 20_000
    assert facts["forward_flops"] == 2 * facts["macs"]
    assert facts["predicted_peak_mib"] <= facts["predicted_peak_mib_dense"]  # both may be the start's
    assert read_bundle(tmp_path).identity == facts["identity"]


@pytest.mark.parametrize(
    "budget", [["--params", "5000"], ["--density", "0.2"], []], ids=["params", "density", "default"]
)
def test_budgets(budget, tmp_path, capsys):
    """--params and --density are met from below; without any budget half of the parameters stay."""
    words = ["lenet", "--shape", "1x14x14", "--classes", "10", "--method", "uniform", "--json", *budget]
    assert main(["prune", *words, "-o", str(tmp_path)]) == 0
    facts = json.loads(capsys.readouterr().out)
    most = {"--params": 5000, "--density": 0.2 * facts["params_dense"]}.get(
        budget[0] if budget else "", 0.5 * facts["params_dense"]
    )
    assert 0.95 * most <= facts["params"] <= most


@pytest.mark.parametrize(("mode", "method"), [("structured", "uniform"), ("mask", "ntk")])
def test_the_default_is_what_trained_best(mode, method, tmp_path, capsys):
    """Without --method, layers shrink by one factor and masks follow NTK-SAP; see docs/pruning.md."""
    words = ["prune", "lenet", "--shape", "1x8x8", "--classes", "3", "--mode", mode, *FAST, "--json"]
    assert main([*words, "-o", str(tmp_path / "bundle")]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == method


def test_a_mask_claims_nothing(tmp_path, capsys):
    """--mode mask keeps fewer weights and says that FLOPs and memory are the dense net's."""
    words = ["lenet", "--shape", "1x14x14", "--classes", "10", "--mode", "mask", "--density", "0.3", *FAST]
    assert main(["prune", *words, "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "are the dense net's" in said
    assert "FLOPs of a forward" not in said
    assert read_bundle(tmp_path).params < 0.3 * read_bundle(tmp_path).pruning["params_dense"]


def test_a_module_of_ones_own(images, nets, tmp_path, capsys):
    """FILE.py:FUNCTION is traced, narrowed and exported."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    words = [f"{nets}:net", "--data", str(images), "--density", "0.5", "--json", *FAST]
    assert main(["prune", *words, "-o", str(tmp_path / "b")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["widths_dense"] == {"0": 12}
    assert facts["widths"] == {"0": 5}


def test_pretrained_units_are_the_largest(nets):
    """A pretrained module keeps the weights of the units with the largest magnitude."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    net = load_module(f"{nets}:net")
    net[0].weight.data[[1, 4, 7]] *= 100
    pruned = prune_module(
        net, sample_shape=(1, 8, 8), classes=5, method="uniform", density=0.26, pretrained=True
    )
    assert pruned.widths == {"0": 3}
    assert (pruned.module[0].weight == net[0].weight[[1, 4, 7]]).all()


def test_a_file_is_run_as_python_would(tmp_path, capsys):
    """It may hold dataclasses, import its neighbours and print; nothing of that reaches stdout or stays."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    (tmp_path / "neighbour_of_nets.py").write_text("WIDTH = 12\n")
    (tmp_path / "json.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbour_of_nets import WIDTH\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Sizes:\n"
        "    width: int = WIDTH\n"
        "def net():\n"
        "    print('a word')\n"
        "    return nn.Sequential(nn.Linear(6, Sizes().width), nn.ReLU(), nn.Linear(Sizes().width, 3))\n"
    )
    before = list(sys.path)
    words = ["prune", f"{tmp_path / 'json.py'}:net", "--shape", "6", "--classes", "3", "--json"]
    assert main([*words, "-o", str(tmp_path / "b")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["widths_dense"] == {"0": 12}
    assert "a word" in said.err
    assert sys.path == before
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("leaves", "SystemExit"),
        ("number", "returned int"),
        ("broken", "no weights here"),
        ("lost", "AttributeError"),
    ],
)
def test_bad_modules_are_refused(nets, function, message):
    """A function that fails or returns no module is named."""
    with pytest.raises(ModelError, match=message):
        load_module(f"{nets}:{function}")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["lenet"], 3, "input and output are not known"),
        (["lenet", "--shape", "1x8", "--classes", "3"], 5, "takes images"),
        (["lenet", "--shape", "1x-8", "--classes", "3"], 3, "is no shape"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--density", "0.5", "--macs", "9"], 3, "in 2 ways"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--macs", "9"], 5, "below the narrowest net"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--density", "2"], 5, "outside (0, 1]"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--fit", "pi-99"], 7, "pi-99"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--mode", "half"], 3, "unknown"),
        (
            ["lenet", "--shape", "1x8x8", "--classes", "3", "--mode", "mask", "--macs", "9"],
            3,
            "saves neither",
        ),
        (["mlp", "--shape", "8", "--classes", "3", "--method", "none", "--params", "99"], 3, "asks for less"),
        (["mlp", "--shape", "8", "--classes", "3", "--method", "autoflip"], 3, "do not go together"),
        (["mlp", "--shape", "8", "--classes", "3", "--explored", "runs"], 3, "do not go together"),
        (["vgg", "--shape", "1x8x8", "--classes", "3"], 5, "'vgg' is unknown"),
        (["gone.py:net", "--shape", "1x8x8", "--classes", "3"], 5, "no Python file"),
        (["mlp", "--shape", "100000000000000", "--classes", "3"], 5, "does not fit this machine's memory"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--params", "nan"], 3, "--params nan is no number"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--macs", "inf"], 3, "--macs inf is no number"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--params", "0"], 3, "--params 0 is no number"),
        (["lenet", "--shape", "1x8x8", "--classes", "3", "--density", "nan"], 5, "outside (0, 1]"),
    ],
)
def test_bad_options_write_nothing(words, code, message, tmp_path, capsys):
    """A bad option gives its error's code, a message with the value, a hint, and no bundle."""
    assert main(["prune", *words, "-o", str(tmp_path / "bundle")]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert "hint: " in said.err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_impossible_folder_is_refused_before_work(out, tmp_path, capsys):
    """A file in the place of the bundle's folder is named before anything is pruned."""
    (tmp_path / "file").write_text("mine")
    words = ["prune", "lenet", "--shape", "1x8x8", "--classes", "3", "-o", str(tmp_path / out)]
    assert main(words) == 3
    said = capsys.readouterr()
    assert f"{tmp_path / 'file'} is a file" in said.err
    assert "pruning" not in said.out
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A stop before the end leaves the former bundle; a success replaces it and leaves other files alone."""
    out = tmp_path / "bundle"
    words = ["prune", "lenet", "--shape", "1x14x14", "--classes", "3", "-o", str(out)]
    assert main([*words, "--density", "0.5"]) == 0
    (out / "notes.txt").write_text("mine")
    (out / "manifest.sig").write_bytes(b"of the former bundle")
    (out / "graph.old.onnx").write_bytes(b"a variant that the new bundle has not")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as late:  # the picture comes last
        late.setattr("coordinator.prune_command.prune_picture", stop)
        assert main([*words, "--density", "0.3"]) == 130
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    assert main([*words, "--density", "0.3"]) == 0
    assert read_bundle(out).pruning["density"] == 0.3
    assert (out / "notes.txt").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == set(before) - {"manifest.sig", "graph.old.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unknown_board_gets_the_known_ones(tmp_path, capsys):
    """--fit of a name like no other lists all profiles."""
    words = ["prune", "lenet", "--shape", "1x8x8", "--classes", "3", "--fit", "q", "-o", str(tmp_path / "b")]
    assert main(words) == 7
    assert "Known: generic-arm64, " in capsys.readouterr().err


def test_labels_beyond_the_classes_are_refused(images, tmp_path, capsys):
    """--classes below what the labels need is an error, not a bundle that cannot be trained."""
    words = ["prune", "lenet", "--data", str(images), "--classes", "3", "-o", str(tmp_path / "b")]
    assert main(words) == 3
    assert "they go up to 4" in capsys.readouterr().err


def test_ones_own_module_takes_every_option(images, nets, tmp_path, capsys):
    """A module of one's own is scored on labelled data, and fitted to a board's memory."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    words = ["prune", f"{nets}:net", "--data", str(images), "--json", *FAST]
    assert main([*words, "--method", "snip", "--density", "0.4", "-o", str(tmp_path / "a")]) == 0
    assert set(json.loads(capsys.readouterr().out)["densities"]) == {"0.weight"}
    assert main([*words, "--mode", "mask", "--density", "0.99", "-o", str(tmp_path / "mask")]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "mask"
    assert main([*words, "--fit", "pi-zero-2w", "--batch-size", "1000000", "-o", str(tmp_path / "b")]) == 5
    assert "MiB of predicted peak memory is below the narrowest net" in capsys.readouterr().err


def test_what_keeps_its_width_is_told(tmp_path, capsys):
    """A layer that tracing cannot follow is named by the command and in the manifest."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    source = tmp_path / "own.py"
    source.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8)\n"
        "        self.join, self.head = nn.Linear(16, 12), nn.Linear(12, 3)\n"
        "    def forward(self, x):\n"
        "        x = torch.cat([self.one(x), self.two(x)], 1).relu()\n"
        "        return self.head(self.join(x).relu())\n"
    )
    words = ["prune", f"{source}:Net", "--shape", "6", "--classes", "3", "--density", "0.6"]
    assert main([*words, "-o", str(tmp_path / "b")]) == 0
    assert "one keeps its width: join reads it beside two" in capsys.readouterr().out
    assert set(read_bundle(tmp_path / "b").pruning["left_whole"]) == {"one", "two"}


def test_fitting_a_module_meets_the_predicted_memory():
    """A module's widths are fitted as those of a reference net: under the memory, and near it."""
    pytest.importorskip("torch_pruning", reason="the extra `prune` is not installed")
    net = torch.nn.Sequential(torch.nn.Linear(64, 3000), torch.nn.ReLU(), torch.nn.Linear(3000, 3))
    options = {"sample_shape": (64,), "classes": 3}
    structure = trace_structure(net, sample_shape=(64,)).structure

    def build(widths):
        keep = {"0": range(widths["0"])}
        return narrow_module(net, structure, keep, sample_shape=(64,))

    spend = fit_structure(MemoryBudget(1e3, batch_size=256), structure, build, **options).spend
    allowed = (spend({"0": 3000}) + spend({"0": 1})) / 2
    pruned = prune_module(net, **options, method="uniform", memory=MemoryBudget(allowed, batch_size=256))
    assert 0.95 * allowed <= spend(pruned.widths) <= allowed
    assert 1 < pruned.widths["0"] < 3000


def test_fitting_meets_the_predicted_memory():
    """A net fitted to a memory between narrowest and dense is predicted within 5 % under it."""
    options = {"sample_shape": (64,), "classes": 10, "hidden": (2048, 1024)}
    structure = model_structure("mlp", **options)
    known = fit_memory(MemoryBudget(1e3), "mlp", **options).spend
    most, least = known(structure.dense), known(structure.narrowest)
    allowed = (most + least) / 2
    allowance = fit_memory(MemoryBudget(allowed), "mlp", **options)
    pruned = prune_model("mlp", **options, method="uniform", allowance=allowance)
    assert most - least > 5
    assert allowed - 0.2 * (most - least) <= allowance.spend(pruned.widths) <= allowed
    assert 0.95 * allowed <= allowance.spend(pruned.widths)
    assert pruned.params < pruned.params_dense


def test_a_memory_below_the_narrowest_net_is_refused():
    """The message has what the board allows and what the narrowest net needs."""
    options = {"sample_shape": (1, 28, 28), "classes": 10}
    with pytest.raises(ModelError, match=r"budget of 20 MiB .* narrowest net, which needs 5\d"):
        prune_model(
            "lenet", **options, method="uniform", allowance=fit_memory(MemoryBudget(20), "lenet", **options)
        )


def test_picture_shows_every_layer_and_the_budget():
    """The SVG names each layer, each group and the board, and is the same for the same facts."""
    facts = {
        "model": "lenet",
        "method": "ntk",
        "params": 50,
        "params_dense": 100,
        "densities": {"fc1.weight": 0.2},
        "kept": {"conv1.weight": 0.5, "fc1.weight": 0.25},
        "widths_dense": {"first": 8, "second": 9},
        "widths": {"first": 4, "second": 5},
        "predicted_peak_mib_dense": 80.0,
        "predicted_peak_mib": 70.0,
        "forward_flops_dense": 2e6,
        "forward_flops": 1e6,
    }
    svg = prune_picture(facts, BudgetLine("pi-zero-2w", 75.0))
    said = " ".join(ElementTree.fromstring(svg).itertext())
    for word in (
        "conv1",
        "fc1",
        "the saliency left",
        "first",
        "second",
        "pi-zero-2w",
        "50 of 100 parameters",
    ):
        assert word in said
    assert svg == prune_picture(facts, BudgetLine("pi-zero-2w", 75.0))


def test_autoflip_prunes_by_what_a_run_explored(tmp_path, capsys):
    """From a run's log of each agent's scalars come densities and widths; a pruned net's run is refused."""
    short = ["rounds=3", "method.name=decomfl", "method.perturbations=64", "pruning.density=0.5"]
    runs = {}
    for method in ("none", "uniform"):
        asked = load_experiment(ROOT / "examples" / "digits.toml", [*short, f"pruning.method={method}"])
        runs[method] = tmp_path / method
        simulate(asked, out=runs[method], observer=Silence())
    words = ["prune", "auto", "--data", str(ROOT / "examples" / "digits.npz"), "--method", "autoflip"]
    out = tmp_path / "bundle"
    assert main([*words, "--explored", str(runs["none"]), "--density", "0.3", "--json", "-o", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "autoflip"
    assert 0.29 < told["params"] / told["params_dense"] <= 0.3
    assert set(told["densities"]) == {"hidden.0.weight", "hidden.1.weight"}
    assert all(0 < density < 1 for density in told["densities"].values())
    assert read_bundle(out).params == told["params"]

    assert main([*words, "--explored", str(runs["uniform"]), "-o", str(tmp_path / "no")]) == 3
    assert "was pruned before" in capsys.readouterr().err
