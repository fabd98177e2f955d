"""Enumerations and page tokens as MLflow's wire carries them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Final

from runstream.entities import ViewType

from .errors import invalid
from .wire import invalid_value

_VIEW_TYPES: Final[Mapping[str, int]] = {member.name: int(member) for member in ViewType}
RUN_STATUSES: Final[Mapping[str, int]] = {"RUNNING": 1, "SCHEDULED": 2, "FINISHED": 3, "FAILED": 4, "KILLED": 5}


def enum_name(value: str | int | None, members: Mapping[str, int], path: str) -> str | None:
    """The member that a name or a number (as protobuf JSON allows, also as a string) stands for.

    Raises:
        ApiError: there is none.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str) and value in members:
        return value
    for name, number in members.items():
        if str(number) == str(value):
            return name
    raise invalid(invalid_value(path, value, f"Expected one of {', '.join(members)}"))


def view_type_of(value: str | int | None, path: str) -> int:
    """The view type that a request names; active only where it names none."""
    name = enum_name(value, _VIEW_TYPES, path)
    return int(ViewType.ACTIVE_ONLY) if name is None else _VIEW_TYPES[name]


def page_token(offset: int) -> str:
    """The token of the page that starts at `offset`."""
    return base64.b64encode(json.dumps({"offset": offset}).encode()).decode()


def page_offset(token: str | None) -> int:
    """Where the page of `token` starts.

    Raises:
        ApiError: this is no token of ours.
    """
    if not token:
        return 0
    try:
        decoded = base64.b64decode(token, validate=False)
    except (binascii.Error, ValueError):
        raise invalid("Invalid page token, could not base64-decode") from None
    try:
        offset = json.loads(decoded)["offset"]
        if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset < 1 << 62:
            raise ValueError(offset)
    except (ValueError, KeyError, TypeError):
        raise invalid(f"Invalid page token, decoded value={decoded[:100]!r}") from None
    return offset
