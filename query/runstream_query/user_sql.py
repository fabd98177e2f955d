"""A caller's own SQL. What it may read is decided by the store's gate, not here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from .errors import InvalidQuery
from .store import Limits, Store

__all__ = ["Format", "check", "run"]

Format = Literal["pandas", "arrow", "rows"]
_FORMATS: Final = ("pandas", "arrow", "rows")
_PLACEHOLDER: Final = re.compile(r"\{(\w+):[^{}]+\}")


def check(query: str, parameters: Mapping[str, Any] | None, output_format: str) -> None:
    """Find wrong use before anything waits.

    Raises:
        InvalidQuery: see there.
    """
    if not isinstance(query, str) or not query.strip():
        raise InvalidQuery("the query is empty: give one SELECT, such as 'SELECT * FROM runs LIMIT 10'")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidQuery("the query holds a lone surrogate, which is no valid text") from exc
    if output_format not in _FORMATS:
        raise InvalidQuery(f"output format {output_format!r}: expected one of {', '.join(_FORMATS)}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidQuery("parameters must be a dict of values by name")
    named = set(_PLACEHOLDER.findall(query))
    for name in parameters or {}:
        if name not in named:
            raise InvalidQuery(
                f"the query has no placeholder for parameter {name!r}: write {{{name}:String}} or another type"
            )
    missing = named - set(parameters or {})
    if missing:
        raise InvalidQuery(f"the query's parameter {min(missing)!r} has no value: pass it in parameters")


def run(store: Store, query: str, parameters: Mapping[str, Any], output_format: Format, limits: Limits) -> Any:
    """Run `query`, which `check` has passed."""
    settings = limits.settings()
    if output_format == "arrow":
        return store.arrow(query, parameters, settings)
    if output_format == "rows":
        return store.named_rows(query, parameters, settings)
    return store.frame(query, parameters, settings)
