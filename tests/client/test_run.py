"""Runs in one process: nesting, threads, resuming, ranks, forks, system metrics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import runstream
from runstream.active import tracker
from runstream.config import Settings
from runstream.journal.recovery import recover
from runstream.testing import Recording, recording
from tests.client.directory_log import logged


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recording]:
    for name in ("RUNSTREAM_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    tracker._environment_run_used = False
    with recording() as recorded:
        yield recorded
    tracker._environment_run_used = False


def statuses(recorded: Recording, run_id: str) -> list[str]:
    """Every status that was written for a run."""
    return [
        fields["status"]
        for name, fields in recorded.events
        if name == "run_updated" and fields["run_id"] == run_id and fields["status"]
    ]


def test_a_with_block_ends_its_run(recorded: Recording) -> None:
    """RUNNING, then FINISHED with an end time."""
    with runstream.start_run() as run:
        assert runstream.active_run() is run
        assert run.info.status == "RUNNING"
    assert runstream.active_run() is None
    assert statuses(recorded, run.info.run_id) == ["RUNNING", "FINISHED"]
    last = runstream.last_active_run()
    assert last is not None
    assert (last.info.run_id, last.info.status) == (run.info.run_id, "FINISHED")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (SystemExit(1), "FAILED"),
        (SystemExit("message"), "FAILED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(), "FINISHED"),
        (KeyboardInterrupt(), "KILLED"),
        (GeneratorExit(), "FAILED"),
    ],
    ids=repr,
)
def test_exceptions_decide_the_status(recorded: Recording, error: BaseException, status: str) -> None:
    """The exception goes on unchanged, and the run says how it ended."""
    with pytest.raises(type(error)), runstream.start_run() as run:
        raise error
    assert statuses(recorded, run.info.run_id) == ["RUNNING", status]


def test_a_second_run_needs_nested(recorded: Recording) -> None:
    """Starting over an open run is an error that names it; nested runs know their parent."""
    with runstream.start_run() as outer:
        with pytest.raises(runstream.InvalidInputError, match=f"{outer.info.run_id}.*nested=True"):
            runstream.start_run()
        with runstream.start_run(nested=True) as inner:
            assert runstream.active_run() is inner
        assert runstream.active_run() is outer
        runstream.log_metric("after", 1.0)
    found = recorded.run(inner.info.run_id)
    assert found.info.parent_run_id == outer.info.run_id
    assert found.data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert recorded.run(outer.info.run_id).data.metrics == {"after": 1.0}
    with runstream.start_run(parent_run_id=outer.info.run_id) as child:
        assert child.info.parent_run_id == outer.info.run_id


def test_an_outer_run_may_end_first(recorded: Recording) -> None:
    """Ends that are out of order each end their own run, once."""
    outer = runstream.start_run()
    inner = runstream.start_run(nested=True)
    outer.end()
    assert runstream.active_run() is inner
    outer.end("FAILED")
    inner.end()
    assert statuses(recorded, outer.info.run_id) == ["RUNNING", "FINISHED"]


def test_new_threads_see_the_active_run(recorded: Recording) -> None:
    """The active run is the process's, not the thread's."""
    with runstream.start_run() as run:
        threads = [threading.Thread(target=runstream.log_metric, args=("x", float(i), i)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(point.value for point in recorded.metric(run.info.run_id, "x")) == [float(i) for i in range(8)]


def test_names_are_readable_and_follow_from_the_id(recorded: Recording) -> None:
    """Without a name a run gets adjective-animal-number, the same in every process of the run."""
    from runstream.run_name import name_for

    with runstream.start_run() as run:
        adjective, animal, number = run.info.run_name.split("-")
    assert adjective.isalpha()
    assert animal.isalpha()
    assert 0 <= int(number) < 1000
    assert name_for(run.info.run_id) == run.info.run_name
    assert len({name_for(str(i)) for i in range(1000)}) > 990


def test_renaming_by_the_reserved_tag(recorded: Recording) -> None:
    """Setting mlflow.runName renames the run, as MLflow's UI does."""
    with runstream.start_run() as run:
        runstream.set_tag("mlflow.runName", "better")
        assert run.info.run_name == "better"
    assert recorded.run(run.info.run_id).info.run_name == "better"


def test_resuming_the_last_run(recorded: Recording) -> None:
    """Same id, name, start and params; status RUNNING again, then FINISHED."""
    with runstream.start_run(run_name="again") as first:
        runstream.log_param("lr", 1)
    with runstream.start_run(run_id=first.info.run_id, run_name="ignored") as second:
        assert second.info.run_name == "again"
        assert second.info.start_time == first.info.start_time
        runstream.log_metric("x", 1.0)
        with pytest.raises(runstream.InvalidInputError, match="lr"):
            runstream.log_param("lr", 2)
    assert statuses(recorded, first.info.run_id) == ["RUNNING", "FINISHED"] * 2
    (found,) = recorded.runs
    assert (found.info.run_name, found.data.metrics) == ("again", {"x": 1.0})


def test_resuming_into_another_experiment_is_refused(recorded: Recording) -> None:
    """A run belongs to one experiment for ever."""
    with runstream.start_run() as run:
        pass
    with pytest.raises(runstream.InvalidInputError, match="belongs to experiment 0"):
        runstream.start_run(run_id=run.info.run_id, experiment_id="5")
    assert runstream.active_run() is None


def test_the_environments_run_is_joined_once(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNSTREAM_RUN_ID is the first run of the process; the next one is new."""
    monkeypatch.setenv("RUNSTREAM_RUN_ID", "given-by-launcher")
    with runstream.start_run(run_name="named here") as run:
        assert run.info.run_id == "given-by-launcher"
        with runstream.start_run(nested=True) as inner:
            assert inner.info.run_id != "given-by-launcher"
    with runstream.start_run() as other:
        assert other.info.run_id != "given-by-launcher"
    assert statuses(recorded, "given-by-launcher") == ["RUNNING", "FINISHED"]
    assert recorded.run("given-by-launcher").info.run_name == "named here"


def test_helper_ranks_never_write_the_status(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK > 0 logs to the shared run and leaves its state alone."""
    monkeypatch.setenv("RUNSTREAM_RUN_ID", "shared")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="x"), runstream.start_run() as run:
        assert run.info.run_id == "shared"
        runstream.log_metric("rank3/loss", 1.0)
        raise ValueError("x")
    assert statuses(recorded, "shared") == []
    assert recorded.run("shared").data.metrics == {"rank3/loss": 1.0}


def test_a_rank_without_a_shared_run_has_its_own(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK alone changes nothing."""
    monkeypatch.setenv("RANK", "1")
    with runstream.start_run() as run:
        pass
    assert statuses(recorded, run.info.run_id) == ["RUNNING", "FINISHED"]


def test_heartbeats_last_as_long_as_the_run(recorded: Recording) -> None:
    """The recorder keeps a run alive from start to end, not longer."""
    recorder = tracker.writer().recorder
    with runstream.start_run() as run:
        assert run.info.run_id in recorder.open_runs
    assert run.info.run_id not in recorder.open_runs


def test_system_metrics_are_off_until_asked_for(recorded: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument, by switch or by environment, and with a point even for a short run."""

    def keys() -> set[str]:
        return set(recorded.runs[-1].data.metrics)

    with runstream.start_run():
        pass
    assert keys() == set()
    with runstream.start_run(log_system_metrics=True):
        pass
    assert "system/cpu_utilization_percentage" in keys()
    try:
        runstream.enable_system_metrics_logging()
        runstream.set_system_metrics_node_id("n1")
        with runstream.start_run():
            pass
        assert "system/n1/system_memory_usage_megabytes" in keys()
        with runstream.start_run(log_system_metrics=False):
            pass
        assert keys() == set()
    finally:
        runstream.set_system_metrics_node_id(None)
        tracker.system_metrics = None
    monkeypatch.setenv("RUNSTREAM_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    with runstream.start_run():
        pass
    assert "system/disk_usage_percentage" in keys()
    monkeypatch.setenv("RUNSTREAM_SYSTEM_METRICS_SAMPLING_INTERVAL", "often")
    with pytest.raises(runstream.InvalidInputError, match="SAMPLING_INTERVAL"):
        runstream.start_run()


@pytest.mark.parametrize("call", [-1, 0, "often"])
def test_sampling_settings_are_checked(call: object) -> None:
    """Only positive intervals and counts are accepted, and a refused one changes nothing."""
    before = tracker.system_metrics_changes
    with pytest.raises(runstream.InvalidInputError):
        runstream.set_system_metrics_sampling_interval(call)  # type: ignore[arg-type]
    with pytest.raises(runstream.InvalidInputError):
        runstream.set_system_metrics_samples_before_logging(call)  # type: ignore[arg-type]
    assert tracker.system_metrics_changes == before


def test_hooks_are_put_back(recorded: Recording) -> None:
    """When no run is open, nothing of the process is changed."""
    before = (sys.excepthook, sys.exit, signal.getsignal(signal.SIGTERM))
    with runstream.start_run():
        assert sys.exit is not before[1]
        with runstream.start_run(nested=True):
            pass
        assert sys.exit is not before[1]
    assert (sys.excepthook, sys.exit, signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_sigterm_stays_ignored(recorded: Recording) -> None:
    """A program that ignores SIGTERM keeps doing so."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with runstream.start_run() as run:
            os.kill(os.getpid(), signal.SIGTERM)
        assert statuses(recorded, run.info.run_id) == ["RUNNING", "FINISHED"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_programs_own_sigterm_handler_decides(recorded: Recording) -> None:
    """It is called, may go on logging, and the run is KILLED when it ends."""
    seen: list[int] = []

    def handler(number: int, frame: object) -> None:
        seen.append(number)
        runstream.log_metric("last", 1.0)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with runstream.start_run() as run:
            os.kill(os.getpid(), signal.SIGTERM)
            runstream.log_metric("later", 1.0)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert statuses(recorded, run.info.run_id) == ["RUNNING", "KILLED"]
    assert recorded.run(run.info.run_id).data.metrics == {"last": 1.0, "later": 1.0}
    with runstream.start_run() as run:
        pass
    assert statuses(recorded, run.info.run_id) == ["RUNNING", "FINISHED"]


SCRIPTS = {
    "normal end": ("", "FINISHED", 0),
    "exit 0": ("sys.exit(0)", "FINISHED", 0),
    "exit 3": ("sys.exit(3)", "FAILED", 3),
    "exit message": ("sys.exit('no data')", "FAILED", 1),
    "exit()": ("exit(2)", "FAILED", 2),
    "argparse": ("import argparse; argparse.ArgumentParser().parse_args(['--unknown'])", "FAILED", 2),
    "caught exit": ("try:\n    sys.exit(3)\nexcept SystemExit:\n    pass", "FINISHED", 0),
    "exception": ("1 / 0", "FAILED", 1),
    "own excepthook": ("sys.excepthook = lambda *a: print('mine')\n1 / 0", "FINISHED", 1),
    "interrupt": ("raise KeyboardInterrupt", "KILLED", -2),
    "sigterm": ("import signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhile True: pass", "KILLED", -15),
    "sigterm from a thread": (
        "import signal, threading\nthreading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "while True: runstream.log_metric('busy', 1.0)",
        "KILLED",
        -15,
    ),
    "sigterm with a handler that leaves": (
        "os.kill(os.getpid(), signal.SIGTERM)\nwhile True: pass",
        "KILLED",
        5,
    ),
    "forked child leaves first": (
        "pid = os.fork()\nif pid == 0:\n    runstream.log_metric('child', 1.0)\n    sys.exit(7)\nos.waitpid(pid, 0)",
        "FINISHED",
        0,
    ),
    "forked child dies by SIGTERM": (
        "import signal\npid = os.fork()\nif pid == 0:\n    signal.pause()\nos.kill(pid, signal.SIGTERM)\n"
        "assert os.waitpid(pid, 0)[1] == 15",
        "FINISHED",
        0,
    ),
    "children die by SIGTERM whenever it comes": (
        "import signal, time\nfor i in range(50):\n    pid = os.fork()\n    if pid == 0:\n        signal.pause()\n"
        "    time.sleep(i / 50000)\n    os.kill(pid, signal.SIGTERM)\n    assert os.waitpid(pid, 0)[1] == 15",
        "FINISHED",
        0,
    ),
    "multiprocessing": (
        "import multiprocessing\nworker = multiprocessing.get_context('fork').Process(target=runstream.log_metric, "
        "args=('child', 1.0))\nworker.start(); worker.join(); assert worker.exitcode == 0",
        "FINISHED",
        0,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_end_of_the_process_decides(name: str, tmp_path: Path) -> None:
    """A run left open says how its process ended; the exit code is the program's own; nothing is lost."""
    body, status, code = SCRIPTS[name]
    before = "signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\n" if "handler" in name else ""
    script = tmp_path / "train.py"
    script.write_text(
        f"import os, signal, sys\nimport runstream\n{before}"
        f"runstream.set_tracking_uri({str(tmp_path / 'data')!r})\n"
        "runstream.start_run(run_id=None)\nrunstream.log_metric('x', 1.0)\n" + body + "\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    # What a process killed in a flood could not deliver in time lies in its journal, and any later reader delivers it.
    recover(Settings.from_environment({}, tracking_uri=tmp_path / "data"), 30.0)
    events = logged(tmp_path / "data")
    updates = [fields["status"] for event, fields in events if event == "run_updated" and fields["status"]]
    assert updates == ["RUNNING", status]
    batches = [fields for event, fields in events if event == "metric_batch"]
    assert sum(fields["keys"][ki] == "x" for fields in batches for ki in fields["ki"]) == 1
    if "child', 1.0" in body:
        assert any("child" in fields["keys"] for fields in batches)
