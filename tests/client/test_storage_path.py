"""Artifact paths: what is legal, and that nothing leaves its folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from runstream.errors import InvalidInputError
from runstream.storage.path import artifact_path, is_temporary, local_target, temporary_name


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("a.txt", "a.txt"),
        ("plots/loss.png", "plots/loss.png"),
        ("plots//./loss.png", "plots/loss.png"),
        ("plots/", "plots"),
        ("Übung/日本語.txt", "Übung/日本語.txt"),
        ("100%.txt", "100%.txt"),
        ("a b [1] (2)*?.txt", "a b [1] (2)*?.txt"),
        ("..a/b..", "..a/b.."),
        (PurePosixPath("x/y"), "x/y"),
    ],
)
def test_legal_paths_have_one_spelling(given: object, clean: str) -> None:
    """Relative paths pass, without doubled slashes and dots."""
    assert artifact_path(given) == clean


@pytest.mark.parametrize(
    "given",
    [
        "",
        ".",
        "./",
        "/etc/passwd",
        "//host/x",
        "../x",
        "a/../../x",
        "a/..",
        "..",
        "a\\b",
        "..\\x",
        "C:/x",
        "c:x",
        "%2e%2e/x",
        "%2e%2e%2fx",
        "%252e%252e%252fx",
        "%2Fetc/passwd",
        "a/%5c..%5cb",
        "a\x00b",
        "a%00b",
        "a\nb",
        "a\x7fb",
        "a\ud800b",
        "s3://bucket/x",
        "x" * 1001,
        pytest.param(temporary_name("model.bin"), id="temporary"),
        b"bytes",
        None,
        3,
    ],
)
def test_unsafe_paths_are_refused(given: object) -> None:
    """Absolute, climbing, encoded, control, foreign or absurd paths are errors that say what to give."""
    with pytest.raises(InvalidInputError, match="artifact path"):
        artifact_path(given)


def test_the_root_is_legal_only_where_asked_for() -> None:
    """An empty path means the whole tree for listings and downloads."""
    assert artifact_path("", root_is_legal=True) == ""


def test_a_download_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    """A symbolic link in the target folder cannot lead the download out of it."""
    (tmp_path / "outside").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (target / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidInputError, match="symbolic link"):
        local_target(target, "sub/x.txt")
    assert local_target(target, "other/x.txt") == target / "other" / "x.txt"


def test_temporary_names_are_recognised() -> None:
    """Listings can tell unfinished files from whole ones."""
    assert is_temporary(temporary_name("a.txt"))
    assert len(temporary_name("a" * 300)) < 200
    assert not is_temporary("a.txt")
