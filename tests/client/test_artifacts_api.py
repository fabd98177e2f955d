"""Artifacts through the fluent API: what lies where, what is recorded, and only once it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import runstream
from runstream.active import tracker
from runstream.artifacts import load_image
from runstream.testing import Recording, recording


@pytest.fixture
def recorded() -> Iterator[Recording]:
    with recording() as recorded:
        yield recorded
    MemoryFileSystem.store.clear()


def logged(recorded: Recording) -> dict[str, tuple[int, str]]:
    """Artifact path -> (size, digest), in the order of the events."""
    return {
        fields["path"]: (fields["size_bytes"], fields["digest"])
        for name, fields in recorded.events
        if name == "artifact_logged"
    }


def test_every_kind_of_artifact(recorded: Recording, tmp_path: Path) -> None:
    """Text, dict, figure, image, table, file and folder lie below the run's address and are recorded with digests."""
    from matplotlib.figure import Figure

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(b"\x00" * 1000)
    with runstream.start_run() as run:
        runstream.log_text("héllo", "notes/a.txt")
        runstream.log_dict({"a": 1}, "conf.json")
        runstream.log_figure(Figure(), "plots/f.png")
        runstream.log_image(np.zeros((4, 4), np.uint8), "i.png")
        runstream.log_image(np.zeros((4, 4, 3)), key="samples/x", step=12)
        runstream.log_table({"q": ["a"]}, "t.json")
        runstream.log_artifact(tmp_path / "model" / "weights.bin", "files")
        runstream.log_artifact(str(tmp_path / "model"))
        runstream.log_artifacts(tmp_path / "model", "copy")
        assert runstream.get_artifact_uri("conf.json") == f"{run.info.artifact_uri}/conf.json"
        assert runstream.load_text(runstream.get_artifact_uri("notes/a.txt")) == "héllo"
    found = logged(recorded)
    assert found["notes/a.txt"] == (6, "sha256:" + hashlib.sha256("héllo".encode()).hexdigest())
    assert found["files/weights.bin"] == found["model/weights.bin"] == found["copy/weights.bin"]
    (series,) = [path for path in found if path.startswith("images/")]
    assert series.startswith("images/samples#x+step+12+timestamp+")
    uri = f"runs:/{run.info.run_id}"
    assert runstream.load_dict(f"{run.info.artifact_uri}/conf.json") == {"a": 1}
    assert load_image(f"{run.info.artifact_uri}/i.png").size == (4, 4)
    assert uri.startswith("runs:/")


def test_runs_uris_name_artifacts_of_open_runs(recorded: Recording, tmp_path: Path) -> None:
    """runs:/<id>/<path> works in loading, listing and downloading."""
    with runstream.start_run() as run:
        runstream.log_text("x", "d/a.txt")
        uri = f"runs:/{run.info.run_id}/d"
        assert runstream.load_text(f"{uri}/a.txt") == "x"
        assert [info.path for info in runstream.list_artifacts(uri)] == ["d/a.txt"]
        assert Path(runstream.download_artifacts(uri, dst_path=tmp_path)) == tmp_path / "d"
        assert (tmp_path / "d" / "a.txt").read_text() == "x"
        assert Path(runstream.download_artifacts(run_id=run.info.run_id), "d", "a.txt").exists()


def test_tables_grow(recorded: Recording) -> None:
    """A second log_table appends; load_table of an open run reads it all."""
    with runstream.start_run() as run:
        runstream.log_table({"a": [1]}, "t.json")
        runstream.log_table({"a": [2, 3]}, "t.json")
        frame = runstream.load_table("t.json", [run.info.run_id], extra_columns=["run_id"])
    assert frame["a"].tolist() == [1, 2, 3]
    assert set(frame["run_id"]) == {run.info.run_id}
    with pytest.raises(runstream.InvalidInputError, match="list of run ids"):
        runstream.load_table("t.json", run.info.run_id)


class BreakingMemory(MemoryFileSystem):
    """Breaks at one name, for good."""

    protocol = "breaking"
    cachable = False
    broken = ""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if self.broken and path.endswith(self.broken) and "w" in mode:
            raise PermissionError("AccessDenied")
        return super()._open(path, mode, **kwargs)


def test_only_whole_files_are_recorded_and_a_retry_resumes(recorded: Recording, tmp_path: Path) -> None:
    """A folder that fails midway records what is there; calling again sends only the rest."""
    fsspec.register_implementation("breaking", BreakingMemory, clobber=True)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    with runstream.start_run() as run:
        run.artifacts.uri = "breaking://bucket/run"
        BreakingMemory.broken = "/b"
        with pytest.raises(runstream.ArtifactError, match="'b'"):
            runstream.log_artifacts(tmp_path)
        assert "b" not in logged(recorded)
        before = sum(name == "artifact_logged" for name, _ in recorded.events)
        BreakingMemory.broken = ""
        runstream.log_artifacts(tmp_path)
        assert set(logged(recorded)) == {"a", "b", "c"}
        after = sum(name == "artifact_logged" for name, _ in recorded.events)
        assert after - before == 3 - before  # each file was recorded once
        runstream.log_artifacts(tmp_path)
        assert sum(name == "artifact_logged" for name, _ in recorded.events) == after


def test_an_error_of_storage_ends_the_run_as_failed_where_it_is_not_caught(recorded: Recording) -> None:
    """An artifact that cannot be stored raises: it cannot follow later."""
    fsspec.register_implementation("breaking", BreakingMemory, clobber=True)
    BreakingMemory.broken = "/a"
    with pytest.raises(runstream.ArtifactError), runstream.start_run() as run:
        run.artifacts.uri = "breaking://bucket/run"
        runstream.log_text("x", "a")
    BreakingMemory.broken = ""
    assert recorded.run(run.info.run_id).info.status == "FAILED"


def test_the_embedded_default_lies_in_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """artifacts/<experiment>/<run>/artifacts, stored relative, so that the directory can be moved."""
    monkeypatch.delenv("RUNSTREAM_ARTIFACT_ROOT", raising=False)
    data = tmp_path / "my data"
    client = runstream.Client(data)
    run = client.create_run("0")
    client.log_text(run.info.run_id, "x", "ü 100%.txt")
    client.set_terminated(run.info.run_id)
    assert client.flush().complete
    assert (data / "artifacts" / "0" / run.info.run_id / "artifacts" / "ü 100%.txt").read_text() == "x"
    from tests.client.directory_log import logged as read_log

    (start,) = [fields for name, fields in read_log(data) if name == "run_started"]
    assert start["artifact_uri"] == f"0/{run.info.run_id}/artifacts"
    assert run.info.artifact_uri == (data / start["artifact_uri"]).as_uri().replace(
        data.as_uri(), f"{data.as_uri()}/artifacts"
    )


def test_a_root_of_the_environment_is_stored_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RUNSTREAM_ARTIFACT_ROOT, a path too, events hold full URLs."""
    monkeypatch.setenv("RUNSTREAM_ARTIFACT_ROOT", str(tmp_path / "elsewhere"))
    client = runstream.Client(tmp_path / "data")
    run = client.create_run("0")
    client.set_terminated(run.info.run_id)
    expected = f"{(tmp_path / 'elsewhere').as_uri()}/0/{run.info.run_id}/artifacts"
    assert run.info.artifact_uri == expected


def test_a_remote_log_without_a_root_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """kafka:// knows no place for files: logging works, artifacts name the variable."""
    from runstream.addresses import artifact_root
    from runstream.config import Settings

    settings = Settings.from_environment({}, tracking_uri="kafka://localhost:9092/team")
    with pytest.raises(runstream.ArtifactError, match="RUNSTREAM_ARTIFACT_ROOT"):
        artifact_root(settings)
    with_store = Settings.from_environment(
        {"RUNSTREAM_STORE_URI": "/data/dir"}, tracking_uri="kafka://localhost:9092/team"
    )
    assert artifact_root(with_store) == "file:///data/dir/artifacts"


def test_a_forked_child_logs_artifacts(recorded: Recording) -> None:
    """The store is opened anew in the child."""
    with runstream.start_run() as run:
        run.artifacts.uri = Path(tracker.settings().journal_dir or "", "files").as_uri()
        runstream.log_text("parent", "p.txt")
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                runstream.log_text("child", "c.txt")
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert sorted(info.path for info in run.artifacts.list()) == ["c.txt", "p.txt"]


def test_huge_files_take_little_memory(tmp_path: Path) -> None:
    """200 MB go up and come down within a few chunks of memory."""
    import tracemalloc

    from runstream.storage.store import open_store

    source = tmp_path / "huge"
    with source.open("wb") as file:
        file.truncate(200 << 20)
    store = open_store(str(tmp_path / "store"))
    tracemalloc.start()
    try:
        store.put(source, "huge")
        store.get("huge", tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "back").stat().st_size == 200 << 20
    assert peak < 8 << 20
