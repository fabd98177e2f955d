"""Source capture: what it finds, from real git checkouts, and that it never hurts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

from runstream import git
from runstream.source import BackgroundCapture, capture, clean_text, in_notebook, installed_packages


def run_git(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=trunk", *arguments]
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit and a remote whose URL holds a password."""
    folder = tmp_path / "repo"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "train.py").write_text("print()\n")
    run_git(folder, "init", "-q")
    run_git(folder, "add", ".")
    run_git(folder, "commit", "-q", "-m", "one")
    run_git(folder, "remote", "add", "origin", "https://user:s3cret@example.org:8443/team/repo.git?token=s3cret")
    return folder


def test_a_checkout_is_read_without_git(checkout: Path) -> None:
    """Commit, branch and URL without credentials, from a folder deep inside."""
    found = git.find_checkout(checkout / "pkg")
    assert found == git.Checkout(
        checkout, run_git(checkout, "rev-parse", "HEAD"), "trunk", "https://example.org:8443/team/repo.git"
    )


def test_packed_detached_and_linked_checkouts(checkout: Path, tmp_path: Path) -> None:
    """Packed references, a detached HEAD, a linked work tree and a branch with a slash are all read."""
    head = run_git(checkout, "rev-parse", "HEAD")
    run_git(checkout, "pack-refs", "--all")
    found = git.find_checkout(checkout)
    assert found is not None
    assert found.commit == head
    run_git(checkout, "worktree", "add", "-q", "-b", "feature/x", str(tmp_path / "linked"))
    linked = git.find_checkout(tmp_path / "linked")
    assert linked is not None
    assert (linked.commit, linked.branch) == (head, "feature/x")
    assert linked.repository == "https://example.org:8443/team/repo.git"
    run_git(checkout, "checkout", "-q", "--detach")
    detached = git.find_checkout(checkout)
    assert detached is not None
    assert (detached.commit, detached.branch) == (head, "")


def test_an_empty_repository_and_garbage_are_no_error(tmp_path: Path) -> None:
    """No commit yet, a damaged .git and no repository at all give empty fields or None."""
    run_git(tmp_path, "init", "-q")
    empty = git.find_checkout(tmp_path)
    assert empty is not None
    assert empty.commit == ""
    broken = tmp_path / "broken"
    (broken / ".git").mkdir(parents=True)
    assert git.find_checkout(broken) is None
    (broken / ".git" / "HEAD").write_bytes(b"\xff\x00ref: ../../etc/passwd")
    found = git.find_checkout(broken)
    assert found is None or found.commit == ""


def test_the_dirty_flag_counts_tracked_changes(checkout: Path) -> None:
    """A changed tracked file is dirty, a new file is not; no folder means unknown."""
    assert git.is_dirty(checkout) is False
    (checkout / "new.txt").write_text("x")
    assert git.is_dirty(checkout) is False
    (checkout / "pkg" / "train.py").write_text("print(1)\n")
    assert git.is_dirty(checkout) is True
    assert git.is_dirty(checkout / "gone") is None


def test_the_repository_cannot_run_programs(checkout: Path, tmp_path: Path) -> None:
    """A checkout's own configuration does not get to execute a file-system monitor."""
    mark = tmp_path / "ran"
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {mark}\n")
    hook.chmod(0o755)
    run_git(checkout, "config", "core.fsmonitor", str(hook))
    git.is_dirty(checkout)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("https://u:p@h/x.git", "https://h/x.git"),
        ("https://token@h:1/x", "https://h:1/x"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("ssh://git@h:22/x", "ssh://git@h:22/x"),
        ("ssh://git:pw@h/x", "ssh://h/x"),
        ("https://u:p@[::1]:9/x?a=b#c", "https://[::1]:9/x"),
        ("/local/path", "/local/path"),
        ("https://h:notaport/x", ""),
    ],
)
def test_urls_lose_their_credentials(url: str, clean: str) -> None:
    """Passwords and tokens never leave the machine."""
    assert git.without_credentials(url) == clean


def test_capture_names_the_script_and_its_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry point, type, git state, command line, host, Python and user of the program that runs."""
    main = types.ModuleType("__main__")
    main.__file__ = str(checkout / "pkg" / "train.py")
    main.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--lr", "0 1"])
    found = capture()
    tags = found.tags()
    assert (found.name, found.type) == (main.__file__, "LOCAL")
    assert tags["mlflow.source.name"] == main.__file__
    assert tags["mlflow.source.git.commit"] == found.version == run_git(checkout, "rev-parse", "HEAD")
    assert tags["mlflow.source.git.branch"] == "trunk"
    assert "s3cret" not in str(tags)
    assert tags["runstream.commandLine"] == "python train.py --lr '0 1'"
    assert tags["runstream.python"] == ".".join(map(str, sys.version_info[:3]))
    assert tags["mlflow.user"]
    assert tags["runstream.host"]


def test_modules_and_the_console_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """python -m package.module is named by its module, the console by its own."""
    main = types.ModuleType("__main__")
    main.__spec__ = types.SimpleNamespace(name="package.module.__main__")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert capture().name == "package.module"
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", [""])
    assert capture().name == "<console>"


def test_notebooks_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jupyter kernel is a notebook, a terminal IPython is not, and a broken IPython is no trouble."""

    def install(config: object, **names: str) -> None:
        module = types.ModuleType("IPython")
        shell = types.SimpleNamespace(config=config, user_ns=names)
        module.get_ipython = lambda: shell  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", module)

    assert not in_notebook()
    install({})
    assert not in_notebook()
    install({"IPKernelApp": {}}, __vsc_ipynb_file__="/x/study.ipynb")
    assert in_notebook()
    found = capture()
    assert (found.name, found.type) == ("/x/study.ipynb", "NOTEBOOK")
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    assert not in_notebook()


def test_odd_environments_are_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A removed working directory, a user without a name and a command line that is not UTF-8 do not raise."""

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr(sys, "orig_argv", ["python", "\udcff\x00" * 5000])
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    tags = capture().tags()
    assert tags["mlflow.user"] == f"uid {os.getuid()}"
    assert len(tags["runstream.commandLine"]) <= 4000
    tags["runstream.commandLine"].encode()


def test_packages_are_listed() -> None:
    """Installed distributions appear with their versions."""
    lines = installed_packages().splitlines()
    assert f"pytest=={pytest.__version__}" in lines
    assert lines == sorted(lines)


def test_clean_text_is_storable() -> None:
    """Half surrogates and NUL go, and a long text is cut to its limit."""
    assert clean_text("a\ud800b\x00c", 10) == "a?bc"
    assert len(clean_text("x" * 100, 20)) == 20


def test_slow_facts_arrive_in_the_background(checkout: Path) -> None:
    """Dirty flag and packages are delivered from another thread, and `wait` sees it."""
    got: list[tuple[str, Mapping[str, str]]] = []
    background = BackgroundCapture()
    found = git.find_checkout(checkout)
    tickets = [
        background.request(found, lambda tags: got.append((threading.current_thread().name, tags))) for _ in range(5)
    ]
    assert all(background.wait(ticket, 30) for ticket in tickets)
    assert len(got) == 5
    assert {name for name, _ in got} == {"runstream-source"}
    assert got[0][1]["mlflow.source.git.dirty"] == "false"
    assert "pytest==" in got[0][1]["runstream.packages"]


def test_a_failing_receiver_does_not_stop_the_others() -> None:
    """A run that has ended meanwhile does not keep the next one from its facts."""
    got: list[Mapping[str, str]] = []
    background = BackgroundCapture()

    def ended(tags: Mapping[str, str]) -> None:
        raise RuntimeError("run has ended")

    background.request(None, ended)
    assert background.wait(background.request(None, got.append), 30)
    assert len(got) == 1


def test_a_forked_child_starts_afresh() -> None:
    """The child has no thread of the parent's, waits for none, and can capture itself."""
    background = BackgroundCapture()
    ticket = background.request(None, lambda tags: None)
    assert background.wait(ticket, 30)
    pid = os.fork()
    if pid == 0:
        fine = False
        try:
            fine = not background.wait(ticket + 1, 30)
            fine = fine and background.wait(background.request(None, lambda tags: None), 30)
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
