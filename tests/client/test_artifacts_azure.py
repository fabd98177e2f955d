"""Artifacts in Azure's blob storage through the same door as S3, where an emulator can be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import runstream
from runstream.storage.retry import RetryPolicy
from runstream.storage.store import PART_BYTES, open_store
from runstream.storage.transfer import download_tree, files_below, upload_files
from tests.services import azure

# adlfs hands blocks over as bytes, to aiohttp's regret.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
NO_WAIT = RetryPolicy(attempts=2, sleep=lambda seconds: None)


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An emulator with one container."""
    command = azure.azurite()
    if command is None:
        pytest.skip("no azurite: npm install --prefix .cache/azurite azurite")
    adlfs = pytest.importorskip("adlfs", reason="adlfs is not installed: pip install 'runstream[azure]'")
    with azure.serving(tmp_path_factory.mktemp("azure"), command) as text:
        adlfs.AzureBlobFileSystem(connection_string=text).mkdir("bucket")
        yield text


@pytest.fixture(autouse=True)
def credentials(connection: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where adlfs finds them by itself: in the environment."""
    import adlfs

    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    yield
    adlfs.AzureBlobFileSystem.clear_instance_cache()


def test_a_tree_goes_up_and_comes_back(tmp_path: Path) -> None:
    """Small files, an empty one, odd names and one of several parts."""
    source = tmp_path / "source"
    content = {
        "a.txt": b"a",
        "empty": b"",
        "sub/dir/b c.txt": b"odd",
        "ü/日本.bin": b"unicode",
        "large.bin": os.urandom(PART_BYTES + 12_345),
    }
    for name, data in content.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    store = open_store("az://bucket/exp/run/artifacts", NO_WAIT)
    done = upload_files(store, files_below(source))
    assert {each.path: each.size_bytes for each in done} == {name: len(data) for name, data in content.items()}
    assert {info.path for info in store.list()} == {"a.txt", "empty", "sub", "ü", "large.bin"}
    download_tree(store, "", tmp_path / "back")
    for name, data in content.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    store.delete("sub")
    assert {info.path for info in store.list()} == {"a.txt", "empty", "ü", "large.bin"}


def test_runs_log_straight_to_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNSTREAM_ARTIFACT_ROOT=az://... is all it takes."""
    monkeypatch.setenv("RUNSTREAM_ARTIFACT_ROOT", "az://bucket/team")
    client = runstream.Client(tmp_path / "data")
    run = client.create_run("0")
    client.log_text(run.info.run_id, "hello", "notes/a.txt")
    assert [info.path for info in client.list_artifacts(run.info.run_id)] == ["notes"]
    assert runstream.load_text(f"{run.info.artifact_uri}/notes/a.txt") == "hello"
    client.set_terminated(run.info.run_id)
    assert client.flush().complete


def test_wrong_credentials_are_named(monkeypatch: pytest.MonkeyPatch, connection: str) -> None:
    """The error says that permission was refused and what to check."""
    wrong = connection.replace(azure.KEY, "d3Jvbmc=")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", wrong)
    with pytest.raises(runstream.ArtifactError, match="check the credentials") as caught:
        open_store("az://bucket/x", NO_WAIT).put_bytes(b"x", "a")
    assert not caught.value.retryable


def test_a_missing_container_is_named() -> None:
    """A typing error must not create one."""
    with pytest.raises(runstream.RunstreamError, match="no-such-container"):
        open_store("az://no-such-container/x", NO_WAIT).put_bytes(b"x", "a")
