"""Control events as bodies: encoded under their schema, and split where one body cannot hold them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from runstream_schemas.limits import MAX_BODY_BYTES
from runstream_schemas.names import EventName

from .delivery import importing
from .errors import InvalidInputError

__all__ = ["encode_control"]


def encode_control(event: EventName, fields: Mapping[str, Any]) -> list[tuple[str, bytes, bytes]]:
    """(key, fingerprint, body) of the event, or of the events that it must be split into.

    Raises:
        CodecError: `fields` do not fit the event's schema.
        InvalidInputError: the event is larger than `limits.MAX_BODY_BYTES` and cannot be split.
    """
    if "runstream_schemas.codec" not in sys.modules:
        with importing:  # not otherwise: heartbeats come here with the recorder's lock held, which forks take after it
            pass
    from runstream_schemas import codec

    body = codec.encode(event, fields)
    key = str(fields.get("run_id") or fields.get("experiment_id") or fields.get("id") or "")
    if len(body) <= MAX_BODY_BYTES:
        return [(key, codec.current(event).fingerprint, body)]
    keys = fields.get("keys")
    if not isinstance(keys, list) or len(keys) < 2:
        raise InvalidInputError(
            f"the event {event} of {key} is {len(body):,} bytes large; the limit is {MAX_BODY_BYTES:,}: log large "
            "texts as artifacts"
        )
    half = len(keys) // 2
    left = {**fields, "keys": keys[:half], "values": fields["values"][:half]}
    right = {**fields, "keys": keys[half:], "values": fields["values"][half:]}
    if "deleted_keys" in fields:
        right["deleted_keys"] = []
    return encode_control(event, left) + encode_control(event, right)
