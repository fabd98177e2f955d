"""Landlock and the engine, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, sys, tempfile, threading
from pathlib import Path
from runstream_ingest.local import landlock

folder = Path(tempfile.mkdtemp())
# What setenv does: the environment moves to the heap, where no auxiliary vector follows it. Here a false one
# does (33 is AT_SYSINFO_EHDR, the address of the vDSO), so that its use shows every time.
texts = [ctypes.c_char_p(f"{name}={value}".encode()) for name, value in os.environ.items()]
words = [ctypes.cast(text, ctypes.c_void_p).value for text in texts] + [0, 33, 0xDEADB000, 0, 0]
block = (ctypes.c_uint64 * len(words))(*words)
ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ").value = ctypes.addressof(block)
readable = [path for path in landlock.program_paths() if path.name not in sys.argv[1:]]
problem = landlock.restrict({folder: landlock.READ_WRITE}, readable)
if problem is not None:
    print("skip", problem, flush=True)
    os._exit(0)

def work():
    from runstream_ingest.local.engine import Engine, Role
    engine = Engine(folder)
    session = engine.session(Role.WRITER)
    print("answer", session.query("SELECT 1", "TSVRaw").data.decode().strip(), flush=True)
    session.close()
    engine.close()

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def run(*hidden: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *hidden], capture_output=True, text=True, timeout=60, check=False
    )
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout.strip())
    return done.returncode, done.stdout


def test_the_engine_finds_its_auxiliary_vector() -> None:
    """It reads /proc/self/auxv, and not what happens to lie behind the environment: else SIGSEGV at rare starts."""
    assert run() == (0, "answer 1\n")


def test_without_the_auxiliary_vector_the_engine_would_die() -> None:
    """The reason for that path among those which Landlock leaves open."""
    assert run("auxv")[0] < 0
