"""Metric histories: raw, exact and in order; or downsampled for charts, in the store.

Raw reads collapse points that a client sent twice (LIMIT 1 BY over the sorting key). Downsampling reads `points` as
they lie: a point that is there twice until a merge changes no extreme and no triangle, and a mean by next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from runstream.entities import Metric

from .errors import InvalidQuery
from .records import id_chunks
from .store import Parameter, Store

__all__ = ["Bucket", "Series", "buckets", "latest", "points", "raw"]

MAX_BUCKETS: Final = 10_000

_RAW: Final = """
SELECT step, toUnixTimestamp64Milli(timestamp) AS at, value
FROM
(
    SELECT step, timestamp, value, writer, seq FROM points
    PREWHERE run_id = {run:String} AND key = {key:String}
    WHERE run_id NOT IN (SELECT run_id FROM purged_runs){steps}
    ORDER BY run_id, key, step, timestamp, writer, seq
    LIMIT 1 BY step, timestamp, writer, seq
)
ORDER BY {order}"""

_BUCKETS: Final = """
WITH bounds AS
(
    SELECT run_id AS of_run, key AS of_key, toInt128(min(step)) AS first, toInt128(max(step)) AS last
    FROM points PREWHERE run_id IN {runs:Array(String)} AND key IN {keys:Array(String)}
    {where}
    GROUP BY run_id, key
)
SELECT
    toString(run_id), toString(key), bucket, count(), min(step), max(step),
    toUnixTimestamp64Milli(min(timestamp)), toUnixTimestamp64Milli(max(timestamp)),
    avgIf(value, NOT isNaN(value)), min(value), max(value), countIf(isNaN(value))
FROM
(
    SELECT run_id, key, step, timestamp, value,
        toInt64(intDiv((toInt128(step) - b.first) * {count:Int64}, b.last - b.first + 1)) AS bucket
    FROM points AS p INNER JOIN bounds AS b ON b.of_run = p.run_id AND b.of_key = p.key
    PREWHERE run_id IN {runs:Array(String)} AND key IN {keys:Array(String)}
    {where}
)
GROUP BY run_id, key, bucket
ORDER BY run_id, key, bucket"""

_LTTB: Final = """
SELECT toString(run_id), toString(key), largestTriangleThreeBuckets({count})(step, value)
FROM points
PREWHERE run_id IN {runs:Array(String)} AND key IN {keys:Array(String)}
{where}
GROUP BY run_id, key
ORDER BY run_id, key"""

_LATEST: Final = """
SELECT toString(run_id), toString(key), last.step, toUnixTimestamp64Milli(last.timestamp),
    if(last.is_nan = 1, nan, last.value), min, max
FROM (SELECT run_id, key, last, min, max FROM rollup FINAL PREWHERE run_id IN {runs:Array(String)}{keys})
WHERE run_id NOT IN (SELECT run_id FROM purged_runs)
ORDER BY run_id, key"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Points of one stretch of steps, drawn as one."""

    first_step: int
    last_step: int
    first_timestamp: int
    """UTC milliseconds, as `last_timestamp`."""
    last_timestamp: int
    count: int
    """Points, those without a number (NaN) included."""
    mean: float
    """Of the points that are numbers; NaN where there is none, as `min` and `max`."""
    min: float
    max: float
    nan_count: int


@dataclass(frozen=True, slots=True)
class Series:
    """The newest point of one metric of one run, and its extremes."""

    run_id: str
    key: str
    step: int
    timestamp: int
    """UTC milliseconds."""
    value: float
    min: float
    """Of the points that are numbers; NaN where there is none, as `max`."""
    max: float


def raw(
    store: Store,
    run_id: str,
    key: str,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
    order: Literal["step", "time"] = "step",
) -> list[Metric]:
    """Every point of one metric, each once, in the order of (step, time) or (time, step), as it was logged.

    Args:
        first_step: leave out smaller steps; None takes all, as for `last_step`.
    """
    steps, parameters = _step_range(first_step, last_step)
    by = {"step": "step, at, value", "time": "at, step, value"}
    if order not in by:
        raise InvalidQuery(f"order is {order!r}: expected 'step' or 'time'")
    sql = _RAW.replace("{steps}", steps).replace("{order}", by[order])
    rows = store.rows(sql, {"run": _text(run_id), "key": _text(key), **parameters})
    return [Metric(key, value, int(at), int(step)) for step, at, value in rows]


def buckets(
    store: Store,
    run_ids: Sequence[str],
    keys: Sequence[str],
    count: int,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
) -> dict[tuple[str, str], list[Bucket]]:
    """(run id, key) -> at most `count` buckets over equal stretches of steps, in order; empty ones are left out."""
    found: dict[tuple[str, str], list[Bucket]] = {}
    for row in _downsampled(_BUCKETS, store, run_ids, keys, count, first_step, last_step):
        run_id, key, _, n, low, high, begin, end, mean, smallest, largest, nans = row
        bucket = Bucket(int(low), int(high), int(begin), int(end), int(n), mean, smallest, largest, int(nans))
        found.setdefault((run_id, key), []).append(bucket)
    return found


def points(
    store: Store,
    run_ids: Sequence[str],
    keys: Sequence[str],
    count: int,
    *,
    first_step: int | None = None,
    last_step: int | None = None,
) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(run id, key) -> at most `count` pairs (step, value) that keep the curve's shape: largest triangle three buckets.

    Points that are no number are left out.
    """
    rows = _downsampled(_LTTB, store, run_ids, keys, count, first_step, last_step)
    return {(run_id, key): [(int(step), value) for step, value in pairs] for run_id, key, pairs in rows}


def latest(store: Store, run_ids: Sequence[str], keys: Sequence[str] | None = None) -> list[Series]:
    """Newest point and extremes of each metric, by run id and key; of all keys where `keys` is None."""
    sql = _LATEST.replace("{keys}", "" if keys is None else " AND key IN {keys:Array(String)}")
    found: list[Series] = []
    for chunk in id_chunks(_texts(run_ids)):
        parameters: dict[str, Parameter] = {"runs": chunk}
        if keys is not None:
            parameters["keys"] = _texts(keys)
        for run_id, key, step, at, value, smallest, largest in store.rows(sql, parameters):
            found.append(Series(run_id, key, int(step), int(at), value, smallest, largest))
    return found


def _downsampled(
    template: str,
    store: Store,
    run_ids: Sequence[str],
    keys: Sequence[str],
    count: int,
    first_step: int | None,
    last_step: int | None,
) -> list[tuple[Any, ...]]:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_BUCKETS:
        raise InvalidQuery(f"{count!r} buckets: expected a whole number from 1 to {MAX_BUCKETS}")
    steps, parameters = _step_range(first_step, last_step)
    where = f"WHERE run_id NOT IN (SELECT run_id FROM purged_runs){steps}"
    # The parameter of the aggregate function must be a literal; a checked integer is one.
    sql = template.replace("{where}", where).replace("{count}", str(count))
    rows: list[tuple[Any, ...]] = []
    for chunk in id_chunks(_texts(run_ids)):
        rows += store.rows(sql, {"runs": chunk, "keys": _texts(keys), "count": count, **parameters})
    return rows


def _step_range(first: int | None, last: int | None) -> tuple[str, dict[str, Parameter]]:
    condition = ""
    parameters: dict[str, Parameter] = {}
    for name, sign, value in (("first", ">=", first), ("last", "<=", last)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63:
            raise InvalidQuery(f"{name}_step is {value!r}: expected a whole number of 64 bits")
        condition += f" AND step {sign} {{{name}_step:Int64}}"
        parameters[f"{name}_step"] = value
    return condition, parameters


def _text(value: str) -> str:
    if not isinstance(value, str):
        raise InvalidQuery(f"{value!r} is no text: expected a run id or a key")
    return value


def _texts(values: Sequence[str]) -> list[str]:
    if isinstance(values, str):
        raise InvalidQuery(f"{values!r} is one text: expected a list")
    return [_text(value) for value in values]
