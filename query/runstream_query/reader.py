"""`Reader`: all reading of one tracking address. Validates arguments, waits until the log is visible, and delegates."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from runstream.entities import Experiment, FileInfo, Metric, PagedList, Run, ViewType
from runstream_schemas.names import CONTROL, STREAMS, Stream

from . import artifacts, history, records, run_records, user_sql
from .errors import ExperimentNotFound, InvalidQuery, RunNotFound
from .facts import Facts, KnownFacts
from .known_runs import KnownRuns
from .known_searches import KnownSearches, Page
from .search import token
from .search.candidates import CandidateQuery, compile_candidates
from .search.experiments import ExperimentQuery, compile_experiments
from .search.parse import EXPERIMENTS, RUNS, parse_filter, parse_order
from .search.runs import RunQuery, compile_runs
from .store import Limits, Parameter, Store
from .visibility import LogEnd, Patience, Visibility

__all__ = ["MAX_RESULTS", "Reader"]

MAX_RESULTS: Final = 100_000
"""Runs or experiments of one page."""

_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


class Reader:
    """Reads one store. Any thread, several at once; works in forked children.

    Every method first waits until everything logged before the call is visible (see `visibility`), and raises:

        InvalidQuery: the request does not fit; NotFoundError: what was named does not exist.
        StoreUnavailable: the store does not answer; QueryTimeout: not in time.
    """

    def __init__(self, store: Store, log: LogEnd, visibility: Visibility) -> None:
        self._store = store
        self._log = log
        self._visibility = visibility
        self._facts = KnownFacts(store)
        self._known_runs = KnownRuns(store)
        self._known_searches = KnownSearches()
        _readers.add(self)

    # -- runs

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        run_view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
    ) -> PagedList[Run]:
        """One page of runs with latest metrics, params, tags and inputs; `token` of the list asks for the next."""
        ids, following, facts = self.find_runs(
            experiment_ids, filter_string, run_view_type, max_results, order_by, page_token
        )
        return PagedList(records.fetch_runs(self._store, ids, facts), following)

    def search_run_ids(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        run_view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
        patience: Patience | None = None,
    ) -> tuple[list[str], str | None]:
        """The ids of one page of runs, in order, and the next page's token."""
        return self.find_runs(
            experiment_ids, filter_string, run_view_type, max_results, order_by, page_token, patience
        )[:2]

    def find_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        run_view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
        patience: Patience | None = None,
        shown_root: str | None = None,
    ) -> tuple[list[str], str | None, Facts]:
        """`search_run_ids`, and the facts that the search rests on, for reading what is known of these runs.

        Args:
            shown_root: where the caller is told that the artifact root is, so that `artifact_uri` is compared as shown.
        """
        experiments = _strings(experiment_ids, "experiment_ids")
        limit = _max_results(max_results)
        view = _view(run_view_type)
        tree = parse_filter(_filter(filter_string), RUNS)
        orders = parse_order(order_by or (), RUNS)
        search = token.fingerprint(
            "runs",
            sorted(experiments),
            filter_string or "",
            [(*o.field.identity, o.ascending) for o in orders],
            int(view),
        )

        def compiled(facts: Facts, after: token.Values | None, among: Sequence[str] | None = None) -> RunQuery:
            shown = facts if shown_root is None else replace(facts, artifact_root=shown_root)
            return compile_runs(experiments, tree, orders, view, limit=limit + 1, facts=shown, after=after, among=among)

        after = None if not page_token else token.decode(page_token, search, compiled(Facts(), None).sort)
        if not experiments:
            return [], None, Facts()
        mark = self._visibility.wait(STREAMS, patience)
        facts = self._facts.at(mark)
        name = token.fingerprint(search, limit, page_token, shown_root)
        page = self._known_searches.at(name, mark)
        if page is None:
            began = time.monotonic()
            query = compiled(facts, after)
            candidates = compile_candidates(experiments, tree, orders, facts, limit + 1, after)
            rows = None
            if candidates is not None:
                rows = self._among(candidates, lambda among: compiled(facts, after, among), limit + 1)
            if rows is None:
                rows = self._store.rows(query.sql, query.parameters)
            rows, following = self._cut(rows, query, search, limit)
            page = Page([row[0] for row in rows], following)
            if not query.by_clock:
                self._known_searches.remember(name, mark, page, by_metrics=query.by_metrics, began=began)
        return list(page.ids), page.following, facts

    def _among(
        self, candidates: CandidateQuery, compiled: Callable[[Sequence[str]], RunQuery], limit: int
    ) -> list[tuple[Any, ...]] | None:
        """The search among the candidates; None: they do not suffice."""
        found = self._store.rows(candidates.sql, candidates.parameters)
        ids = list({row[0]: None for row in found})
        if sum(map(len, ids)) > records.BULK_CHARS:
            return None
        query = compiled(ids)
        rows = self._store.rows(query.sql, query.parameters) if ids else []
        return rows if candidates.suffice(found, rows, limit) else None

    def get_run(self, run_id: str) -> Run:
        """One run, deleted ones too."""
        (wanted,) = _strings([run_id], "run_id")
        found = records.fetch_runs(self._store, [wanted], self._facts.at(self._visibility.wait()))
        if not found:
            raise RunNotFound(wanted)
        return found[0]

    def get_runs(self, run_ids: Sequence[str]) -> list[Run]:
        """The runs of `run_ids` that exist, in that order."""
        wanted = _strings(run_ids, "run_ids")
        return records.fetch_runs(self._store, wanted, self._facts.at(self._visibility.wait()))

    # -- experiments

    def search_experiments(
        self,
        view_type: ViewType = ViewType.ACTIVE_ONLY,
        max_results: int = 1000,
        filter_string: str = "",
        order_by: Sequence[str] | None = None,
        page_token: str | None = None,
        patience: Patience | None = None,
    ) -> PagedList[Experiment]:
        """One page of experiments; the newest first where no order is given."""
        limit = _max_results(max_results)
        view = _view(view_type)
        tree = parse_filter(_filter(filter_string), EXPERIMENTS)
        orders = parse_order(order_by or (), EXPERIMENTS)
        search = token.fingerprint(
            "experiments", filter_string or "", [(*o.field.identity, o.ascending) for o in orders], int(view)
        )

        def compiled(after: token.Values | None) -> ExperimentQuery:
            return compile_experiments(tree, orders, view, limit=limit + 1, after=after)

        after = None if not page_token else token.decode(page_token, search, compiled(None).sort)
        self._visibility.wait((CONTROL,), patience)
        rows, following = self._page(compiled(after), search, limit)
        return PagedList([records.experiment(row[: -len(compiled(None).sort.columns)]) for row in rows], following)

    def get_experiment(self, experiment_id: str) -> Experiment:
        """One experiment, deleted ones too."""
        (wanted,) = _strings([experiment_id], "experiment_id")
        facts = self._facts.at(self._visibility.wait((CONTROL,)))
        found = records.fetch_experiment(self._store, "experiment_id", wanted, facts)
        if found is None:
            raise ExperimentNotFound(wanted)
        return found

    def get_experiment_by_name(self, name: str) -> Experiment | None:
        """The experiment of that name, an active one before a deleted one; None if there is none."""
        (wanted,) = _strings([name], "name")
        facts = self._facts.at(self._visibility.wait((CONTROL,)))
        return records.fetch_experiment(self._store, "name", wanted, facts)

    # -- metrics

    def metric_history(
        self,
        run_id: str,
        key: str,
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        order: Literal["step", "time"] = "step",
    ) -> list[Metric]:
        """Every point of one metric, exact and in order; empty where the run or key is unknown."""
        self._visibility.wait()
        return history.raw(self._store, run_id, key, first_step=first_step, last_step=last_step, order=order)

    def metric_buckets(
        self,
        run_ids: Sequence[str],
        keys: Sequence[str],
        buckets: int = 500,
        *,
        first_step: int | None = None,
        last_step: int | None = None,
        timestamps: bool = False,
    ) -> dict[tuple[str, str], list[history.Bucket]]:
        """(run id, key) -> mean, minimum and maximum over at most `buckets` equal stretches of steps.

        With `timestamps`, also when each bucket begins and ends, which doubles what a long series costs.
        """
        self._visibility.wait()
        return history.buckets(
            self._store, run_ids, keys, buckets, first_step=first_step, last_step=last_step, timestamps=timestamps
        )

    def metric_points(
        self,
        run_ids: Sequence[str],
        keys: Sequence[str],
        count: int = 1000,
        *,
        first_step: int | None = None,
        last_step: int | None = None,
    ) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """(run id, key) -> at most `count` real points (step, value) that keep the curve's shape (LTTB)."""
        self._visibility.wait()
        return history.points(self._store, run_ids, keys, count, first_step=first_step, last_step=last_step)

    def latest_metrics(self, run_ids: Sequence[str], keys: Sequence[str] | None = None) -> list[history.Series]:
        """Newest point and extremes of each metric of the runs, by run id and key."""
        self._visibility.wait()
        return history.latest(self._store, run_ids, keys)

    # -- artifacts, SQL

    def list_artifacts(self, run_id: str, path: str = "") -> list[FileInfo]:
        """Files and folders right below `path` of a run, as far as they were logged (not what else lies in storage)."""
        (wanted,) = _strings([run_id], "run_id")
        self._visibility.wait((CONTROL,))
        return artifacts.list_directory(self._store, wanted, path)

    def sql(
        self,
        query: str,
        parameters: Mapping[str, Any] | None = None,
        output_format: user_sql.Format = "pandas",
        limits: Limits | None = None,
    ) -> Any:
        """The result of one read-only statement over the public views: a DataFrame, an Arrow table, or a list of dicts.

        Args:
            parameters: values of `{name:Type}` placeholders.
            limits: bounds on rows, time and memory beside the store's own.
        """
        user_sql.check(query, parameters, output_format)
        self._visibility.wait()
        return user_sql.run(self._store, query, parameters or {}, output_format, limits or Limits())

    # -- for the server

    def wait(self, streams: Sequence[Stream] = STREAMS, patience: Patience | None = None) -> None:
        """Return once everything logged before the call is visible."""
        self._visibility.wait(streams, patience)

    def rows(
        self,
        sql: str,
        parameters: Mapping[str, Parameter] | None = None,
        wait: Sequence[Stream] = STREAMS,
        patience: Patience | None = None,
    ) -> list[tuple[Any, ...]]:
        """The rows of one SELECT of ours; `wait` names the streams that must be visible, none for no wait."""
        if wait:
            self._visibility.wait(wait, patience)
        return self._store.rows(sql, parameters)

    def json_rows(
        self,
        sql: str,
        parameters: Mapping[str, Parameter] | None = None,
        wait: Sequence[Stream] = STREAMS,
        patience: Patience | None = None,
    ) -> bytes:
        """The rows of one SELECT as a JSON array of objects, written by the store; NaN is the string "nan"."""
        if wait:
            self._visibility.wait(wait, patience)
        settings = {
            "output_format_json_array_of_rows": "1",
            "output_format_json_quote_64bit_integers": "0",
            "output_format_json_quote_denormals": "1",
        }
        return self._store.raw(sql, "JSONEachRow", parameters, settings)

    def raw(
        self,
        sql: str,
        output_format: str,
        parameters: Mapping[str, Parameter] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> bytes:
        """The result of one SELECT of ours as the store wrote it; does not wait."""
        return self._store.raw(sql, output_format, parameters, settings)

    def facts(self, wait: Sequence[Stream] = STREAMS) -> Facts:
        """Rare facts about everything, once everything logged before the call in the streams `wait` is visible."""
        return self._facts.at(self._visibility.wait(wait))

    def records(self, run_ids: Sequence[str], facts: Facts, *, metrics: bool = True) -> list[run_records.RunRecord]:
        """Everything known of the runs of `run_ids` (few, each once) that exist, in that order; does not wait.

        Shared with other callers, and remembered as long as the log stays as `facts` found it (`known_runs`).
        """
        mark = facts.mark
        if mark is None or (metrics and mark.everything is None):
            return run_records.fetch_records(self._store, run_ids, facts, metrics=metrics)
        if metrics:
            return self._known_runs.at(run_ids, facts, mark)
        return self._known_runs.without_metrics(run_ids, facts, mark)

    def close(self) -> None:
        """Release connections; a later read opens new ones."""
        self._store.close()
        close = getattr(self._log, "close", None)
        if close is not None:
            close()

    def _page(
        self, query: RunQuery | ExperimentQuery, search: str, limit: int
    ) -> tuple[list[tuple[Any, ...]], str | None]:
        return self._cut(self._store.rows(query.sql, query.parameters), query, search, limit)

    @staticmethod
    def _cut(
        rows: list[tuple[Any, ...]], query: RunQuery | ExperimentQuery, search: str, limit: int
    ) -> tuple[list[tuple[Any, ...]], str | None]:
        if len(rows) <= limit:
            return rows, None
        rows = rows[:limit]
        kinds = [column.kind for column in query.sort.columns]
        last = [kind(value) for kind, value in zip(kinds, rows[-1][-len(kinds) :], strict=True)]
        return rows, token.encode(search, last)

    def _after_fork_in_child(self) -> None:
        self._store.after_fork_in_child()
        self._visibility.after_fork_in_child()
        self._known_runs = KnownRuns(self._store)
        self._known_searches = KnownSearches()
        renew = getattr(self._log, "after_fork_in_child", None)
        if renew is not None:
            renew()


def _after_fork_in_child() -> None:
    for reader in list(_readers):
        reader._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _strings(values: Sequence[str], name: str) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidQuery(f"{name} is {values!r}: expected a list of strings")
    for value in values:
        if not isinstance(value, str):
            raise InvalidQuery(f"{name} holds {value!r}: expected a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise InvalidQuery(f"{name} holds {value!a}, which is no valid text") from exc
    return list(values)


def _filter(text: str | None) -> str:
    return "" if text is None else text


def _max_results(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RESULTS:
        raise InvalidQuery(f"max_results is {value!r}: expected a whole number from 1 to {MAX_RESULTS}")
    return value


def _view(value: int) -> ViewType:
    try:
        return ViewType(value)
    except ValueError as exc:
        raise InvalidQuery(f"view type is {value!r}: expected ACTIVE_ONLY, DELETED_ONLY or ALL") from exc
