"""Page tokens: where the last page ended, bound to the search that it belongs to.

A token carries the sort values of the page's last row, so that runs which come or go meanwhile shift nothing. Its
checksum finds damage; it is no secret, because its content can only become values of parameters.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Final

from ..errors import InvalidPageToken
from .sql import Sort

__all__ = ["decode", "encode", "fingerprint"]

Values = tuple[int | float | str, ...]
_CHECK_BYTES: Final = 6
_MAX_CHARS: Final = 2_000_000


def fingerprint(*parts: object) -> str:
    """Names a search: equal for equal filter, order, view and experiments."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=9).hexdigest()


def encode(search: str, last: Sequence[int | float | str]) -> str:
    """The token of the page behind the row with the sort values `last`."""
    values = [{"f": repr(value)} if isinstance(value, float) else value for value in last]
    body = json.dumps([search, values], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_check(body) + body).decode("ascii").rstrip("=")


def decode(token: str, search: str, sort: Sort) -> Values:
    """The sort values in `token`.

    Raises:
        InvalidPageToken: it was altered, is none of ours, or belongs to another search.
    """
    try:
        if not isinstance(token, str) or len(token) > _MAX_CHARS:
            raise ValueError
        raw = base64.b64decode(token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        check, body = raw[:_CHECK_BYTES], raw[_CHECK_BYTES:]
        if check != _check(body):
            raise ValueError
        found, values = json.loads(body)
        after = tuple(_value(value) for value in values)
    except (ValueError, KeyError, TypeError, RecursionError, UnicodeError, binascii.Error):
        raise InvalidPageToken(
            "Invalid page token: it is damaged or not of this search. Pass the token of the page before, unchanged"
        ) from None
    if found != search:
        raise InvalidPageToken(
            "Invalid page token: it belongs to another search. Filter, order_by, experiments and view must stay the "
            "same from page to page"
        )
    if [type(value) for value in after] != [column.kind for column in sort.columns]:
        raise InvalidPageToken("Invalid page token: it was made by another version: begin again with the first page")
    return after


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK_BYTES, person=b"page").digest()


def _value(value: Any) -> int | float | str:
    if isinstance(value, dict):
        number = float(value["f"])
        if math.isnan(number):
            raise ValueError
        return number
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return value
