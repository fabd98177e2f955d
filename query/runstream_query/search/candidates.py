"""Which runs can be on a short page of a large store: read first, cheaply, so that the search looks at few runs.

Rows that are not merged yet are read as they lie, in the order of the first thing that the page is ordered by. What a
run is ordered by is always one of its rows, so every run that comes before the last row read is among the candidates;
an outdated row only adds a candidate. The search among them is the whole answer where its last run still comes before
that row. Otherwise the caller searches among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..facts import Facts
from ..store import Parameter
from .parse import Order
from .runs import conjuncts
from .sql import Parameters, compare_number
from .tree import Comparison, Filter

__all__ = ["CandidateQuery", "compile_candidates"]

MAX_PAGE: Final = 200
MIN_RUN_ROWS: Final = 20_000
"""Below it a search of all runs is as quick."""
_COUNT: Final = 500
_PER_ROW: Final = 8
"""Candidates for each run of the page, twice as many under a filter on something else; more filters leave too few."""


@dataclass(frozen=True, slots=True)
class CandidateQuery:
    """A SELECT of (run id, class, value): class 1 stands for a metric that is not a number, 0 for everything else."""

    sql: str
    parameters: dict[str, Parameter]
    count: int
    ascending: bool
    is_metric: bool
    required: bool
    """Runs without what is ordered by cannot match."""

    def suffice(self, rows: Sequence[Sequence[Any]], page: Sequence[Sequence[Any]], limit: int) -> bool:
        """Whether `page`, up to `limit` runs found among the candidates `rows`, with sort columns, is the answer."""
        complete = len(rows) < self.count
        if complete and (self.required or len(page) == limit):
            return True
        if len(page) < limit:
            return False
        *place, value = page[-1][1:3] if self.is_metric else page[-1][1:2]
        _, last_class, last_value = rows[-1]
        if place and place[0] != last_class:
            return bool(place[0] < last_class)
        return bool(value < last_value if self.ascending else value > last_value)


def compile_candidates(
    experiment_ids: Sequence[str],
    tree: Filter | None,
    orders: Sequence[Order],
    facts: Facts,
    limit: int,
    after: Sequence[int | float | str] | None,
) -> CandidateQuery | None:
    """The candidates for a page of `limit` runs behind the sort values `after`; None where this would not help."""
    if limit > MAX_PAGE + 1 or facts.run_rows < MIN_RUN_ROWS:
        return None
    first = orders[0] if orders else None
    sieves = sum(not _is_about(part, first) for part in conjuncts(tree))
    if sieves > 1:
        return None
    count = max(_COUNT, _PER_ROW * limit * (1 + sieves))
    parameters = Parameters()
    if first is None or first.field.identity == ("attribute", "start_time"):
        ascending = first is not None and first.ascending
        conditions = [f"start.experiment_id IN {parameters.add(list(experiment_ids))}"]
        if after is not None:
            conditions.append(f"start.started_at {'>=' if ascending else '<='} {parameters.add(_number(after[0]))}")
        sql = (
            "SELECT run_id, 0 AS class, start.started_at AS value FROM run_facts "
            f"WHERE {' AND '.join(conditions)} ORDER BY value {'ASC' if ascending else 'DESC'} LIMIT {count}"
        )
        return CandidateQuery(sql, parameters.values, count, ascending, False, True)
    if first.field.entity != "metric":
        return None
    conditions = []
    required = False
    for part in conjuncts(tree):
        if isinstance(part, Comparison) and _is_about(part, first):
            required = True
            if part.operator != "IS NOT NULL":
                conditions.append(compare_number("if(class = 1, nan, value)", part, parameters))
    if after is not None:
        if after[0] != 0:
            return None
        sign = ">=" if first.ascending else "<="
        conditions.append(f"(class = 1 OR value {sign} {parameters.add(_number(after[1]))})")
    sql = (
        "SELECT run_id, last.is_nan AS class, last.value AS value FROM rollup_by_key "
        f"PREWHERE key = {parameters.add(first.field.key)} WHERE {' AND '.join(conditions) or '1'} "
        f"ORDER BY class, value {'ASC' if first.ascending else 'DESC'} LIMIT {count}"
    )
    return CandidateQuery(sql, parameters.values, count, first.ascending, True, required)


def _is_about(part: Filter, order: Order | None) -> bool:
    """Whether a condition asks something of what the page is ordered by."""
    if order is None or not isinstance(part, Comparison):
        return False
    return part.field.identity == order.field.identity and part.operator != "IS NULL"


def _number(value: int | float | str) -> int | float:
    assert not isinstance(value, str)  # the token was decoded by the kinds of the sort columns
    return value
