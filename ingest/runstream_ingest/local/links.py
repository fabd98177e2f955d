"""Symbolic links among the engine's files that a copy has turned into folders.

The engine keeps a database's and its tables' files below `store/<uuid>` and links their names to them. Many ways of
copying follow links, and the engine refuses a folder where it expects a link, or nothing.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

__all__ = ["repair_links"]

_UUID: Final = re.compile(r"UUID '([0-9a-f-]{36})'")


def repair_links(files: Path) -> int:
    """Remove such folders, whose content is also in `store`; the engine makes the links anew. Before it is opened.

    Returns:
        How many folders were removed.

    Raises:
        OSError: one cannot be removed.
    """
    removed = 0
    for statement in (files / "metadata").glob("*.sql"):
        match = _UUID.search(statement.read_text(encoding="utf-8", errors="replace"))
        if match is None:
            continue
        uuid = match[1]
        original = files / "store" / uuid[:3] / uuid
        name = statement.stem
        if not original.is_dir():
            continue
        named = files / "metadata" / name
        tables = files / "data" / name
        copies = [named] if named.is_dir() and not named.is_symlink() else []
        copies += [table for table in (tables.iterdir() if tables.is_dir() else ()) if not table.is_symlink()]
        for copy in copies:
            shutil.rmtree(copy)
            removed += 1
    return removed
