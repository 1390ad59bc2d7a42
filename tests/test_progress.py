"""Tests of coordinator.progress."""

import io

from rich.console import Console

from coordinator.progress import BarProgress, LineProgress, Observer, Silence, Standing


def tell(observer: Observer, round_: int, *, loss: float | None = 0.5, accuracy: float | None = None) -> None:
    """Tell of a closed round of ten."""
    observer.round(Standing(round_, 10, loss, accuracy, 5, 6, 1234, 98765))


def test_lines_are_written_every_few_seconds():
    """The first and the last round get a line, and others when the last line is five seconds old."""
    times = iter([0.0, 1.0, 2.0, 6.0, 7.0, 8.0])
    stream = io.StringIO()
    lines = LineProgress(stream, clock=lambda: next(times))

    for round_ in (1, 2, 3, 4, 5, 10):
        tell(lines, round_)

    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "4/10", "10/10"]


def test_line_holds_every_figure():
    """Round, loss, accuracy, agents alive, bytes and the time left stand in one line."""
    times = iter([0.0, 30.0])
    stream = io.StringIO()
    lines = LineProgress(stream, clock=lambda: next(times))

    tell(lines, 1)
    tell(lines, 4, accuracy=0.912)

    last = stream.getvalue().splitlines()[-1]
    assert last == "round 4/10  loss 0.500  acc 91.2%  5/6 alive  1 kB up  99 kB down  1:00 left"


def test_resumed_run_is_timed_from_where_it_goes_on():
    """Rounds of an earlier sitting do not make the time left look shorter."""
    times = iter([0.0, 10.0])
    stream = io.StringIO()
    lines = LineProgress(stream, clock=lambda: next(times))

    tell(lines, 8)
    tell(lines, 9)

    assert stream.getvalue().endswith("0:10 left\n")


def test_skipped_round_has_no_loss():
    """A round without a quorum is called skipped."""
    stream = io.StringIO()

    tell(LineProgress(stream), 1, loss=None)

    assert "skipped" in stream.getvalue()
    assert "nan" not in stream.getvalue()


def test_bar_shows_the_round_and_its_figures():
    """The bar's last state holds round, loss, accuracy, agents and bytes; stages stand above it."""
    stream = io.StringIO()
    with BarProgress(Console(file=stream, force_terminal=True, width=140, color_system=None)) as bar:
        bar.stage("training [6] agents")
        bar.pruning(1, 2)
        bar.pruning(2, 2)
        tell(bar, 7, accuracy=0.875)

    shown = stream.getvalue()
    assert "training [6] agents" in shown
    for figure in ("7/10", "loss 0.500", "acc 87.5%", "5/6 alive", "1 kB up", "99 kB down"):
        assert figure in shown.rsplit("round", 1)[-1]


def test_bar_fits_a_narrow_terminal():
    """On 80 columns no figure is cut, and the line is no longer."""
    stream = io.StringIO()
    with BarProgress(Console(file=stream, width=80, force_terminal=False)) as bar:
        bar.round(Standing(400, 400, 0.5, 1.0, 16, 16, 123_456_789, 987_654_321))

    last = stream.getvalue().splitlines()[-1]
    assert len(last) <= 80
    assert "123 MB up 988 MB down" in last


def test_silence_is_silent(capsys):
    """With --json nothing but the object may be printed."""
    observer = Silence()
    observer.stage("a")
    observer.line("b")
    observer.pruning(1, 2)
    tell(observer, 1)

    assert capsys.readouterr() == ("", "")
