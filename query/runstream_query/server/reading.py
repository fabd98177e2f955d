"""The API's reads on top of `runstream_query.Reader`, with a server's patience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from runstream.config import Settings
from runstream.entities import ViewType
from runstream_query.api.state import Row
from runstream_query.facts import Facts
from runstream_query.opening import open_reader
from runstream_query.reader import Reader
from runstream_query.run_records import RunRecord
from runstream_query.visibility import Patience
from runstream_schemas.names import STREAMS, Stream

PATIENCE: Final = Patience(stall_seconds=10.0, limit_seconds=60.0)
"""A request whose log positions make no progress for ten seconds is answered 503 with Retry-After."""


class StoreReading:
    """`api.state.Reading` over one reader."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def rows(self, sql: str, parameters: Mapping[str, Any], wait: Sequence[Stream] = STREAMS) -> Sequence[Row]:
        """See `Reading`."""
        return self._reader.rows(sql, parameters, wait)

    def json_rows(self, sql: str, parameters: Mapping[str, Any], wait: Sequence[Stream] = STREAMS) -> bytes:
        """See `Reading`."""
        return self._reader.json_rows(sql, parameters, wait)

    def raw(self, sql: str, output_format: str, parameters: Mapping[str, Any], settings: Mapping[str, str]) -> bytes:
        """See `Reading`."""
        return self._reader.raw(sql, output_format, parameters, settings)

    def facts(self, wait: Sequence[Stream] = STREAMS) -> Facts:
        """See `Reading`."""
        return self._reader.facts(wait)

    def records(self, ids: Sequence[str], facts: Facts, *, metrics: bool = True) -> list[RunRecord]:
        """See `Reading`."""
        return self._reader.records(ids, facts, metrics=metrics)

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str,
        view_type: int,
        max_results: int,
        order_by: Sequence[str],
        page_token: str | None,
        *,
        shown_root: str | None = None,
    ) -> tuple[list[str], str | None, Facts]:
        """See `Reading`."""
        return self._reader.find_runs(
            experiment_ids,
            filter_string,
            ViewType(view_type),
            max_results,
            list(order_by),
            page_token,
            shown_root=shown_root,
        )

    def search_experiments(
        self, filter_string: str, view_type: int, max_results: int, order_by: Sequence[str], page_token: str | None
    ) -> tuple[list[str], str | None]:
        """See `Reading`."""
        page = self._reader.search_experiments(
            ViewType(view_type), max_results, filter_string, list(order_by), page_token
        )
        return [experiment.experiment_id for experiment in page], page.token

    def wait(self) -> None:
        """Return once everything logged before the call is visible."""
        self._reader.wait()

    def close(self) -> None:
        """Close the store's connection."""
        self._reader.close()


def open_reading(settings: Settings) -> StoreReading:
    """The store behind `settings`, reached for at the first read.

    Raises:
        InvalidQuery: the store's address does not fit, or there is none.
    """
    return StoreReading(open_reader(settings, patience=PATIENCE))
