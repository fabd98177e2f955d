"""Which log filled the store: remembered beside the positions, so that they are never used on another log.

Kafka forgets a deleted topic's commits, and a topic that was made anew may have grown beyond the old positions: its id
alone tells. The store keeps it in `settings`, as `log_identity.STREAM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from runstream_schemas.names import Stream

from .log import LogError, Positions
from .store import Store

__all__ = ["check"]

_NAME: Final = "log_identity."


def check(store: Store, identities: Mapping[Stream, str], positions: Positions) -> None:
    """Compare the log's streams with those that `positions` belong to, and remember the ones not known yet.

    Args:
        positions: what the store holds; a stream without any may be replaced.

    Raises:
        LogError: another stream of the same name; nothing was changed.
        StoreBusy, StoreError: the store cannot be asked.
    """
    if not identities:
        return
    rows = store.rows(f"SELECT name, value FROM settings FINAL WHERE startsWith(name, '{_NAME}')")
    remembered = {name.removeprefix(_NAME): value for name, value in rows}
    filled = {stream for (stream, _), offset in positions.items() if offset}
    for stream, identity in identities.items():
        known = remembered.get(stream)
        if known is not None and known != identity and stream in filled:
            raise LogError(
                f"the log of {stream} was deleted and made anew: its id is {identity}, this store was filled from "
                f"{known}. Use `runstream rebuild`, or another database and so another consumer group"
            )
    for stream, identity in identities.items():
        if remembered.get(stream) != identity:
            store.execute(
                "INSERT INTO settings (name, value, updated_at) SELECT {name:String}, {value:String}, now64(3, 'UTC')",
                {"name": _NAME + stream, "value": identity},
            )
