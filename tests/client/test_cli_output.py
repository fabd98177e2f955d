"""Values, tables, JSON and plots of the command line, without a store."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from datetime import UTC, datetime

import pytest

from runstream.cli import text
from runstream.cli.failure import ExitCode, Failure, explain
from runstream.cli.gc import seconds_of
from runstream.cli.output import Column, Output, plain
from runstream.cli.plot import Curve, draw
from runstream.errors import DeadlineError, InvalidInputError, MissingExtraError, NotFoundError, UnavailableError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0, "0"),
        (3.0, "3"),
        (0.1 + 0.2, "0.3"),
        (1e-9, "1e-09"),
        (123456789.123, "1.23457e+08"),
        (10**20, "100000000000000000000"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_number_has_six_digits(value: float | None, shown: str) -> None:
    """Numbers are short for people; integers stay whole."""
    assert text.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0s"), (9.96, "10.0s"), (59, "59s"), (61, "1m 01s"), (3600, "1h 00m"), (90061, "1d 01h"), (-5, "0.0s")],
)
def test_duration(seconds: float, shown: str) -> None:
    """Durations have at most two units; clocks that go backwards show as zero."""
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("ago", "shown"), [(-1000, "now"), (0, "0s ago"), (59_999, "59s ago"), (60_000, "1m ago"), (86_400_000, "1d ago")]
)
def test_age(ago: int, shown: str) -> None:
    """Ages have one unit."""
    assert text.age(1_700_000_000_000 - ago, 1_700_000_000_000) == shown


def test_size() -> None:
    """Sizes use powers of 1024."""
    assert [text.size(n) for n in (None, 0, 1023, 1024, 5 << 30, 1 << 50)] == [
        "", "0 B", "1023 B", "1.0 KiB", "5.0 GiB", "1024.0 TiB",
    ]  # fmt: skip


def test_one_line_hides_control_characters() -> None:
    """A run's name cannot move the cursor or start a new line."""
    assert text.one_line("a\x1b[2Jb\nc\tü") == "a [2Jb c ü"


def test_plain_makes_strict_json() -> None:
    """Everything a store returns becomes JSON without NaN literals."""
    value = {
        "t": datetime(2026, 11, 21, 9, 50, 0, 123000, tzinfo=UTC),
        "f": [1.5, math.nan, math.inf, -math.inf],
        "m": {1: b"\xff"},
    }
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "t": "2026-11-21T09:50:00.123Z",
        "f": [1.5, "NaN", "Infinity", "-Infinity"],
        "m": {"1": "\\xff"},
    }


def test_table_in_a_pipe_is_aligned_and_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal every row is one line and every value whole."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    long = "x" * 300
    Output().table([Column("NAME"), Column("N", right=True)], [[long, "1"], ["b\nc", "10"]])
    lines = out.getvalue().splitlines()
    assert lines[1] == f"{long}   1"
    assert lines[2] == f"{'b c'.ljust(300)}  10"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_on_a_terminal_fits_its_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Long names are cut, columns that do not fit are named in a note, ids stay whole."""
    out, note = _Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", note)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    columns = [Column("ID", keep=True), Column("NAME"), *(Column(f"metric_{n}", right=True) for n in range(12))]
    Output().table(columns, [["0123456789abcd", "a very long name " * 5, *["0.123456"] * 12]])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()
    assert max(len(line) for line in lines) <= width
    assert any("0123456789abcd" in line for line in lines)
    assert "--json shows all" in note.getvalue()


def test_plot_fits_its_width_and_shows_the_range() -> None:
    """A plot is never wider than asked, and its axis carries the extremes."""
    x = list(range(500))
    picture = draw([Curve("loss", x, [100 / (i + 1) for i in x])], width=60, height=10, title="loss")
    lines = picture.splitlines()
    assert max(len(line) for line in lines) <= 60
    assert "100 ┤" in picture
    assert lines[-1].strip().startswith("0") and lines[-1].endswith("499")


def test_plot_keeps_gaps_and_extremes() -> None:
    """NaN and infinite values leave gaps; huge ranges do not overflow; one point is enough."""
    draw([Curve("a", [0, 1, 2], [math.nan, 1.0, math.inf])], width=40)
    draw([Curve("a", [0, 1], [-1.7e308, 1.7e308])], width=40)
    assert "5" in draw([Curve("a", [5], [0.5])], width=40, ascii_only=True)
    with pytest.raises(ValueError, match="no value can be drawn"):
        draw([Curve("a", [0], [math.nan])], width=40)
    with pytest.raises(ValueError, match="not above 0"):
        draw([Curve("a", [0], [-1.0])], width=40, log_y=True)


def test_plot_in_ascii_distinguishes_curves() -> None:
    """Without Unicode only ASCII is printed, with a mark for each curve."""
    picture = draw([Curve("a", [0, 1], [0, 1]), Curve("b", [0, 1], [1, 0])], width=40, ascii_only=True)
    assert picture.isascii()
    assert "* a" in picture and "o b" in picture


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFoundError("no run"), ExitCode.NOT_FOUND),
        (UnavailableError("away"), ExitCode.UNAVAILABLE),
        (DeadlineError("late"), ExitCode.UNAVAILABLE),
        (MissingExtraError("reading", "server"), ExitCode.MISSING_PART),
        (InvalidInputError("bad filter"), ExitCode.USAGE),
        (ModuleNotFoundError("No module named 'chdb'", name="chdb"), ExitCode.MISSING_PART),
        (ModuleNotFoundError("No module named 'runstream.x'", name="runstream.x"), ExitCode.FAILED),
        (ConnectionRefusedError("refused"), ExitCode.UNAVAILABLE),
        (OSError(28, "No space left on device", "/data/x"), ExitCode.FAILED),
        (Failure("as it is", ExitCode.NOT_FOUND), ExitCode.NOT_FOUND),
        (ZeroDivisionError("division by zero"), ExitCode.FAILED),
    ],
)
def test_every_error_has_a_sentence_and_a_code(error: Exception, code: ExitCode) -> None:
    """Errors are told apart for scripts; none is an empty sentence."""
    failure = explain(error)
    assert failure.code == code
    assert str(failure)


def test_full_disk_and_bugs_name_the_remedy() -> None:
    """A full disk says so with its file; an unknown error says how to see its trace."""
    assert str(explain(OSError(28, "No space left on device", "/data/x"))).startswith("/data/x: No space left")
    assert "RUNSTREAM_DEBUG=1" in str(explain(ZeroDivisionError("division by zero")))


@pytest.mark.parametrize(("span", "seconds"), [("30d", 2_592_000), ("1d12h", 129_600), ("90s", 90), ("2w", 1_209_600)])
def test_time_spans(span: str, seconds: int) -> None:
    """Spans add up."""
    assert seconds_of(span) == seconds


@pytest.mark.parametrize("span", ["", "30", "d", "1.5d", "-1d", "1y", "1d 2h"])
def test_wrong_time_spans_are_refused(span: str) -> None:
    """Anything else is an error, never a guess: gc would remove the wrong runs."""
    with pytest.raises(ValueError, match="no time span"):
        seconds_of(span)
