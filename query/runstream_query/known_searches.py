"""Pages of searches, remembered for one state of the log, like the runs on them (`known_runs`).

The run ids that a search finds stay the same until something is logged; a page that says nothing of metrics, until
something else than metrics is. Searches that ask for the time (LOST) are not remembered.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .known_runs import MAX_AGE_SECONDS
from .remembering import Remembered
from .visibility import Mark

__all__ = ["KnownSearches", "Page"]

MAX_BYTES: Final = 16 << 20
_ID_BYTES: Final = 90
"""A run id as a Python text in a list."""
_PAGE_BYTES: Final = 1_000


@dataclass(frozen=True, slots=True)
class Page:
    """Run ids in order, and the next page's token."""

    ids: Sequence[str]
    following: str | None


@dataclass(frozen=True, slots=True)
class _Known:
    mark: Mark
    """`everything` is None where metrics do not matter."""
    page: Page
    read_at: float


class KnownSearches:
    """Any thread, several at once."""

    def __init__(self, *, max_bytes: int = MAX_BYTES) -> None:
        self._pages: Remembered[str, _Known] = Remembered(max_bytes)

    def at(self, search: str, mark: Mark) -> Page | None:
        """The page that `search` (a fingerprint) names, as of `mark`; None: it must be searched."""
        known = self._pages.get(search)
        if known is None or known.mark.control != mark.control:
            return None
        if known.mark.everything is not None and known.mark.everything != mark.everything:
            return None
        return known.page if time.monotonic() - known.read_at < MAX_AGE_SECONDS else None

    def remember(self, search: str, mark: Mark, page: Page, *, by_metrics: bool, began: float) -> None:
        """Keep `page`, found after `mark` became visible.

        Args:
            by_metrics: filter or order look at metrics.
            began: monotonic time of the search.
        """
        if by_metrics and mark.everything is None:
            return
        known = _Known(mark if by_metrics else mark._replace(everything=None), page, began)
        self._pages.put(search, known, _PAGE_BYTES + _ID_BYTES * len(page.ids) + len(page.following or ""))
