"""Which bodies of a refused insert are to blame: decode-only probes, which leave nothing behind.

fastavro says which bodies look wrong, so that usually one probe clears all others and each suspect takes one more;
what both decoders disagree about is found by bisection. The engine alone condemns. A probe inserts into a copy of the
landing table that has no views. Before any body is blamed, a body of our own must pass the same probe: where it does
not, the store is at fault and the worker must stop (`SystemicFailure`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from runstream_schemas import codec

from .block import PROBE, columns, frame_blocks
from .errors import StoreBusy, StoreError, SystemicFailure
from .frame import Framed, frame
from .log import LogBlock, LogRecord
from .store import Store

__all__ = ["Isolated", "isolate", "sound_blocks"]

T = TypeVar("T")
Call = Callable[[Callable[[], None]], None]
"""Runs a store call, again while the store is busy."""


@dataclass(frozen=True, slots=True)
class Isolated:
    """The two halves of a refused insert."""

    survivors: Sequence[LogRecord]
    poison: Sequence[tuple[LogRecord, str]]
    """Records that do not decode, each with the engine's reason."""


def isolate(store: Store, framed: Framed, cause: StoreError, call: Call) -> Isolated:
    """Find every record of `framed` that does not decode.

    Args:
        cause: the refusal that started it.
        call: wraps each probe, so that a store that goes away in the middle is waited for.

    Raises:
        SystemicFailure: the refusal cannot be blamed on bodies: a good one is refused too, or each decodes by itself.
    """
    if cause.systemic:
        raise SystemicFailure(f"the store refuses every {framed.event}: {cause}") from cause
    fingerprint = framed.records[0].fingerprint or b""
    canary = LogRecord("control", 0, 0, 1, 0, None, fingerprint, _canary(fingerprint))
    refused = _probe(store, [canary], call)
    if refused is not None:
        raise SystemicFailure(f"the store refuses a sound {framed.event}: {refused}") from refused
    poison: list[tuple[LogRecord, str]] = []
    survivors: list[LogRecord] = []
    suspects = [record for record in framed.records if _is_suspect(record)]
    known = {id(record) for record in suspects}
    others = [record for record in framed.records if id(record) not in known]
    groups = [others] if others else []
    for part, refused in _bisect([[one] for one in suspects] + groups, lambda some: _probe(store, some, call)):
        if refused is None:
            survivors.extend(part)
        else:
            poison.append((part[0], f"does not decode: {refused}"))
    if not poison:
        raise SystemicFailure(f"the store refuses {framed.event} bodies that all decode: {cause}") from cause
    return Isolated(survivors, poison)


def sound_blocks(store: Store, blocks: Sequence[LogBlock], cause: StoreError, call: Call) -> list[LogBlock]:
    """Those of `blocks`, in order, that decode and hold together as blocks; nobody is blamed for the others yet.

    Args:
        cause: the refusal that started it.
        call: as for `isolate`.

    Raises:
        SystemicFailure: the refusal blames the database or the account.
    """
    if cause.systemic:
        raise SystemicFailure(f"the store refuses every block of metrics: {cause}") from cause
    parts = _bisect([blocks], lambda some: _probe_blocks(store, some, call))
    return [block for part, refused in parts if refused is None for block in part]


def _bisect(
    groups: Sequence[Sequence[T]], probe: Callable[[Sequence[T]], StoreError | None]
) -> Iterator[tuple[Sequence[T], StoreError | None]]:
    """Parts of `groups` that pass the probe, and each single item that does not, with the refusal; in order."""
    work: list[Sequence[T]] = list(reversed(groups))
    while work:
        part = work.pop()
        refused = probe(part)
        if refused is None or len(part) == 1:
            yield part, refused
        else:
            # The right half first onto the stack, so that what passes keeps its order.
            middle = len(part) // 2
            work += [part[middle:], part[:middle]]


def _is_suspect(record: LogRecord) -> bool:
    """Whether the body looks wrong from here: a hint for the order of the probes, no verdict."""
    try:
        codec.decode(record.fingerprint or b"", record.body or b"")
    except codec.CodecError:
        return True
    return False


def _probe(store: Store, records: Sequence[LogRecord], call: Call) -> StoreError | None:
    [framed] = frame(records)
    return _refusal(store, f"probe_{framed.event}", framed.columns, framed.chunks, call)


def _probe_blocks(store: Store, blocks: Sequence[LogBlock], call: Call) -> StoreError | None:
    return _refusal(store, PROBE, columns(blocks[0].fingerprint), frame_blocks(blocks), call)


def _refusal(store: Store, table: str, names: Sequence[str], chunks: Sequence[bytes], call: Call) -> StoreError | None:
    try:
        call(lambda: store.insert(table, names, chunks))
    except StoreBusy:
        raise
    except StoreError as exc:
        if exc.systemic:
            raise SystemicFailure(f"the store refuses an insert into {table}: {exc}") from exc
        return exc
    return None


@cache
def _canary(fingerprint: bytes) -> bytes:
    """A sound body of the schema with this fingerprint: empty strings and arrays, zeros."""
    import io

    import fastavro

    schema = codec.schemas()[fingerprint]
    values: dict[str, Any] = {}
    for one in schema.definition["fields"]:
        kind = one["type"]
        kind = kind["type"] if isinstance(kind, dict) else kind
        values[one["name"]] = {"string": "", "array": [], "map": {}, "boolean": False, "double": 0.0}.get(kind, 0)
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, schema.parsed, values)
    return buffer.getvalue()
