"""Trees of files: what is taken, in parallel, resumed, with progress; and back."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from runstream.errors import ArtifactError, InvalidInputError, NotFoundError
from runstream.storage.retry import RetryPolicy
from runstream.storage.store import ArtifactStore, Uploaded, open_store
from runstream.storage.transfer import PARALLEL_FILES, Progress, download_tree, files_below, upload_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    for path in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/empty"):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(path if not path.endswith("empty") else "")
    (folder / "nothing here").mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return open_store(str(tmp_path / "store"), RetryPolicy(attempts=2, sleep=lambda seconds: None))


def test_a_tree_goes_up_and_comes_back(tree: Path, store: ArtifactStore, tmp_path: Path) -> None:
    """Every file, with its content, below the same names."""
    done = upload_files(store, files_below(tree))
    assert [each.path for each in done] == ["a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/empty"]
    assert download_tree(store, "", tmp_path / "back") == tmp_path / "back"
    assert (tmp_path / "back/sub/deep/c.txt").read_text() == "sub/deep/c.txt"
    assert download_tree(store, "sub", tmp_path / "part") == tmp_path / "part" / "sub"
    assert sorted(p.name for p in (tmp_path / "part").rglob("*") if p.is_file()) == ["b.txt", "c.txt", "empty"]
    assert download_tree(store, "a.txt", tmp_path / "one").read_text() == "a.txt"


def test_a_missing_tree_is_an_error(store: ArtifactStore, tmp_path: Path) -> None:
    """Downloading what is not there says so; an empty run downloads to an empty folder."""
    with pytest.raises(NotFoundError, match="'nothing'"):
        download_tree(store, "nothing", tmp_path / "back")
    assert list(download_tree(store, "", tmp_path / "back").iterdir()) == []


def test_special_files_are_left_out_with_a_word(tree: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Pipes, broken links and links to folders neither hang nor break the upload."""
    os.mkfifo(tree / "pipe")
    (tree / "broken").symlink_to(tree / "gone")
    (tree / "loop").symlink_to(tree)
    with caplog.at_level(logging.WARNING):
        paths = [path for _, path in files_below(tree)]
    assert paths == ["a.txt", "sub/b.txt", "sub/deep/c.txt", "sub/empty"]
    assert all(name in caplog.text for name in ("pipe", "broken", "loop"))


def test_links_out_of_the_folder_are_named(tree: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """A link to a file elsewhere is followed, and a warning says which."""
    (tmp_path / "secret").write_text("x")
    (tree / "link").symlink_to(tmp_path / "secret")
    (tree / "inner").symlink_to(tree / "a.txt")
    with caplog.at_level(logging.WARNING):
        paths = [path for _, path in files_below(tree)]
    assert {"link", "inner"} <= set(paths)
    assert "1 links lead out" in caplog.text
    assert "link" in caplog.text


def test_an_illegal_name_is_refused_before_anything_moves(tree: Path) -> None:
    """A file whose name no store can hold safely is an error that names it."""
    (tree / "bad\nname").write_text("x")
    with pytest.raises(InvalidInputError, match=r"bad\\nname"):
        files_below(tree)


def test_files_that_are_there_are_not_sent_again(tree: Path, store: ArtifactStore) -> None:
    """A second upload sends only what has changed, here or there."""
    first = upload_files(store, files_below(tree))
    recorded = {each.path: (each.size_bytes, each.digest) for each in first}
    (tree / "a.txt").write_text("A.txt")  # same size, other content
    store.delete("sub/b.txt")  # gone from the store
    sent: list[Uploaded] = []
    again = upload_files(store, files_below(tree), recorded=recorded, done=sent.append)
    assert sorted(each.path for each in sent) == ["a.txt", "sub/b.txt"]
    assert [each.path for each in again] == [each.path for each in first]
    assert store.read("a.txt") == b"A.txt"


def test_progress_reaches_the_totals(tree: Path, store: ArtifactStore) -> None:
    """The callback sees bytes and files grow to their totals, one call at a time."""
    seen: list[Progress] = []
    busy = threading.Lock()

    def note(progress: Progress) -> None:
        assert busy.acquire(blocking=False)
        seen.append(progress)
        busy.release()

    upload_files(store, files_below(tree), progress=note)
    total = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    assert (seen[-1].files_done, seen[-1].files_total) == (4, 4)
    assert (seen[-1].bytes_done, seen[-1].bytes_total) == (total, total)
    assert [each.bytes_done for each in seen] == sorted(each.bytes_done for each in seen)


def test_files_move_at_the_same_time_but_not_without_bound(tmp_path: Path, store: ArtifactStore) -> None:
    """As many files as PARALLEL_FILES are under way together, and no more."""
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(3 * PARALLEL_FILES):
        (folder / f"{index}").write_text("x")
    gate = threading.Barrier(PARALLEL_FILES, timeout=30)
    active, most, lock = 0, 0, threading.Lock()

    class Slow(ArtifactStore):
        __slots__ = ()

        def put(self, source: Path, path: str, advance: Any = None) -> Uploaded:
            nonlocal active, most
            with lock:
                active += 1
                most = max(most, active)
            gate.wait()  # passes only when PARALLEL_FILES uploads have come this far
            with lock:
                active -= 1
            return Uploaded(path, 1, "")

    slow = Slow(store.uri, store.root, None, RetryPolicy())
    assert len(upload_files(slow, files_below(folder))) == 3 * PARALLEL_FILES
    assert most == PARALLEL_FILES


def test_one_failure_ends_the_transfer_and_keeps_what_is_done(tree: Path, store: ArtifactStore) -> None:
    """The error is that of the file that failed; finished files were reported."""
    files = files_below(tree)
    files[2][0].unlink()
    done: list[Uploaded] = []
    with pytest.raises((ArtifactError, InvalidInputError), match=r"c\.txt"):
        upload_files(store, files, done=done.append)


def test_a_callback_can_cancel(tree: Path, store: ArtifactStore) -> None:
    """An exception from the progress callback stops the transfer."""

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_files(store, files_below(tree), progress=stop)


def test_an_unreadable_folder_is_an_error(tmp_path: Path) -> None:
    """A folder that is not there is not an empty upload."""
    with pytest.raises(InvalidInputError, match="gone"):
        files_below(tmp_path / "gone")
