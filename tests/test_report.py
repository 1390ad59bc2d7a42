"""Tests of coordinator.report, history and plots."""

import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from coordinator.history import read_history
from coordinator.report import write_report
from profiles.errors import LogError
from tests.made_run import make_run


class Page(HTMLParser):
    """Collects what a page shows, its ids and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note a tag, its id and its references."""
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src", "xlink:href"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_data(self, data):
        """Note a text."""
        self.words.append(data)

    @property
    def text(self) -> str:
        """All that can be read, with single spaces."""
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run folder with a report."""
    run = make_run(tmp_path_factory.mktemp("run") / "digits")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(run) -> Page:
    """Return the report of that run."""
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_headline_says_what_came_out(page):
    """Accuracy, bytes, memory, parameters and the agreement of the replicas stand in the page."""
    for said in ("6 agents trained the net mlp for 120 rounds", "87.1%", "64 bytes a round", "102 / 331"):
        assert said in page.text
    for said in ("72 MiB", "tightest budget 96 MiB", "3,284", "of 6,570: 50% stay", "equal", "01234567"):
        assert said in page.text


def test_page_loads_nothing(run, page):
    """Every reference leads into the page itself, and no address of a network stands in it."""
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"https?:|//[a-z]", (run / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "img"} & set(page.tags)


def test_plots_do_not_mix_up_their_parts(page):
    """Every id in the page is there once, and every reference finds its id."""
    assert page.ids
    assert len(set(page.ids)) == len(page.ids)
    assert {reference[1:] for reference in page.references} <= set(page.ids)


def test_all_plots_are_there(page):
    """Accuracy, loss, projected gradients, bytes and the fleet are five pictures with text."""
    assert page.tags.count("svg") == 5
    for said in ("agents, in training", "80 % of the scalars", "dense weights: 6.3 MB", "pi-3b-plus-3"):
        assert said in page.text


def test_plots_take_their_colours_from_the_page(run):
    """No picture holds a colour of its own, so that all of them follow light and dark."""
    pictures = re.findall(r"<svg.*?</svg>", (run / "report.html").read_text(encoding="utf-8"), re.DOTALL)

    assert len(pictures) == 5
    for picture in pictures:
        assert "var(--" in picture
        assert not re.search(r":\s*#[0-9a-fA-F]{3,6}", picture)


def test_widths_and_flops_are_shown_before_and_after(page):
    """The page compares the dense and the pruned net."""
    for said in ("64 → 34", "32 → 24", "3.36 M", "1.68 M"):
        assert said in page.text


def test_same_run_gives_the_same_page(run):
    """Writing the report again changes no byte."""
    before = (run / "report.html").read_bytes()

    write_report(run)

    assert (run / "report.html").read_bytes() == before


def test_report_only_adds_itself(tmp_path):
    """Looking back leaves the log as it was and no other file."""
    run = make_run(tmp_path / "digits")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    write_report(run)

    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after.pop("report.html")
    assert after == before


def test_run_that_did_not_end_gets_a_report(tmp_path):
    """Without a summary and a manifest the page says so, and shows what the log holds."""
    page = Page(write_report(make_run(tmp_path / "digits", ended=False)).read_text(encoding="utf-8"))

    assert "did not end" in page.text
    assert "87.1%" in page.text
    assert "67 / 66 / 96" in page.text


def test_run_before_its_first_round_gets_a_report(tmp_path):
    """An empty log is no fault."""
    page = Page(
        write_report(make_run(tmp_path / "digits", rounds=0, ended=False)).read_text(encoding="utf-8")
    )

    assert "for 0 rounds" in page.text
    assert "svg" not in page.tags


def test_run_of_one_round_gets_a_report(tmp_path):
    """One point is enough for every plot."""
    write_report(make_run(tmp_path / "digits", rounds=1, agents=1))


def test_large_fleet_is_shown_as_a_sum(tmp_path):
    """Sixty agents get one line of how many answered, and their table."""
    page = Page(write_report(make_run(tmp_path / "digits", agents=60, rounds=12)).read_text(encoding="utf-8"))

    assert "The first 40 of 60." in page.text
    assert page.text.count("jetson-nano-59") == 1


def test_hostile_text_stays_text(tmp_path):
    """What a stranger put on the broker is shown, and never becomes part of the page."""
    run = make_run(tmp_path / "digits", rounds=3)
    with sqlite3.connect(run / "log.sqlite") as db:
        db.execute("INSERT INTO events VALUES (1760000000, 'dropped', '<b>x', '<script>alert(1)</script>')")

    page = Page(write_report(run).read_text(encoding="utf-8"))

    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("content", [None, b"", b"no database at all, but long enough to look at"])
def test_folder_without_a_log_is_refused(tmp_path, content):
    """What is no run folder gets an error and no report."""
    if content is not None:
        (tmp_path / "log.sqlite").write_bytes(content)

    with pytest.raises(LogError, match=r"log\.sqlite"):
        write_report(tmp_path)

    assert not (tmp_path / "report.html").exists()


def test_damaged_summary_is_named(tmp_path):
    """A summary that is no JSON is named with a remedy."""
    run = make_run(tmp_path / "digits", rounds=3)
    (run / "summary.json").write_text("{")

    with pytest.raises(LogError, match=r"summary\.json"):
        write_report(run)


def test_history_knows_who_answered(tmp_path):
    """Missed and uncounted rounds are no answers, and skipped rounds have no loss."""
    history = read_history(make_run(tmp_path / "digits"))
    second = history.agents[1]

    assert set(range(120)) - set(second.answered.tolist()) == {40, *range(50, 58)}
    assert (second.missed, second.restarts) == (8, 1)
    assert np.flatnonzero(history.skipped).tolist() == [40]
    assert np.flatnonzero(np.isnan(history.loss)).tolist() == [40]


def test_history_has_the_deciles_of_the_scalars(tmp_path):
    """Low, median and high are those of all counted scalars of the round, by numpy's quantile."""
    run = make_run(tmp_path / "digits", rounds=20)
    slopes = read_history(run).slopes
    with sqlite3.connect(run / "log.sqlite") as db:
        blobs = [row[0] for row in db.execute("SELECT scalars FROM replies WHERE round = 7 AND counted")]
    expected = np.quantile(np.abs(np.frombuffer(b"".join(blobs), "<f4")), [0.1, 0.5, 0.9])

    at = slopes.rounds.tolist().index(7)
    assert len(blobs) == 6
    assert [slopes.low[at], slopes.median[at], slopes.high[at]] == pytest.approx(expected, rel=1e-6)


def test_events_know_their_round(tmp_path):
    """An event belongs to the round that was open when it happened."""
    events = read_history(make_run(tmp_path / "digits")).events

    assert [event.round for event in events if event.kind in ("agent ended", "broker ended")] == [50, 70]
