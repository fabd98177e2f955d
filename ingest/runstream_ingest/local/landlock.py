"""Landlock: this process gives up every file and every connection that it does not need (Linux 5.13 and later).

The last wall behind the gate: even SQL that slipped through every other check reads nothing but the store's own files
and reaches no network. It holds for threads started after `restrict`, and cannot be undone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

__all__ = ["READ", "READ_WRITE", "WRITE_ONLY", "program_paths", "restrict"]

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_RULE_PATH_BENEATH: Final = 1
_VERSION_FLAG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_O_PATH: Final = getattr(os, "O_PATH", 0o10000000)

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

READ: Final = _READ_FILE | _READ_DIR | _EXECUTE
"""Read files below a path and map libraries."""
WRITE_ONLY: Final = _WRITE_FILE | _TRUNCATE | _READ_DIR | _MAKE_REG | _REMOVE_FILE
"""Make, write, rename and remove files right there, without reading any."""
READ_WRITE: Final = WRITE_ONLY | _READ_FILE | _MAKE_DIR | _REMOVE_DIR | _MAKE_SYM | _REFER


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def program_paths() -> list[Path]:
    """What Python and its libraries read: the installation, `sys.path`, system libraries, time zones, devices.

    The current directory is left out though Python puts it on `sys.path`: it may hold anything.
    """
    paths = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)}
    paths |= {Path(path) for path in sysconfig.get_paths().values()}
    for name in ("runstream_ingest", "runstream_schemas"):
        package = sys.modules.get(name)
        paths |= {Path(path) for path in getattr(package, "__path__", ())}
    here = Path.cwd()
    paths |= {Path(path) for path in sys.path if path and Path(path) != here}
    # Without auxv the engine takes what lies behind the environment for it, which is rubbish once a variable was set:
    # it then looks for the clock of the vDSO at a wild address.
    system = (
        "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /usr/share/zoneinfo /etc/ld.so.cache /etc/localtime /sys "
        "/etc/timezone /dev/null /dev/zero /dev/urandom /dev/random /proc/cpuinfo /proc/meminfo /proc/stat /proc/sys "
        "/proc/loadavg /proc/self/statm /proc/self/auxv"
    )
    paths |= {Path(path) for path in system.split()}
    return sorted(paths)


def restrict(grants: Mapping[Path, int], readable: Iterable[Path]) -> str | None:
    """Allow `grants`, reading of `readable`, and nothing else; call it before any thread is started.

    Returns:
        None on success; otherwise why this system cannot, for the log. Nothing was restricted then.
    """
    if not sys.platform.startswith("linux"):
        return f"Landlock is a Linux facility, this is {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if version < 1:
        return f"this kernel has no Landlock ({os.strerror(ctypes.get_errno())})"
    handled = (1 << 13) - 1
    handled |= _REFER if version >= 2 else 0
    handled |= _TRUNCATE if version >= 3 else 0
    handled |= _IOCTL_DEV if version >= 5 else 0
    # Bind and connect of TCP: the listening socket is bound by now, and nothing here connects to anything.
    attributes = _RulesetAttributes(handled, 0b11 if version >= 4 else 0, 0)
    size = 16 if version >= 4 else 8
    ruleset = libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return f"a Landlock ruleset cannot be made ({os.strerror(ctypes.get_errno())})"
    try:
        rules = [*((path, READ) for path in readable), *grants.items()]
        for path, access in rules:
            problem = _allow(libc, ruleset, path, access & handled)
            if problem is not None:
                return problem
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(_RESTRICT_SELF, ruleset, 0):
            return f"Landlock refused ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(ruleset)
    return None


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, access: int) -> str | None:
    try:
        parent = os.open(path, _O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return None
        raise
    try:
        if not path.is_dir():
            access &= _OF_FILES
        rule = _PathBeneath(access, parent)
        if libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0):
            return f"Landlock does not take {path} ({os.strerror(ctypes.get_errno())})"
    finally:
        os.close(parent)
    return None
