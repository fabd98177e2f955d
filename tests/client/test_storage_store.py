"""One file at a time: whole or not at all, checked, retried; the same on local folders and fsspec file systems."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from runstream.entities import FileInfo
from runstream.errors import ArtifactError, InvalidInputError, NotFoundError, RunstreamError
from runstream.storage.retry import RetryPolicy, is_transient
from runstream.storage.store import ArtifactStore, local_path_of, open_store

NO_WAIT = RetryPolicy(attempts=4, sleep=lambda seconds: None)


@pytest.fixture(params=["local", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArtifactStore]:
    """A store of each kind."""
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]
        yield open_store("memory://bucket/a b/run", NO_WAIT)
        MemoryFileSystem.store.clear()
        return
    root = tmp_path / "a b" / "run"
    yield open_store(str(root) if request.param == "local" else root.as_uri(), NO_WAIT)


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3 << 20)], ids=["empty", "byte", "3 MiB"])
def test_what_is_put_comes_back(store: ArtifactStore, tmp_path: Path, content: bytes) -> None:
    """Bytes, size and digest survive the round trip, whatever the size."""
    source = tmp_path / "source"
    source.write_bytes(content)
    moved: list[int] = []
    done = store.put(source, "deep/er/file.bin", moved.append)
    assert (done.path, done.size_bytes, done.digest) == ("deep/er/file.bin", len(content), digest(content))
    assert sum(moved) == len(content)
    assert store.read("deep/er/file.bin") == content
    fetched = store.get("deep/er/file.bin", tmp_path / "out" / "file.bin")
    assert fetched.digest == done.digest
    assert (tmp_path / "out" / "file.bin").read_bytes() == content


def test_listing_and_walking(store: ArtifactStore) -> None:
    """A listing shows one level with sizes; a walk shows every file."""
    for path in ("a.txt", "dir/b.txt", "dir/sub/c.txt", "odd [x]*?#/d.txt"):
        store.put_bytes(path.encode(), path)
    assert store.list() == [
        FileInfo("a.txt", False, 5),
        FileInfo("dir", True, None),
        FileInfo("odd [x]*?#", True, None),
    ]
    assert store.list("dir") == [FileInfo("dir/b.txt", False, 9), FileInfo("dir/sub", True, None)]
    assert store.list("dir/b.txt") == []
    assert store.list("nothing") == []
    assert [info.path for info in store.walk()] == ["a.txt", "dir/b.txt", "dir/sub/c.txt", "odd [x]*?#/d.txt"]
    assert list(store.walk("a.txt")) == [FileInfo("a.txt", False, 5)]
    assert store.size("a.txt") == 5
    assert store.size("dir") is None
    assert store.size("nothing") is None


def test_delete_removes_files_and_trees(store: ArtifactStore) -> None:
    """Deleting twice, or what never was, is no error."""
    for path in ("a.txt", "dir/b.txt", "dir/sub/c.txt"):
        store.put_bytes(b"x", path)
    store.delete("dir")
    store.delete("dir")
    store.delete("never")
    assert [info.path for info in store.walk()] == ["a.txt"]


def test_a_missing_file_is_an_error_that_names_it(store: ArtifactStore, tmp_path: Path) -> None:
    """Reading what is not there says so, and leaves nothing behind."""
    with pytest.raises(NotFoundError, match=r"nothing\.bin.*no such file"):
        store.get("nothing.bin", tmp_path / "out" / "x")
    with pytest.raises(NotFoundError, match=r"nothing\.bin"):
        store.read("nothing.bin")
    assert list((tmp_path / "out").iterdir()) == []


def test_paths_cannot_climb(store: ArtifactStore, tmp_path: Path) -> None:
    """Every method refuses a path that would leave the artifact URI."""
    for call in (
        lambda: store.read("../x"),
        lambda: store.put_bytes(b"", "/x"),
        lambda: store.get("a/../../x", tmp_path / "x"),
        lambda: store.list(".."),
        lambda: store.delete("%2e%2e"),
    ):
        with pytest.raises(InvalidInputError):
            call()


class FailingReader(io.BytesIO):
    """Breaks after the first chunk."""

    def __init__(self, error: Exception) -> None:
        super().__init__(b"x" * (2 << 20))
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell():
            raise self.error
        return super().read(size)


def test_a_broken_upload_leaves_nothing(store: ArtifactStore) -> None:
    """A source that fails midway leaves neither a short file nor a temporary one."""
    with pytest.raises(OSError, match="broken"):
        store._write(FailingReader(OSError(errno.EIO, "broken")), "model.bin", 2 << 20, None)
    assert list(store.walk()) == []
    assert store.size("model.bin") is None


def test_a_broken_upload_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    """On a local folder, an earlier version stays whole until the new one is."""
    store = open_store(str(tmp_path / "run"))
    store.put_bytes(b"earlier", "model.bin")
    with pytest.raises(OSError, match="broken"):
        store._write(FailingReader(OSError(errno.EIO, "broken")), "model.bin", 2 << 20, None)
    assert store.read("model.bin") == b"earlier"
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["model.bin"]


def test_a_growing_source_is_cut_at_its_first_size(store: ArtifactStore, tmp_path: Path) -> None:
    """A log file that grows during its upload does not make the upload endless."""
    source = tmp_path / "train.log"
    source.write_bytes(b"x" * 1000)

    def grow(moved: int) -> None:
        with source.open("ab") as file:
            file.write(b"y" * 1000)

    assert store.put(source, "train.log", grow).size_bytes == 1000


class FlakyMemory(MemoryFileSystem):
    """An object store whose requests fail as often as told."""

    protocol = "flaky"
    cachable = False
    failures: list[Exception] = []  # noqa: RUF012 (one bucket for the test)
    calls = 0

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        type(self).calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def flaky() -> Iterator[ArtifactStore]:
    fsspec.register_implementation("flaky", FlakyMemory, clobber=True)
    MemoryFileSystem.store.clear()
    FlakyMemory.failures, FlakyMemory.calls = [], 0
    yield open_store("flaky://bucket/run", NO_WAIT)
    MemoryFileSystem.store.clear()


def test_transient_errors_are_tried_again(flaky: ArtifactStore) -> None:
    """Two broken connections and a time-out do not show."""
    FlakyMemory.failures = [ConnectionResetError("peer"), TimeoutError("slow"), OSError(errno.EBUSY, "SlowDown")]
    flaky.put_bytes(b"content", "x")
    assert FlakyMemory.calls == 4
    assert flaky.read("x") == b"content"


def test_retries_end(flaky: ArtifactStore) -> None:
    """A store that stays away is an error after the last attempt, marked as worth another try later."""
    FlakyMemory.failures = [ConnectionResetError("peer")] * 9
    with pytest.raises(ArtifactError, match="ConnectionResetError") as caught:
        flaky.put_bytes(b"content", "x")
    assert FlakyMemory.calls == 4
    assert caught.value.retryable


def test_permanent_errors_are_not_tried_again(flaky: ArtifactStore) -> None:
    """A refused permission fails at once, and says what to check."""
    FlakyMemory.failures = [PermissionError("AccessDenied")]
    with pytest.raises(ArtifactError, match="credentials") as caught:
        flaky.put_bytes(b"content", "x")
    assert FlakyMemory.calls == 1
    assert not caught.value.retryable


class HTTPError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class ClientError(Exception):
    """botocore's shape."""

    def __init__(self, status: int) -> None:
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "I/O"), True),
        (HTTPError(503), True),
        (HTTPError(429), True),
        (HTTPError(403), False),
        (ClientError(500), True),
        (ClientError(404), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (ValueError("nonsense"), False),
        (type("EndpointConnectionError", (Exception,), {})(), True),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_errors_are_classified(error: BaseException, transient: bool) -> None:
    """What is worth another try, and what is not."""
    assert is_transient(error) is transient


def test_the_cause_decides_where_the_error_itself_says_nothing() -> None:
    """A wrapper around a broken connection is as transient as the connection."""
    try:
        try:
            raise ConnectionResetError
        except ConnectionResetError as exc:
            raise RuntimeError("upload failed") from exc
    except RuntimeError as exc:
        assert is_transient(exc)


def test_full_and_read_only_places_are_errors_at_once(tmp_path: Path) -> None:
    """A file in place of the folder is a clear error, not a stack trace."""
    (tmp_path / "run").write_text("I am a file")
    with pytest.raises(ArtifactError, match="upload of 'x'"):
        open_store(str(tmp_path / "run"), NO_WAIT).put_bytes(b"", "x")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/a/b", "/a/b"),
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("relative/dir", "relative/dir"),
        ("s3://bucket/x", None),
        ("memory://x", None),
    ],
)
def test_local_uris_are_told_from_remote_ones(uri: str, path: str | None) -> None:
    """Paths and file URIs are local folders."""
    assert local_path_of(uri) == (None if path is None else Path(path))


def test_a_file_uri_of_another_host_is_refused() -> None:
    """file://dir/x is most likely a slash too few."""
    with pytest.raises(InvalidInputError, match="host 'dir'"):
        local_path_of("file://dir/x")


def test_missing_packages_name_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """gs:// without its package says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunstreamError, match=r"pip install 'runstream\[gcs\]'"):
        open_store("gs://bucket/x")


def test_an_unknown_scheme_is_a_clear_error() -> None:
    """A typing error in the scheme does not end in a stack trace."""
    with pytest.raises(ArtifactError, match="s4://bucket"):
        open_store("s4://bucket/x")
