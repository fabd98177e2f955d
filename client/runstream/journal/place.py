"""Where journals may lie, and which machine this is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from ..config import Settings
from ..errors import SettingsError

__all__ = ["Host", "is_network_file_system", "journal_folders", "this_host"]

_NETWORK: Final = frozenset(
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ncpfs",
        "afs",
        "coda",
        "ceph",
        "lustre",
        "gpfs",
        "beegfs",
        "glusterfs",
        "pvfs2",
        "orangefs",
        "panfs",
        "wekafs",
        "vboxsf",
        "fuse.sshfs",
        "fuse.glusterfs",
        "fuse.ceph",
        "fuse.s3fs",
        "fuse.rclone",
        "fuse.gcsfuse",
        "fuse.mountpoint-s3",
        "fuse.juicefs",
        "fuse.cephfs",
        "fuse.beegfs",
        "fuse.davfs2",
        "davfs",
        "efs",
    ]
)


@dataclass(frozen=True, slots=True)
class Host:
    """Which machine wrote a journal. flock tells a live owner from a dead one only on the same machine."""

    boot_id: str
    """Changes with each boot of the kernel; equal in all containers of one machine."""
    machine_id: str
    """Survives a reboot; may be missing or shared in containers."""

    def is_same(self, other: Host) -> bool:
        """The same machine, perhaps after a reboot, or another container of it."""
        return (bool(self.boot_id) and self.boot_id == other.boot_id) or (
            bool(self.machine_id) and self.machine_id == other.machine_id
        )


@cache
def this_host() -> Host:
    """This machine."""
    node = os.uname().nodename
    return Host(
        _first_line("/proc/sys/kernel/random/boot_id"),
        f"{_first_line('/etc/machine-id')}/{node}" if node else _first_line("/etc/machine-id"),
    )


def journal_folders(settings: Settings) -> list[Path]:
    """Folders for journals of this target, the preferred one first. Recovery looks in all of them.

    Network file systems are left out: there neither flock nor a shared mapping can be trusted.

    Raises:
        SettingsError: RUNSTREAM_JOURNAL_DIR itself lies on one.
    """
    mounts = _mounts()
    if settings.journal_dir is not None:
        if is_network_file_system(settings.journal_dir, mounts):
            raise SettingsError(
                f"RUNSTREAM_JOURNAL_DIR is {str(settings.journal_dir)!r}, on a network file system: name a folder on a "
                "disk of this machine"
            )
        return [settings.journal_dir]
    found: list[Path] = []
    if settings.data_directory is not None:
        found.append(settings.data_directory.journals)
    state = os.environ.get("XDG_STATE_HOME")
    home = Path(state if state and os.path.isabs(state) else os.path.expanduser("~/.local/state"))
    found.append(home / "runstream" / "journal")
    found.append(Path("/var/tmp" if os.path.isdir("/var/tmp") else "/tmp") / f"runstream-{os.getuid()}")
    return [folder for folder in found if folder.is_absolute() and not is_network_file_system(folder, mounts)]


def is_network_file_system(folder: Path, mounts: list[tuple[str, str]] | None = None) -> bool:
    """Whether `folder` lies, or would lie, on a file system of another machine."""
    path = os.path.realpath(folder)
    best, kind = -1, ""
    for mount, file_system in _mounts() if mounts is None else mounts:
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:  # of mounts over each other the last one counts
            best, kind = len(mount), file_system
    return kind in _NETWORK


def _mounts() -> list[tuple[str, str]]:
    """(mount point, type) of every mount, in the order of mounting."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) > 4 and right:
            mount = fields[4]
            for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                mount = mount.replace(code, character)
            found.append((mount, right.split(" ", 1)[0]))
    return found


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return ""
