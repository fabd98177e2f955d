"""The names file: which run and key (or keys of a call) an id in a record stands for.

One JSON line per id, `[id, run id, key]` or `[id, run id, [keys]]`, appended before the id is first used. A line that
a kill tore is the last one, and no record uses its id.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from typing import Final

__all__ = ["NAMES_FILE", "Name", "Names", "read_names"]

NAMES_FILE: Final = "names"

Name = tuple[str, str | tuple[str, ...]]
"""(run id, metric key) or, for a call, (run id, keys in the order of its values)"""
_sync: Final = getattr(os, "fdatasync", os.fsync)
"""macOS has only fsync."""


class Names:
    """Gives out ids. Called under the journal's lock, which a signal handler may enter again."""

    def __init__(self, folder: str | None) -> None:
        self.table: dict[int, Name] = {}
        """Every id ever used in this journal; also read by the delivery thread."""
        self._ids = itertools.count(1)
        self._fd = -1
        self._unwritten: list[bytes] = []
        if folder is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(f"{folder}/{NAMES_FILE}", flags, 0o600)

    def add(self, name: Name) -> tuple[int, OSError | None]:
        """A new id for `name`; its line is in the file, unless the disk refuses (the error; `save` tries again)."""
        number = next(self._ids)
        line = (json.dumps([number, *name], ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8")
        self.table[number] = name
        if self._fd >= 0:
            self._unwritten.append(line)
        return number, self.save()

    def save(self) -> OSError | None:
        """Write what the disk refused before; the error if it still does."""
        while self._unwritten:
            line = self._unwritten[0]
            try:
                end = os.fstat(self._fd).st_size
                if os.write(self._fd, line) != len(line):
                    os.ftruncate(self._fd, end)
                    return OSError("no room for the journal's names")
            except OSError as exc:
                return exc
            if self._unwritten and self._unwritten[0] is line:  # else a signal handler was here too
                del self._unwritten[0]
        return None

    def sync(self) -> None:
        """Make the file safe from power loss.

        Raises:
            OSError: the disk failed.
        """
        if self._fd >= 0:
            _sync(self._fd)

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


def read_names(data: bytes) -> tuple[dict[int, Name], int]:
    """The table in a names file, and how many lines do not parse (a torn last one is not counted)."""
    table: dict[int, Name] = {}
    bad = 0
    lines = data.split(b"\n")
    for line in lines[:-1]:  # behind the last newline lies nothing, or a torn line
        try:
            number, run_id, key = json.loads(line)
            if not isinstance(number, int) or not isinstance(run_id, str) or number < 1:
                raise ValueError
            if isinstance(key, list) and all(isinstance(part, str) for part in key):
                table[number] = (run_id, tuple(key))
            elif isinstance(key, str):
                table[number] = (run_id, key)
            else:
                raise ValueError
            json.dumps(table[number], ensure_ascii=False).encode("utf-8")  # half of a surrogate pair breaks Avro
        except (ValueError, TypeError):
            bad += 1
    return table, bad
