"""Finding and starting the local store process: many readers at once, kills, forks, and starts that cannot succeed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runstream.config import Settings
from runstream_query import Reader, StoreUnavailable, open_reader
from runstream_schemas.layout import DataDirectory, ServerAddress
from tests.query.conftest import gone, wait_until
from tests.query.logged import Logged


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Logged]:
    """A data directory of one test; whatever serves it is stopped in the end."""
    found = Logged(tmp_path / "data")
    try:
        yield found
    finally:
        found.transport.close(1.0)
        pid = found.stop_store()
        if pid is not None:
            wait_until(lambda: gone(pid))


def reader_of(data: Logged) -> Reader:
    return open_reader(Settings.from_environment({}, tracking_uri=data.root))


def address_of(data: Logged) -> ServerAddress:
    found = ServerAddress.read(DataDirectory(data.root).server_file)
    assert found is not None
    return found


def test_many_processes_start_one_store(data: Logged) -> None:
    """Readers in many processes at once end with one local store process, and all of them read."""
    data.run("one", "0")
    data.send()
    script = (
        "import sys; from runstream.config import Settings; from runstream_query import open_reader\n"
        "print(open_reader(Settings.from_environment({}, tracking_uri=sys.argv[1])).get_run('one').info.run_id)"
    )
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(data.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    answers = [each.communicate(timeout=90) for each in readers]
    assert [out.strip() for out, _ in answers] == ["one"] * 6, answers
    said = [error for _, error in answers if "starting the local store" in error]
    assert len(said) == 1
    log = DataDirectory(data.root).server_log.read_text()
    assert log.count("on port") == 1, log


def test_threads_start_one_store(data: Logged) -> None:
    """Threads with readers of their own start one process between them."""
    pids = set()
    failures: list[BaseException] = []

    def read() -> None:
        reader = reader_of(data)
        try:
            reader.get_experiment("0")
            pids.add(address_of(data).pid)
        except BaseException as exc:
            failures.append(exc)
        finally:
            reader.close()

    threads = [threading.Thread(target=read) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert len(pids) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_store_may_vanish(data: Logged, number: int) -> None:
    """The process is killed or leaves between two reads: the next one starts it again and sees all that was logged."""
    reader = reader_of(data)
    try:
        data.run("before", "0")
        data.send()
        assert [run.info.run_id for run in reader.search_runs(["0"])] == ["before"]
        for round_ in range(2):
            pid = data.stop_store(number)
            assert pid is not None
            wait_until(lambda pid=pid: gone(pid))  # type: ignore[misc]
            data.run(f"after{round_}", "0")
            data.send()
            assert reader.get_run(f"after{round_}").info.run_id == f"after{round_}"
            assert address_of(data).pid != pid
    finally:
        reader.close()


def test_a_stale_address_is_not_believed(data: Logged) -> None:
    """An address left by a killed process, on a port where now something else answers, is not used."""
    directory = DataDirectory(data.root)
    directory.database.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=data.root,
        text=True,
    ) as stranger:
        try:
            assert stranger.stdout is not None
            port = int(stranger.stdout.readline().split(" port ")[1].split()[0])
            ServerAddress(stranger.pid, "127.0.0.1", port, "r", "w", "0").write(directory.server_file)
            reader = reader_of(data)
            assert reader.get_experiment("0").name == "Default"
            reader.close()
            assert address_of(data).port != port
        finally:
            stranger.terminate()


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    """Where the store cannot be started, the error carries the process's own sentence, quickly."""
    root = tmp_path / "data"
    (root / "db").mkdir(parents=True)
    (root / "db" / "files").write_text("not a folder")
    reader = open_reader(Settings.from_environment({}, tracking_uri=root))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="cannot be started: cannot make") as caught:
        reader.get_experiment("0")
    assert time.monotonic() - began < 20
    assert "Traceback" not in str(caught.value)


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    """A file where the data directory should be is a clear error."""
    (tmp_path / "data").write_text("x")
    reader = open_reader(Settings.from_environment({}, tracking_uri=tmp_path / "data"))
    with pytest.raises(StoreUnavailable, match="data"):
        reader.get_experiment("0")


def test_paths_with_odd_characters(tmp_path: Path) -> None:
    """Spaces, quotes and letters of other scripts in the path reach the process unchanged."""
    data = Logged(tmp_path / "my data's $(touch x) ключ")
    reader = reader_of(data)
    try:
        assert reader.get_experiment("0").name == "Default"
    finally:
        reader.close()
        pid = data.stop_store()
        if pid is not None:
            wait_until(lambda: gone(pid))


def _read_in_child(root: str) -> str:
    reader = open_reader(Settings.from_environment({}, tracking_uri=root))
    try:
        return reader.get_run("forked").info.run_id
    finally:
        reader.close()


def test_fork(data: Logged) -> None:
    """A forked child of a process that has read something reads with the same reader, and exits normally."""
    data.run("forked", "0")
    data.send()
    reader = reader_of(data)
    reader.get_run("forked")
    # The fork happens while other threads are in the middle of reads and hold the reader's locks.
    stop = threading.Event()

    def keep_reading() -> None:
        while not stop.is_set():
            reader.get_run("forked")

    threads = [threading.Thread(target=keep_reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    if reader.get_run("forked").info.run_id == "forked":
                        code = 0
                finally:
                    os._exit(code)
            status: list[int] = []

            def ended(child: int = child, status: list[int] = status) -> bool:
                pid, result = os.waitpid(child, os.WNOHANG)
                if pid:
                    status.append(result)
                return bool(pid)

            try:
                wait_until(ended, 30)
            except AssertionError:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise
            assert status == [0]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert reader.get_run("forked").info.run_id == "forked"
    reader.close()


def test_multiprocessing_fork_exits_normally(data: Logged) -> None:
    """A pool of forked workers, as a data loader has, reads and joins; the parent's reader goes on."""
    data.run("forked", "0")
    data.send()
    reader = reader_of(data)
    reader.get_run("forked")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_read_in_child, [str(data.root)] * 4).get(60) == ["forked"] * 4
        pool.close()
        pool.join()
    assert reader.get_run("forked").info.run_id == "forked"
    reader.close()
