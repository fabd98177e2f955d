"""Artifact listings from the events: what was logged, without a look into storage."""

from __future__ import annotations

from typing import Final

from runstream.entities import FileInfo

from .errors import InvalidQuery
from .store import Store

__all__ = ["list_directory"]

_FILES: Final = """
SELECT path, latest.size_bytes
FROM (SELECT run_id, path, latest FROM artifact_facts FINAL WHERE run_id = {run:String})
WHERE latest.deleted = 0 AND startsWith(path, {prefix:String}) AND run_id NOT IN (SELECT run_id FROM purged_runs)
ORDER BY path"""


def list_directory(store: Store, run_id: str, path: str = "") -> list[FileInfo]:
    """Files and folders right below `path`, by path; empty where there are none or `path` is a file.

    Raises:
        InvalidQuery: `path` is absolute or leads upwards.
    """
    if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/"):
        raise InvalidQuery(f"artifact path {path!r}: expected a relative path without '..'")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    prefix = "".join(f"{part}/" for part in parts)
    found: dict[str, FileInfo] = {}
    for full, size in store.rows(_FILES, {"run": run_id, "prefix": prefix}):
        name, slash, _ = full[len(prefix) :].partition("/")
        child = prefix + name
        if slash:
            found[child] = FileInfo(child, True, None)
        else:
            found.setdefault(child, FileInfo(child, False, int(size)))
    return sorted(found.values(), key=lambda each: each.path)
