"""Everything the client raises.

    RunstreamError
      InvalidInputError (ValueError)        wrong use: an argument does not fit; says which, the limit and the remedy
        InvalidTypeError (TypeError)        wrong use: an argument has the wrong type
        SettingsError                       a setting or address does not fit; names it
      NotFoundError (LookupError)           the run, experiment or artifact named does not exist
      UnavailableError (ConnectionError)    the store or the log cannot be reached or does not answer; try again later
        DeadlineError (TimeoutError)        it did not answer in time
      MissingExtraError (ImportError)       an optional part is not installed; gives the pip line
      ArtifactError                         storage refused or failed

Delivery trouble raises none of these in training code: it is counted and reported (`delivery_report.Report`).
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "DeadlineError",
    "InvalidInputError",
    "InvalidTypeError",
    "MissingExtraError",
    "NotFoundError",
    "RunstreamError",
    "SettingsError",
    "UnavailableError",
]


class RunstreamError(Exception):
    """Root of all errors of the client."""


class InvalidInputError(RunstreamError, ValueError):
    """An argument does not fit; nothing was logged."""


class InvalidTypeError(InvalidInputError, TypeError):
    """An argument has the wrong type; nothing was logged."""


class SettingsError(InvalidInputError):
    """A setting or an address does not fit."""


class NotFoundError(RunstreamError, LookupError):
    """What was named does not exist."""


class UnavailableError(RunstreamError, ConnectionError):
    """The store or the log cannot be reached, or refuses for now."""


class DeadlineError(UnavailableError, TimeoutError):
    """No answer in time."""


class MissingExtraError(RunstreamError, ImportError):
    """An optional part is not installed."""

    def __init__(self, what: str, extra: str = "", *, packages: str = "") -> None:
        line = packages or f"'runstream[{extra}]'"
        super().__init__(f"{what} needs an optional part: pip install {line}")
        self.extra = extra


class ArtifactError(RunstreamError):
    """Storage refused or failed."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        """True: the same call may succeed later."""
