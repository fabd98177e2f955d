"""The data directory: what lies where, and the address file of the local store process.

runstream-data/
  log/control/ log/metrics/   the directory log (see `segment`)
  db/                         the store's files, `server.json`, `lock`, `server.log`
  artifacts/                  artifacts, unless RUNSTREAM_ARTIFACT_ROOT says otherwise
  journal/                    journals of this host's training processes
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

DEFAULT_DIRECTORY: Final = "runstream-data"
READER: Final = "reader"
"""User name for read-only SQL; its password is the `reader_token`."""
WRITER: Final = "writer"
"""User name for inserts and migrations; its password is the `writer_token`."""


@dataclass(frozen=True, slots=True)
class DataDirectory:
    """Paths inside one data directory. Making one touches nothing."""

    root: Path

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def database(self) -> Path:
        return self.root / "db"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def journals(self) -> Path:
        return self.root / "journal"

    @property
    def server_file(self) -> Path:
        """Address of the live local store process, mode 0600; stale unless `lock` is held."""
        return self.database / "server.json"

    @property
    def lock(self) -> Path:
        """Held by `flock` for as long as a local store process lives."""
        return self.database / "lock"

    @property
    def server_log(self) -> Path:
        return self.database / "server.log"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where the local store process listens, and its tokens. Secrets stay out of `repr`."""

    pid: int
    host: str
    port: int
    reader_token: str
    writer_token: str
    version: str
    """runstream version that runs the process."""

    def __repr__(self) -> str:
        return f"ServerAddress(pid={self.pid}, host={self.host!r}, port={self.port}, version={self.version!r})"

    def write(self, path: Path) -> None:
        """Publish atomically at `path`, readable by the owner only."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> ServerAddress | None:
        """The published address, or None where there is none or it is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None
