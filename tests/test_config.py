"""Tests of coordinator.config and what it stands on: experiment, overrides, schema."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.config import dump, load_experiment
from coordinator.experiment import Experiment
from edge_agent.optimizer import METHODS
from profiles.device import load_profile
from profiles.errors import ConfigError

SMALL = """
[data]
path = "rows.npz"
[method]
learning_rate = 0.01
[[devices]]
profile = "pi-zero-2w"
count = 2
"""


ROOT = Path(__file__).parent.parent


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an experiment file and returns its path."""

    def write(text: str, name: str = "small.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_of(path: Path, *overrides: str) -> str:
    """Return the message and hint of the ConfigError that loading must raise."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    return f"{caught.value}\n{caught.value.hint}"


def test_small_file_gets_every_default(write):
    """A file with data, a learning rate and devices is a whole experiment, named after the file."""
    experiment = load_experiment(write(SMALL))

    assert (experiment.name, experiment.seed, experiment.rounds) == ("small", 7, 400)
    assert experiment.model.hidden == (64, 32)
    assert experiment.method.constants == dict(METHODS["deepstep"].constants)
    assert [agent.name for agent in experiment.agents] == ["pi-zero-2w-1", "pi-zero-2w-2"]
    assert experiment.agents[1].memory_mib == load_profile("pi-zero-2w").memory_mib.value
    assert (experiment.cohort_size, experiment.quorum_size) == (2, 2)


def test_dump_loads_to_an_equal_experiment(write):
    """What dump writes is complete: loaded from another folder it gives the same experiment."""
    first = load_experiment(
        write(SMALL),
        ["method.smoothing=0.25", "model.hidden=[9, 8]", "fleet.quorum=1", "devices.0.name=kitchen"],
    )

    second = load_experiment(write(dump(first), "elsewhere.toml"))

    assert second == first
    assert dump(second) == dump(first)
    assert second.method.constants["smoothing"] == 0.25
    assert second.agents[0].name == "kitchen-1"


def test_all_faults_are_told_at_once(write):
    """One reading names every fault, each with its dotted key."""
    text = SMALL.replace("0.01", "-1") + "cuont = 3\n[pruning]\ndensity = 1.5\n[fleet]\ncohort = 9\n"

    message = faults_of(write(text))

    for key in ("method.learning_rate", "devices.0.cuont", "pruning.density"):
        assert f"`{key}`" in message
    assert "3 faults" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pruning.density=0", "(0, 1]"),
        ("pruning.density=1.0001", "fraction of the parameters that stays"),
        ("pruning.density=nan", "(0, 1]"),
        ("pruning.densty=0.5", "`density`"),
        ("pruning.method=ntq", "`ntk`"),
        ("prunning.density=0.5", "`pruning`"),
        ("method.epsilon=0", "= 0 must"),
        ("method.perturbations=0", "at least 1"),
        ("method.perturbations=true", "whole number"),
        ("method.batch_size=0", "at least 1"),
        ("method.batch_size=16.0", "whole number"),
        ("method.name=hizo", "`hiso`"),
        ("method.smothing=0.1", "`smoothing`"),
        ("method.smoothing=1", "less than 1"),
        ("method.head_rate=-1", "at least 0"),
        ("method.perturbations=60000", "scalars"),
        ("method.head_rate=fast", "finite number"),
        ("method.difference=centre", "`central`"),
        ("method.rounds=3", "at the top"),
        ("epsilon=0.1", "under [method]"),
        ("fleet.cohort=3", "more agents than exist: the [[devices]] make 2"),
        ("fleet.quorum=3", "above the cohort of 2"),
        ("fleet.resend_s=61", "must not exceed"),
        ("fleet.cohort=none", '"all"'),
        ("devices.0.profile=pi-zero-3w", "pi-zero-2w"),
        ("devices.0.memory_mib=0", "above 0"),
        ("devices.0.name=a/b", "letters"),
        ("devices.0.count=0", "at least 1"),
        ("devices.1.count=1", "the last one is devices.0"),
        ("devices=[]", "at least one [[devices]]"),
        ("broker.port=65536", "at most 65535"),
        ("broker.url=http://x", "mqtt://HOST:PORT"),
        ("evaluation.every=0", "at least 1"),
        ("seed=-1", "at least 0"),
        ("seed.low=1", "is a value"),
        ("rounds", "key=value"),
        ("name=../up", "letters"),
        ("data.path=", "path of an .npz file"),
        ("model=mlp", "must be a table"),
        ("model.hidden=64", "list of whole numbers"),
    ],
)
def test_bad_value_is_named_with_its_rule(write, override, said):
    """The message names the key that is wrong, and says the rule or the nearest known name."""
    text = SMALL if not override.startswith("seed.") else "seed = 1\n" + SMALL

    message = faults_of(write(text), override)

    assert said in message
    assert override.partition("=")[0].split(".")[0] in message


@pytest.mark.parametrize("gone", ["data.path", "method.learning_rate", "devices.0.profile"])
def test_missing_key_is_named(write, gone):
    """A key without a default must be there, and its absence is told."""
    key = gone.split(".")[-1]
    text = "\n".join(line for line in SMALL.splitlines() if not line.startswith(key))

    assert f"`{gone}` is missing" in faults_of(write(text))


def test_path_in_the_file_is_relative_to_the_file(write, tmp_path):
    """The data of an experiment file lies beside it, wherever the command is run."""
    assert load_experiment(write(SMALL)).data.path == (tmp_path / "rows.npz").resolve()


def test_path_in_an_override_is_relative_to_the_working_folder(write, tmp_path, monkeypatch):
    """What a person types is meant from where the person stands."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    experiment = load_experiment(write(SMALL), ["data.path=other.npz"])

    assert experiment.data.path == (tmp_path / "here" / "other.npz").resolve()


@pytest.mark.parametrize("text", ["fast run", '"fast run"'])
def test_bare_and_quoted_texts_mean_the_same(write, text):
    """The shell eats quotes, so a value that is no TOML is a text."""
    assert '"fast run"' in faults_of(write(SMALL), f"name={text}")


def test_other_method_drops_the_constants_of_the_first(write):
    """Trying another method by --set needs no edit of the file, but its own misspelt constants are told."""
    path = write(SMALL.replace("[method]", '[method]\nname = "hiso"\nnu = 0.1'))

    assert load_experiment(path, ["method.name=decomfl"]).method.constants == METHODS["decomfl"].constants
    assert "smoothing" in faults_of(path, "method.name=decomfl", "method.smothing=0.5")


def test_no_pruning_means_density_one(write):
    """The resolved experiment never claims a density that was not made."""
    assert load_experiment(write(SMALL), ["pruning.method=none"]).pruning.density == 1.0


def test_same_profile_twice_goes_on_counting(write):
    """Two unnamed entries of one profile, with different budgets, never share an agent name."""
    text = SMALL + '[[devices]]\nprofile = "pi-zero-2w"\nmemory_mib = 99\n'
    agents = load_experiment(write(text)).agents

    assert [(agent.id, agent.name) for agent in agents] == [(n, f"pi-zero-2w-{n + 1}") for n in range(3)]
    assert agents[2].memory_mib == 99


def test_same_name_twice_is_refused(write):
    """Names that differ only in case would meet in one log file on some systems."""
    text = SMALL + 'name = "desk"\n[[devices]]\nprofile = "pi-4-2gb"\nname = "Desk"\n'

    assert "`devices.1.name`" in faults_of(write(text))


def test_too_many_scalars_for_a_message_are_refused(write):
    """Perturbations times local steps must fit a reply."""
    assert "method.perturbations" in faults_of(
        write(SMALL), "method.perturbations=200", "method.local_steps=200"
    )


@pytest.mark.parametrize("text", ["rounds = ", "rounds = 1\nrounds = 2", "\x00"])
def test_invalid_toml_is_a_config_error(write, text):
    """What is not TOML is told with the place that the reader found."""
    assert "not valid TOML" in faults_of(write(text))


def test_missing_file_is_a_config_error(tmp_path):
    """The file's name stands in the message."""
    assert "nowhere.toml" in faults_of(tmp_path / "nowhere.toml")
    assert str(tmp_path) in faults_of(tmp_path)


def test_cross_checks_do_not_blame_faultless_keys(write):
    """With faulty devices, nothing is said about how many agents there are."""
    message = faults_of(write(SMALL), "devices.0.count=0", "fleet.cohort=5")

    assert "fleet.cohort" not in message


def test_experiment_is_a_value(write):
    """Two readings of one file are equal, and a changed copy is not."""
    one, two = load_experiment(write(SMALL)), load_experiment(write(SMALL))

    assert isinstance(one, Experiment)
    assert one == two
    assert replace(one, seed=8) != two


def test_names_in_the_file_are_those_of_the_pruning_floor(write):
    """Every net and every pruning method that exists can be asked for, and no other."""
    from pruning.models import MODELS
    from pruning.plan import METHODS as WAYS

    said = faults_of(write(SMALL), "model.name=?", "pruning.method=?")

    for names in (MODELS, WAYS):
        assert any(
            set(re.findall(r"`([\w-]+)`", line.partition("one of")[2])) == set(names)
            for line in said.splitlines()
        )


def test_a_constant_that_was_asked_for_is_never_dropped():
    """An override with a constant of another method is refused, though the file's own would be dropped."""
    with pytest.raises(ConfigError, match=r"`method\.nu` is not a known key"):
        load_experiment(ROOT / "examples" / "digits.toml", ["method.name=decomfl", "method.nu=0.1"])


def test_collectors_need_a_shard_each_and_no_masks(write):
    """More collectors than shards, or with masks, are refused by name; else they are taken."""
    path = write(SMALL)
    assert load_experiment(path, ["fleet.shards=4", "fleet.collectors=2"]).fleet.collectors == 2
    assert "Set `fleet.shards` to 2 or more" in faults_of(path, "fleet.collectors=2")
    masked = ("fleet.collectors=1", 'privacy.masks="pairwise"', "devices.0.count=4")
    assert "reads masked replies itself" in faults_of(path, *masked)
