"""Everything reading raises.

    QueryError (RunstreamError)
      InvalidQuery (InvalidInputError)      the caller's fault: the request itself can never succeed
        InvalidFilter                       a filter or an ordering; says where and what was expected
        InvalidPageToken                    a token that belongs to another search, or was altered
        SqlError                            the store refused a caller's SQL; carries the engine's code
      RunNotFound, ExperimentNotFound (NotFoundError)
      StoreUnavailable (UnavailableError)   the store cannot be reached or started; try again later
        StoreBusy                           it refuses for now: too many queries, memory
        QueryTimeout (DeadlineError)        no answer in time, or what was logged is not visible yet

The right-hand bases are the client's, so that callers of its door need to know only those.
"""

from __future__ import annotations

from typing import Final

from runstream.errors import DeadlineError, InvalidInputError, NotFoundError, RunstreamError, UnavailableError

__all__ = [
    "ExperimentNotFound",
    "InvalidFilter",
    "InvalidPageToken",
    "InvalidQuery",
    "QueryError",
    "QueryTimeout",
    "RunNotFound",
    "SqlError",
    "StoreBusy",
    "StoreUnavailable",
]

_SHOWN_CHARS: Final = 60


class QueryError(RunstreamError):
    """Root of all errors of reading."""


class InvalidQuery(QueryError, InvalidInputError):
    """The request itself does not fit; asking again cannot help."""


class InvalidFilter(InvalidQuery):
    """A filter or ordering does not parse or compares what cannot be compared."""

    def __init__(self, reason: str, text: str, position: int | None = None) -> None:
        """Args:
        reason: what is wrong and what was expected.
        text: the whole filter or ordering.
        position: index in `text` of the first character that does not fit; None where it is the text as a whole.
        """
        self.reason = reason
        self.text = text
        self.position = position
        super().__init__(reason if position is None else f"{reason}\n{_pointed(text, position)}")


class InvalidPageToken(InvalidQuery):
    """A page token is damaged or belongs to another search."""


class SqlError(InvalidQuery):
    """The store refused a statement."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
        """ClickHouse's error code; 0 where the store named none."""


class RunNotFound(QueryError, NotFoundError):
    """There is no such run."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"there is no run with id {run_id!r}")
        self.run_id = run_id


class ExperimentNotFound(QueryError, NotFoundError):
    """There is no such experiment."""

    def __init__(self, experiment_id: str) -> None:
        super().__init__(f"there is no experiment with id {experiment_id!r}")
        self.experiment_id = experiment_id


class StoreUnavailable(QueryError, UnavailableError):
    """The store cannot be reached or started."""


class StoreBusy(StoreUnavailable):
    """The store refuses for now; the same call may succeed later."""


class QueryTimeout(StoreUnavailable, DeadlineError):
    """No answer in time."""


def _pointed(text: str, position: int) -> str:
    """The part of `text` around `position` on one line, and below it a caret."""
    begin = max(0, position - _SHOWN_CHARS)
    part = text[begin : position + _SHOWN_CHARS]
    # Control characters would break the line or hide; a space each keeps the caret in place.
    shown = "".join(char if char.isprintable() else " " for char in part)
    return f"  {shown}\n  {' ' * (position - begin)}^"
