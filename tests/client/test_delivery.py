"""The recorder and its delivery: what is logged arrives, whatever the log does, and nothing reaches training code."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runstream import hot
from runstream import recorder as recorders
from runstream.config import Settings
from runstream.errors import InvalidInputError, InvalidTypeError
from runstream.journal.recovery import recover
from runstream.recorder import Recorder
from runstream.transport.memory import MemoryTransport
from runstream_schemas import codec, identity
from runstream_schemas.limits import MAX_BODY_BYTES, MAX_TIME_MS

from .directory_log import logged

SECONDS = 20.0
RUN = "1" * 32


class Stage:
    """A recorder over a log in memory."""

    def __init__(self, tmp_path: Path, limit_bytes: int = 1 << 30) -> None:
        self.folder = tmp_path / "journals"
        self.settings = Settings(f"memory://{tmp_path.name}", journal_dir=self.folder, journal_limit_bytes=limit_bytes)
        self.log = MemoryTransport()
        self.recorder = Recorder(self.settings, lambda settings: self.log)
        self.channel = self.recorder.run_channel(RUN)

    def points(self) -> list[tuple[str, int, int, float]]:
        """(key, step, timestamp, value) of everything in the log, each identity once, in order."""
        found: dict[tuple[str, int, int], tuple[str, int, int, float]] = {}
        for event in self.log.metrics:
            body = codec.decode(event.fingerprint, event.body)[1]
            for at, value in enumerate(body["values"]):
                ci = body["ci"][at]
                seq = body["seqs"][at] if body["seqs"] else body["first_seq"] + at
                point = (body["keys"][body["ki"][at]], body["steps"][ci], body["times"][ci], value)
                assert found.setdefault((body["run_id"], body["writer"], seq), point) == point
        return list(found.values())

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return [codec.decode(event.fingerprint, event.body) for event in self.log.control]

    def journals(self) -> list[str]:
        return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.log.away = None
    made.log.release()
    made.recorder.close(SECONDS)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.005)


def test_what_is_logged_arrives(stage: Stage) -> None:
    """Points, dict calls and control events, in order, with their values; and the counts say so."""
    for step in range(1000):
        stage.channel.log_metric("loss", step * 0.5, step)
    stage.channel.log_metrics({"a": 1.0, "b": 2.0}, step=7, timestamp=123)
    stage.recorder.control("params", {"run_id": RUN, "keys": ["lr"], "values": ["0.1"]})
    report = stage.recorder.flush(SECONDS)
    assert report.complete and report.last_error is None
    assert report.delivered_points == 1002
    assert [point[3] for point in stage.points()[:1000]] == [step * 0.5 for step in range(1000)]
    assert stage.points()[1000:] == [("a", 7, 123, 1.0), ("b", 7, 123, 2.0)]
    assert stage.events()[0][1]["keys"] == ["lr"]
    assert report.positions == stage.log.end_positions(1.0)


def test_it_arrives_without_a_flush(stage: Stage) -> None:
    """The delivery thread works by itself, well within a second or two."""
    stage.channel.log_metric("loss", 1.0)
    wait_for(lambda: len(stage.points()) == 1)


def test_the_journal_goes_when_all_is_delivered(stage: Stage) -> None:
    """close leaves no folder; a later call begins a new journal and works."""
    stage.channel.log_metric("loss", 1.0)
    assert len(stage.journals()) == 1
    assert stage.recorder.close(SECONDS).complete
    assert stage.journals() == []
    stage.channel.log_metric("loss", 2.0)
    assert stage.recorder.close(SECONDS).complete
    assert [point[3] for point in stage.points()] == [1.0, 2.0]
    assert stage.journals() == []


def test_no_io_before_the_first_call(tmp_path: Path) -> None:
    """Making recorder and channel touches no disk and starts no thread."""
    before = threading.active_count()
    stage = Stage(tmp_path)
    assert not stage.folder.exists() and threading.active_count() == before
    assert stage.recorder.flush(0.0).complete


def test_a_log_that_is_away_does_not_disturb(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing raises, one warning, everything is kept, and all of it arrives in order when the log is back."""
    stage.log.away = "broker away"
    with caplog.at_level(logging.WARNING, "runstream"):
        for step in range(5000):
            stage.channel.log_metric("loss", float(step), step)
        stage.recorder.control("run_updated", {"run_id": RUN, "status": "RUNNING"})
        report = stage.recorder.flush(0.5)
    assert not report.complete and report.last_error == "broker away" and report.delivered_points == 0
    assert sum("delivery fails" in record.getMessage() for record in caplog.records) == 1
    stage.log.away = None
    assert stage.recorder.flush(SECONDS).complete
    assert [point[1] for point in stage.points()] == list(range(5000))


def test_an_acknowledgement_that_fails_late_is_resent(stage: Stage) -> None:
    """Events that were handed over but not acknowledged are sent again, under the same identities."""
    stage.log.holding = True
    for step in range(2000):
        stage.channel.log_metric("loss", float(step), step)
    assert not stage.recorder.flush(0.3).complete
    stage.log.away = "died with our events"
    wait_for(lambda: stage.recorder.report().last_error is not None)
    stage.log.away = None
    stage.log.release()
    assert stage.recorder.flush(SECONDS).complete
    assert [point[1] for point in stage.points()] == list(range(2000))


def test_the_journal_is_not_trimmed_before_the_acknowledgement(stage: Stage) -> None:
    """What a log has not acknowledged is still in the files: another process could deliver it."""
    stage.log.holding = True
    for step in range(300_000):
        stage.channel.log_metric("loss", float(step), step)
    stage.recorder.flush(0.3)
    (folder,) = stage.folder.iterdir()
    held = sum(path.stat().st_size for path in folder.glob("*.seg"))
    assert held >= 300_000 * 32
    stage.log.release()
    assert stage.recorder.flush(SECONDS).complete
    assert len(list(folder.glob("*.seg"))) <= 2
    assert len(stage.points()) == 300_000


def test_a_refused_body_is_kept_aside_and_the_rest_goes_on(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """One event that can never succeed is isolated, counted and kept as a file; everything else arrives."""
    stage.log.away = "wait"
    for number in range(10):
        stage.recorder.control("params", {"run_id": RUN, "keys": [f"p{number}"], "values": ["v"], "time_ms": 5})
    (folder,) = stage.folder.iterdir()
    from runstream_schemas.segment import Frame, read_frames

    control = (folder / "control-00000000000000000000.log").read_bytes()
    frames = [frame for frame in read_frames(control, 0) if isinstance(frame, Frame)]
    stage.log.refused.add(frames[4].body)
    stage.log.away = None
    report = stage.recorder.flush(SECONDS)
    assert report.complete and report.refused_events == 1
    assert [body["keys"] for _, body in stage.events()] == [[f"p{number}"] for number in range(10) if number != 4]
    (kept,) = (folder / "refused").iterdir()
    (frame,) = read_frames(kept.read_bytes(), 0)
    assert isinstance(frame, Frame) and frame.body == frames[4].body
    stage.recorder.close(SECONDS)
    assert (stage.folder / "kept" / folder.name / "refused" / kept.name).exists()


def test_close_leaves_the_rest_for_recovery(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Where the log stays away the journal stays, unlocked, and whoever comes next delivers it."""
    stage.log.away = "away for long"
    stage.channel.log_metric("loss", 1.0, 3)
    stage.recorder.control("run_updated", {"run_id": RUN, "status": "FINISHED"})
    report = stage.recorder.close(0.2)
    assert not report.complete and len(stage.journals()) == 1
    assert any("not everything could be delivered" in record.getMessage() for record in caplog.records)
    stage.log.away = None
    found = recover(stage.settings, SECONDS, connect=lambda settings: stage.log)
    assert (found.journals, found.points) == (1, 1) and not found.unfinished
    assert stage.points()[0][:2] == ("loss", 3) and stage.events()[0][1]["status"] == "FINISHED"
    assert stage.journals() == []


def test_a_new_process_delivers_what_another_left(stage: Stage, tmp_path: Path) -> None:
    """The delivery thread looks for orphans of its target by itself."""
    stage.log.away = "away"
    stage.channel.log_metric("old", 1.0)
    stage.recorder.close(0.1)
    stage.log.away = None
    stage.channel.log_metric("new", 2.0)
    wait_for(lambda: len(stage.points()) == 2)
    assert sorted(point[0] for point in stage.points()) == ["new", "old"]
    wait_for(lambda: len(stage.journals()) == 1)


def test_heartbeats_of_open_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent open run gets an event that sets nothing; a closed one does not."""
    monkeypatch.setattr(recorders, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(recorders, "CHORES_SECONDS", 0.05)
    stage.recorder.open_run(RUN)
    stage.recorder.open_run("2" * 32)
    stage.recorder.close_run("2" * 32)
    stage.channel.log_metric("loss", 1.0)
    wait_for(lambda: len(stage.events()) >= 2)
    assert {body["run_id"] for _, body in stage.events()} == {RUN}
    assert {(body["status"], body["ended_at"]) for _, body in stage.events()} == {("", -1)}


def test_versions_grow_when_the_clock_goes_back(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later fact wins also when the wall clock jumped back between the two."""
    times = iter([5_000, 4_000, 4_500, 6_000])
    monkeypatch.setattr(recorders, "now_ms", lambda: next(times))
    versions = [stage.recorder.next_version() for _ in range(4)]
    assert versions == sorted(versions) and [version.time_ms for version in versions] == [5_000, 5_000, 5_000, 6_000]
    assert len({version.packed() for version in versions}) == 4


def test_many_runs_share_a_journal(stage: Stage) -> None:
    """Points of several runs, written in turn, each arrive under their run."""
    channels = [stage.recorder.run_channel(f"{number:032x}") for number in range(5)]
    for step in range(2000):
        channels[step % 5].log_metric("loss", float(step), step)
    assert stage.recorder.flush(SECONDS).complete
    found: dict[str, list[int]] = {}
    for event in stage.log.metrics:
        body = codec.decode(event.fingerprint, event.body)[1]
        assert event.key == body["run_id"]
        found.setdefault(body["run_id"], []).extend(body["steps"][ci] for ci in body["ci"])
    assert found == {channel.run_id: list(range(number, 2000, 5)) for number, channel in enumerate(channels)}
    assert len(stage.journals()) == 1


def test_threads_lose_nothing_over_segment_switches(tmp_path: Path) -> None:
    """Eight threads, many small segments, delivery beside them: every point once."""
    stage = Stage(tmp_path)
    from runstream.journal import journal

    largest = journal.MAX_SEGMENT_BYTES
    journal.MAX_SEGMENT_BYTES = 64 * 1024
    try:

        def work(thread: int) -> None:
            for step in range(10_000):
                stage.channel.log_metric(f"thread {thread}", float(step), step)

        crew = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for member in crew:
            member.start()
        for member in crew:
            member.join()
        assert stage.recorder.close(60.0).complete
    finally:
        journal.MAX_SEGMENT_BYTES = largest
    steps: dict[str, list[int]] = {}
    for key, step, _, _ in stage.points():
        steps.setdefault(key, []).append(step)
    assert {key: sorted(found) for key, found in steps.items()} == {
        f"thread {thread}": list(range(10_000)) for thread in range(8)
    }


def test_a_signal_handler_may_log_flush_and_report(stage: Stage) -> None:
    """A handler that interrupts logging anywhere, slow path included, neither deadlocks nor loses a point."""
    handled = 0

    def handler(number: int, frame: object) -> None:
        nonlocal handled
        handled += 1
        stage.channel.log_metric(f"handled {handled}", 1.0, handled)
        stage.recorder.control("run_updated", {"run_id": RUN, "status": "KILLED"})
        if handled % 10 == 0:
            stage.recorder.flush(5.0)
            stage.recorder.report()

    old = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.003)
    logged_points = 0
    try:
        deadline = time.monotonic() + SECONDS
        while handled < 60 and time.monotonic() < deadline:
            stage.channel.log_metric(f"key {logged_points}", 1.0, logged_points)  # always the slow path
            logged_points += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, old)
    assert handled >= 60
    assert stage.recorder.flush(SECONDS).complete
    assert len({point[0] for point in stage.points()}) == logged_points + handled
    assert len(stage.events()) == handled


GOOD: list[tuple[Any, float]] = [
    (1, 1.0),
    (True, 1.0),
    (0.1, 0.1),
    (math.inf, math.inf),
    (-math.inf, -math.inf),
    (Decimal("0.25"), 0.25),
    (Fraction(1, 4), 0.25),
    (np.float64(0.5), 0.5),
    (np.float32(0.5), 0.5),
    (np.float16(0.5), 0.5),
    (np.int8(-3), -3.0),
    (np.uint64(2**63), float(2**63)),
    (np.bool_(True), 1.0),
    (np.array(2.5), 2.5),
    (np.array([2.5]), 2.5),
    (-0.0, -0.0),
    (10**300, 1e300),
]


@pytest.mark.parametrize(("value", "expected"), GOOD, ids=repr)
def test_numbers_of_all_kinds_are_taken(stage: Stage, value: Any, expected: float) -> None:
    """By each way in, the first time a key is used and later."""
    stage.channel.log_metric("k", value, 1)
    stage.channel.log_metric("k", value, 2)
    stage.channel.log_metrics({"k": value, "l": 1.0}, 3)
    stage.channel.log_metrics({"k": value, "l": 1.0}, 4)
    stage.recorder.flush(SECONDS)
    assert [point[3] for point in stage.points() if point[0] == "k"] == [expected] * 4


def test_nan_is_kept(stage: Stage) -> None:
    """NaN arrives as NaN."""
    stage.channel.log_metric("k", math.nan)
    stage.recorder.flush(SECONDS)
    assert math.isnan(stage.points()[0][3])


class Tensor:
    """Looks like a torch scalar."""

    def __init__(self, value: Any, shape: tuple[int, ...] = (), *, is_complex: bool = False) -> None:
        self.shape = shape
        self.dtype = type("dtype", (), {"is_complex": is_complex})()
        self._value = value

    def item(self) -> Any:
        if self.shape not in ((), (1,)):
            raise RuntimeError("a Tensor with 6 elements cannot be converted to Scalar")
        return self._value

    def __float__(self) -> float:
        return float(self.item())


def test_tensors_of_one_element_are_taken(stage: Stage) -> None:
    """Recognised by what they can do, not by their module."""
    stage.channel.log_metric("k", Tensor(0.5))
    stage.channel.log_metric("k", Tensor(0.5, (1,)))
    stage.recorder.flush(SECONDS)
    assert [point[3] for point in stage.points()] == [0.5, 0.5]


BAD = [
    "1.5",
    b"1",
    None,
    1j,
    np.complex64(1),
    np.complex128(1),
    np.str_("1.5"),
    np.datetime64("2020-01-01"),
    np.timedelta64(1, "s"),
    np.array([1.0, 2.0]),
    np.array(["a"]),
    [1.0],
    {"a": 1},
    object(),
    Tensor(1.0, (2, 3)),
    Tensor(1j, is_complex=True),
    float,
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_at_the_call(stage: Stage, value: Any) -> None:
    """The error names key and value, at the first use of a key and later; nothing is logged."""
    stage.channel.log_metric("good", 1.0)
    stage.channel.log_metrics({"good": 1.0, "k": 2.0})
    for call in (
        lambda: stage.channel.log_metric("k", value),
        lambda: stage.channel.log_metric("good", value),
        lambda: stage.channel.log_metrics({"good": 1.0, "k": value}),
    ):
        with pytest.raises(TypeError, match=r"metric '(k|good)' must be one number, not ") as caught:
            call()
        assert isinstance(caught.value, InvalidTypeError)
    stage.recorder.flush(SECONDS)
    assert len(stage.points()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("k", 10**400), "beyond the range of a float"),
        (("k", 1.0, 2**63), "does not fit into 64 bits"),
        (("k", 1.0, -(2**63) - 1), "does not fit into 64 bits"),
        (("k", 1.0, 1.5), "step must be an integer"),
        (("k", 1.0, "1"), "step must be an integer"),
        (("k", 1.0, math.nan), "step must be an integer"),
        (("k", 1.0, 0, -1), "outside 1970"),
        (("k", 1.0, 0, MAX_TIME_MS), "outside 1970"),
        (("k", 1.0, 0, "now"), "timestamp must be"),
        (("k", 1.0, 0, math.nan), "timestamp must be"),
        (("", 1.0), "empty"),
        (("k" * 251, 1.0), "limit is 250"),
        (("a\nb", 1.0), "character"),
        (("a\x00b", 1.0), "character"),
        (("\ud800", 1.0), "surrogate"),
        ((7, 1.0), "metric key must be a str"),
        ((None, 1.0), "metric key must be a str"),
        ((["k"], 1.0), "metric key must be a str"),
    ],
)
def test_arguments_out_of_range_are_refused(stage: Stage, arguments: tuple[Any, ...], message: str) -> None:
    """Each error names the thing; the point is not logged, also where the key is known."""
    stage.channel.log_metric("k", 1.0)
    with pytest.raises(InvalidInputError, match=message):
        stage.channel.log_metric(*arguments)
    key, value, *rest = arguments
    if not isinstance(key, list):
        with pytest.raises(InvalidInputError, match=message):
            stage.channel.log_metrics({key: value}, *rest)
    stage.recorder.flush(SECONDS)
    assert len(stage.points()) == 1


@pytest.mark.parametrize("metrics", [None, 1.0, "loss", [("loss", 1.0)], {"loss"}])
def test_log_metrics_takes_only_mappings(stage: Stage, metrics: Any) -> None:
    """Anything else is a TypeError that says so."""
    with pytest.raises(InvalidTypeError, match="takes a dict"):
        stage.channel.log_metrics(metrics)


def test_extreme_steps_and_times_are_exact(stage: Stage) -> None:
    """The ends of the legal ranges arrive as they are; a step left out is 0."""
    stage.channel.log_metric("k", 1.0, 2**63 - 1, 0)
    stage.channel.log_metric("k", 1.0, -(2**63), MAX_TIME_MS - 1)
    stage.channel.log_metric("k", 1.0, np.int64(5), 7)
    stage.channel.log_metric("k", 1.0, 3.0, np.int64(8))
    stage.channel.log_metric("k", 1.0, timestamp=9)
    stage.recorder.flush(SECONDS)
    assert [point[1:3] for point in stage.points()] == [
        (2**63 - 1, 0),
        (-(2**63), MAX_TIME_MS - 1),
        (5, 7),
        (3, 8),
        (0, 9),
    ]


def test_large_and_many_dict_calls(stage: Stage) -> None:
    """A dict too large for one record and more key combinations than are kept as shapes arrive all the same."""
    large = {f"key {number}": float(number) for number in range(6000)}
    stage.channel.log_metrics(large, 1)
    for number in range(1200):
        stage.channel.log_metrics({f"key {number}": 1.0, "other": 2.0}, 2)
    stage.channel.log_metrics({}, 3)
    stage.recorder.flush(SECONDS)
    found = stage.points()
    assert {key: value for key, step, _, value in found if step == 1} == large
    assert sum(step == 2 for _, step, _, _ in found) == 2400


def test_very_many_keys_warn_once(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Above 5,000 keys in a run there is one warning, and nothing is refused."""
    for number in range(5_100):
        stage.channel.log_metric(f"key {number}", 1.0)
    assert sum("distinct metric keys" in record.getMessage() for record in caplog.records) == 1
    stage.recorder.flush(SECONDS)
    assert len(stage.points()) == 5_100


def test_a_large_control_event_is_split(stage: Stage) -> None:
    """Params and tags beyond one body go as several events of one version; one that cannot be split is an error."""
    keys = [f"p{number}" for number in range(40)]
    version = stage.recorder.control("params", {"run_id": RUN, "keys": keys, "values": ["v" * 60_000] * 40})
    stage.recorder.flush(SECONDS)
    bodies = [body for _, body in stage.events()]
    assert len(bodies) > 2 and [key for body in bodies for key in body["keys"]] == keys
    assert {(body["time_ms"], body["seq"], body["writer"]) for body in bodies} == {tuple(version)}
    assert all(len(event.body) <= MAX_BODY_BYTES for event in stage.log.control)
    with pytest.raises(InvalidInputError, match="the limit is"):
        stage.recorder.control("params", {"run_id": RUN, "keys": ["p"], "values": ["v" * 1_000_000]})


def test_control_events_of_a_wrong_form_raise_at_the_call(stage: Stage) -> None:
    """A CodecError, and nothing is in the journal."""
    with pytest.raises(codec.CodecError):
        stage.recorder.control("params", {"run_id": RUN, "keys": "p", "values": 7})
    stage.recorder.flush(SECONDS)
    assert stage.events() == []


def test_experiment_events_go_to_the_first_partition(stage: Stage) -> None:
    """Also after a detour through the journal's file."""
    stage.recorder.control(
        "experiment_created", {"experiment_id": "0", "name": "x", "artifact_uri": "", "created_at": 1}
    )
    stage.recorder.control("run_updated", {"run_id": RUN})
    stage.recorder.flush(SECONDS)
    assert [event.first_partition for event in stage.log.control] == [True, False]


def test_explicit_versions_are_kept(stage: Stage) -> None:
    """Fields that the caller stamped are not overwritten."""
    version = stage.recorder.control("run_updated", {"run_id": RUN, "time_ms": 1, "seq": 2, "writer": 3})
    assert version == identity.Version(1, 2, 3)


def test_the_module_functions_follow_the_active_channel(stage: Stage) -> None:
    """activate switches runs; explicit run ids and no active run go to the slow functions."""
    other = stage.recorder.run_channel("2" * 32)
    slow: list[tuple[Any, ...]] = []
    before = (hot._slow_metric, hot._slow_metrics, hot._channel)
    hot.on_slow(lambda *arguments: slow.append(arguments), lambda *arguments: slow.append(arguments))
    try:
        hot.activate(stage.channel)
        for step in range(3):
            hot.log_metric("k", 1.0, step)
        hot.log_metric("k", 2, 3, None, 44)
        hot.activate(other)
        hot.log_metric("k", 1.5, step=9)
        hot.log_metrics({"k": 1.0, "l": 2.0}, 10)
        hot.log_metric("k", 1.0, run_id="3")
        hot.log_metrics({"k": 1.0}, dataset="d")
        hot.activate(None)
        hot.log_metric("k", 1.0, 5)
    finally:
        hot.on_slow(before[0], before[1])
        hot.activate(before[2])
    assert slow == [
        ("k", 1.0, None, None, "3", None, None),
        ({"k": 1.0}, None, None, None, None, "d"),
        ("k", 1.0, 5, None, None, None, None),
    ]
    stage.recorder.flush(SECONDS)
    assert [(key, step) for key, step, _, _ in stage.points()] == [
        ("k", 0), ("k", 1), ("k", 2), ("k", 3), ("k", 9), ("k", 10), ("l", 10),
    ]  # fmt: skip
    assert [event.key for event in stage.log.metrics] == [RUN, "2" * 32]


@pytest.mark.parametrize("value", [1.0, 1])
def test_the_module_function_survives_segment_switches_and_close(stage: Stage, value: float) -> None:
    """Its stale write is replaced by itself, also by that of a new journal; then the fast path is fast again."""
    before = hot._channel
    hot.activate(stage.channel)
    try:
        for step in range(30_000):
            hot.log_metric("k", value, step)
        assert hot._write is stage.channel.hot()[0]
        stage.recorder.close(SECONDS)
        for step in range(30_000, 30_010):
            hot.log_metric("k", 1.0, step)
    finally:
        hot.activate(before)
    stage.recorder.flush(SECONDS)
    assert [point[1] for point in stage.points()] == list(range(30_010))


# -- processes: fork, exit, signals


def run_program(program: str, data: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-W", "error", "-c", program, str(data), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


PROLOGUE = """
import os, sys, time, threading
from pathlib import Path
from runstream.config import Settings
from runstream import recorder
settings = Settings.from_environment({}, tracking_uri=sys.argv[1])
rec = recorder.for_target(settings)
run = rec.run_channel("1" * 32)
"""


def steps_by_key(data: Path) -> dict[str, list[int]]:
    """Steps of every metric key in the directory log, each (writer, seq, run) once."""
    found: dict[tuple[str, int, int], tuple[str, int]] = {}
    for event, body in logged(data):
        if event == "metric_batch":
            for at in range(len(body["values"])):
                seq = body["seqs"][at] if body["seqs"] else body["first_seq"] + at
                place = (body["keys"][body["ki"][at]], body["steps"][body["ci"][at]])
                assert found.setdefault((body["run_id"], body["writer"], seq), place) == place
    steps: dict[str, list[int]] = {}
    for key, step in found.values():
        steps.setdefault(key, []).append(step)
    return {key: sorted(numbers) for key, numbers in steps.items()}


def test_exit_delivers_what_waits(tmp_path: Path) -> None:
    """A program that just ends has delivered everything, and leaves no journal."""
    run_program(PROLOGUE + "[run.log_metric('k', 1.0, step) for step in range(50_000)]", tmp_path)
    assert steps_by_key(tmp_path) == {"k": list(range(50_000))}
    assert os.listdir(tmp_path / "journal") == []


def test_exit_is_bounded_and_the_rest_is_recovered(tmp_path: Path) -> None:
    """With the log out of reach the exit takes its time-out and no longer; the next process delivers."""
    tmp_path.joinpath("log").write_text("in the way")
    begun = time.monotonic()
    program = PROLOGUE.replace("from_environment({}", "from_environment({'RUNSTREAM_EXIT_TIMEOUT_SECONDS': '0.5'}")
    said = run_program(program + "[run.log_metric('k', 1.0, step) for step in range(100)]", tmp_path)
    assert time.monotonic() - begun < 20
    assert "The rest waits in the journal" in said
    tmp_path.joinpath("log").unlink()
    report = recover(Settings.from_environment({}, tracking_uri=tmp_path), SECONDS)
    assert report.points == 100
    assert steps_by_key(tmp_path) == {"k": list(range(100))}


def test_an_exception_at_exit_time_still_delivers(tmp_path: Path) -> None:
    """An uncaught exception and sys.exit go through the same exit."""
    run_program(PROLOGUE + "run.log_metric('k', 1.0, 1)\nraise RuntimeError('training failed')", tmp_path, code=1)
    assert steps_by_key(tmp_path) == {"k": [1]}


def test_logging_in_other_exit_handlers(tmp_path: Path) -> None:
    """A handler that runs after ours logs into a new journal, which is delivered now or by the next process."""
    program = "import atexit\n" + "late = []\natexit.register(lambda: late[0].log_metric('late', 1.0, 2))\n" + PROLOGUE
    run_program(program + "late.append(run)\nrun.log_metric('k', 1.0, 1)", tmp_path)
    recover(Settings.from_environment({}, tracking_uri=tmp_path), SECONDS)
    assert steps_by_key(tmp_path) == {"k": [1], "late": [2]}


def test_fork_in_the_middle(tmp_path: Path) -> None:
    """Parent and children go on logging with the same objects; nothing is lost or overwritten in either."""
    program = (
        PROLOGUE
        + """
for step in range(1000): run.log_metric("parent", 1.0, step)
pids = []
for child in range(3):
    pid = os.fork()
    if not pid:
        for step in range(1000):
            run.log_metric("parent", 1.0, 10_000 * (child + 1) + step)
            run.log_metric(f"child {child}", 1.0, step)
        sys.exit(0)
    pids.append(pid)
    for step in range(1000): run.log_metric("parent", 1.0, 1000 * (child + 1) + step)
for pid in pids: assert os.waitpid(pid, 0)[1] == 0
"""
    )
    run_program(program.replace("-W", ""), tmp_path)
    found = steps_by_key(tmp_path)
    expected = [*range(4000)] + [10_000 * child + step for child in (1, 2, 3) for step in range(1000)]
    assert found["parent"] == expected
    assert [found[f"child {child}"] for child in range(3)] == [list(range(1000))] * 3
    assert os.listdir(tmp_path / "journal") == []


def test_a_forked_child_that_skips_exit_handlers(tmp_path: Path) -> None:
    """os._exit leaves the child's journal, which is recovered; the parent's is untouched."""
    program = (
        PROLOGUE
        + """
run.log_metric("parent", 1.0, 1)
if not os.fork():
    run.log_metric("child", 1.0, 2)
    rec.control("run_updated", {"run_id": "1" * 32, "status": "FINISHED"})
    os._exit(0)
os.wait()
run.log_metric("parent", 1.0, 3)
rec.close(20)
"""
    )
    run_program(program, tmp_path)
    recover(Settings.from_environment({}, tracking_uri=tmp_path), SECONDS)
    assert steps_by_key(tmp_path) == {"parent": [1, 3], "child": [2]}
    assert sum(event == "run_updated" for event, _ in logged(tmp_path)) == 1


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_deliver_at_their_end(tmp_path: Path, method: str) -> None:
    """multiprocessing skips atexit in its children; ours are delivered before the child ends all the same."""
    script = tmp_path / "program.py"
    body = (
        PROLOGUE
        + f"""
import multiprocessing
def work(number):
    for step in range(500): run.log_metric(f"worker {{number}}", 1.0, step)
if __name__ == "__main__":
    run.log_metric("main", 1.0, 0)
    context = multiprocessing.get_context("{method}")
    crew = [context.Process(target=work, args=(number,)) for number in range(3)]
    [process.start() for process in crew]
    [process.join() for process in crew]
    assert [process.exitcode for process in crew] == [0, 0, 0]
    left = [name for name in os.listdir(Path(sys.argv[1]) / "journal")]
    assert len(left) == 1, left  # only our own: theirs are delivered and gone
"""
    )
    script.write_text(body)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "data")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = steps_by_key(tmp_path / "data")
    assert found == {"main": [0], **{f"worker {number}": list(range(500)) for number in range(3)}}


def test_a_child_outlives_its_parent(tmp_path: Path) -> None:
    """A daemonised child keeps nothing of the parent's journal alive: it is recovered while the child still runs."""
    program = (
        PROLOGUE
        + """
run.log_metric("parent", 1.0, 1)
if not os.fork():
    os.close(1); os.close(2)
    while not os.path.exists(sys.argv[2]): time.sleep(0.01)
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    )
    stop = tmp_path / "stop"
    try:
        run_program(program, tmp_path / "data", str(stop), code=-9)
        report = recover(Settings.from_environment({}, tracking_uri=tmp_path / "data"), SECONDS)
        assert report.journals == 1 and steps_by_key(tmp_path / "data") == {"parent": [1]}
    finally:
        stop.write_text("")


def test_the_module_function_in_a_forked_child(tmp_path: Path) -> None:
    """The global fast path of the child does not write into the parent's journal."""
    program = (
        PROLOGUE
        + """
from runstream import hot
hot.activate(run)
for step in range(100): hot.log_metric("k", 1.0, step)
pid = os.fork()
if not pid:
    for step in range(100, 200): hot.log_metric("k", 1.0, step)
    hot.log_metrics({"k": 1.0, "l": 1.0}, 200)
    sys.exit(0)
for step in range(300, 400): hot.log_metric("k", 1.0, step)
assert os.waitpid(pid, 0)[1] == 0
"""
    )
    run_program(program, tmp_path)
    assert steps_by_key(tmp_path) == {"k": [*range(201), *range(300, 400)], "l": [200]}


def test_somebody_logs_while_it_is_closed(stage: Stage) -> None:
    """Points logged by another thread during close are delivered then or afterwards, without a further call."""
    stop = threading.Event()
    count = 0

    def work() -> None:
        nonlocal count
        while not stop.is_set():
            stage.channel.log_metric("k", 1.0, count)
            count += 1
            time.sleep(0.0002)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(10):
        assert stage.recorder.close(SECONDS).complete
        time.sleep(0.01)
    stop.set()
    thread.join()
    wait_for(lambda: len(stage.points()) == count)
    assert sorted(point[1] for point in stage.points()) == list(range(count))


def test_a_bug_in_the_transport_does_not_end_delivery(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """An exception that no transport should raise is logged once, and the same events are sent again."""
    send = stage.log.send
    failures = iter([RuntimeError("bug"), ZeroDivisionError("bug")])

    def broken(events: Any) -> Any:
        for failure in failures:
            raise failure
        return send(events)

    stage.log.send = broken  # type: ignore[method-assign]
    for step in range(1000):
        stage.channel.log_metric("k", 1.0, step)
    assert stage.recorder.flush(SECONDS).complete
    assert [point[1] for point in stage.points()] == list(range(1000))
    assert sum("unexpected error" in record.getMessage() for record in caplog.records) == 1
