"""Metric histories: raw, exact and in order; or downsampled for charts, in the store.

Raw reads collapse points that a client sent twice (LIMIT 1 BY over the sorting key). Downsampling reads `points` as
they lie: a point that is there twice until a merge changes no extreme and no triangle, and a mean by next to nothing.
Of one long series only the extremes of many small buckets, and its ends, go through the triangles (MinMaxLTTB).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

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

# Runs and keys are numbered first: `transform` of a LowCardinality column looks at each distinct value once, and
# grouping by small numbers is several times cheaper than by strings.
_RUN_NUMBER: Final = "toUInt32(transform(run_id, {runs:Array(String)}, {run_numbers:Array(Int64)}, toInt64(0)))"
_KEY_NUMBER: Final = "toUInt32(transform(key, {keys:Array(String)}, {key_numbers:Array(Int64)}, toInt64(0)))"
_NUMBERED: Final = "{run_number} AS run_number, {key_number} AS key_number"
_FIRST: Final = "transform(run_id, {runs:Array(String)}, {firsts:Array(Int64)}, toInt64(0))"
_SPAN: Final = "transform(run_id, {runs:Array(String)}, {spans:Array(UInt64)}, toUInt64(0))"
_FROM: Final = """
FROM points
PREWHERE run_id IN {runs:Array(String)} AND key IN {keys:Array(String)}{steps}"""

_BOUNDS: Final = f"SELECT toString(run_id), min(step), max(step){_FROM}\nGROUP BY run_id"

# One series lies in the order of its steps: its ends are two looks, not a pass over millions of rows (10 ms, not 95).
_ENDS: Final = f"""
(SELECT toString(run_id) AS run, step{_FROM}
ORDER BY run_id, key, step LIMIT 1)
UNION ALL
(SELECT toString(run_id) AS run, step{_FROM}
ORDER BY run_id DESC, key DESC, step DESC LIMIT 1)"""

_BUCKETS: Final = f"""
SELECT
    {{numbers}}, bucket, count(), min(step), max(step),
    {{times}},
    avgIf(value, NOT isNaN(value)), min(value), max(value), countIf(isNaN(value))
FROM
(
    SELECT step, timestamp, value, {{numbered}}{{bucket}} AS bucket
    {_FROM}
)
GROUP BY {{groups}}bucket
ORDER BY run_number, key_number, bucket"""

_TIMES: Final = "toUnixTimestamp64Milli(min(timestamp)), toUnixTimestamp64Milli(max(timestamp))"

_BUCKET: Final = """
        toUInt32(intDiv(
            (to{integer}(step) - {first})
                * {count},
            to{integer}({span}) + 1
        ))"""
_WIDE_BUCKET: Final = "toUInt16(intDiv(step - {first}, {width}))"
"""For one series with many steps a bucket: a whole number of steps wide, and a third cheaper."""
_WIDE_STEPS: Final = 64
"""Rounding the width up to whole steps then takes away at most one bucket in 64."""

_LTTB: Final = f"""
SELECT run_number, key_number, largestTriangleThreeBuckets({{count}})(step, value)
FROM (SELECT step, value, {_NUMBERED}{_FROM})
GROUP BY run_number, key_number
ORDER BY run_number, key_number"""

# Triangles cost three times what the extremes of buckets cost: 1.4 against 0.55 CPU-seconds for 10 million points.
_LAST_AND_FIRST: Final = f"""
(SELECT step, value{_FROM} AND NOT isNaN(value)
ORDER BY run_id, key, step LIMIT 1)
UNION ALL
(SELECT step, value{_FROM} AND NOT isNaN(value)
ORDER BY run_id DESC, key DESC, step DESC LIMIT 1)"""
_WIDE_LTTB: Final = f"""
SELECT toUInt32(0), toUInt32(0), largestTriangleThreeBuckets({{count}})(point.1, point.2)
FROM
(
    SELECT DISTINCT point FROM
    (
        SELECT arrayJoin([(argMin(step, value), min(value)), (argMax(step, value), max(value))]) AS point
        FROM (SELECT step, value{_FROM} AND NOT isNaN(value))
        GROUP BY {_WIDE_BUCKET}
        UNION ALL
        SELECT arrayJoin([{{ends}}]) AS point
    )
)"""
_EXTREME_BUCKETS: Final = 4
"""Buckets for each point that is asked for; each keeps its smallest and largest point."""

_PURGED: Final = "SELECT run_id FROM purged_runs WHERE run_id IN {runs:Array(String)}"

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
    first_timestamp: int | None
    """UTC milliseconds, as `last_timestamp`; None where times were not asked for."""
    last_timestamp: int | None
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
    timestamps: bool = False,
) -> dict[tuple[str, str], list[Bucket]]:
    """(run id, key) -> at most `count` buckets, in order; empty ones are left out.

    The buckets of a run are equal stretches between the smallest and the largest step of these keys of it.

    Args:
        timestamps: say when each bucket begins and ends; reading the times doubles what a long series costs.
    """
    found: dict[tuple[str, str], list[Bucket]] = {}
    for series in _series(store, run_ids, keys, count, first_step, last_step):
        bounds = _bounds(store, series)
        if not bounds:
            continue
        runs = [run for run in series.runs if run in bounds]
        series = replace(series, runs=runs)
        spans = [bounds[run][1] - bounds[run][0] for run in runs]
        # Exact in 64 bits unless the product of a step and the count may leave them.
        integer = "Int64" if max(spans) * count < 1 << 62 and max(map(_extent, bounds.values())) < 1 << 62 else "Int128"
        bucket = _BUCKET.replace("{integer}", integer)
        if series.single and integer == "Int64" and spans[0] >= _WIDE_STEPS * count:
            bucket = _WIDE_BUCKET.replace("{width}", str(spans[0] // count + 1))
        times = _TIMES if timestamps else "NULL, NULL"
        sql = _BUCKETS
        for name, single, several in (
            ("numbers", "toUInt32(0) AS run_number, toUInt32(0) AS key_number", "run_number, key_number"),
            ("numbered", "", f"{_NUMBERED}, "),
            ("groups", "", "run_number, key_number, "),
        ):
            sql = sql.replace(f"{{{name}}}", single if series.single else several)
        sql = series.sql(sql.replace("{bucket}", bucket).replace("{times}", times))
        parameters = {
            **series.parameters,
            **_numbered(runs, series.keys),
            "firsts": [bounds[run][0] for run in runs],
            "spans": spans,
        }
        for row in store.rows(sql, parameters):
            run, key, _, n, low, high, begin, end, mean, smallest, largest, nans = row
            found.setdefault((runs[run], series.keys[key]), []).append(
                Bucket(int(low), int(high), begin, end, int(n), mean, smallest, largest, int(nans))
            )
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

    Points that are no number are left out. Of one series over many steps, only the smallest and the largest point of
    four times `count` stretches, and both ends, are considered.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for series in _series(store, run_ids, keys, count, first_step, last_step):
        parameters = {**series.parameters, **_numbered(series.runs, series.keys)}
        sql = series.sql(_LTTB)
        if series.single:
            ends = [(int(step), value) for step, value in store.rows(series.sql(_LAST_AND_FIRST), parameters)]
            if not ends:
                continue
            low, high = min(ends)[0], max(ends)[0]
            if high - low >= _WIDE_STEPS * _EXTREME_BUCKETS * count and max(abs(low), abs(high)) < 1 << 62:
                width = (high - low) // (_EXTREME_BUCKETS * count) + 1
                points = ", ".join(f"(toInt64({step}), toFloat64('{value!r}'))" for step, value in ends)
                sql = series.sql(_WIDE_LTTB.replace("{width}", str(width)).replace("{ends}", points))
                parameters["firsts"] = [low]
        for run, key, pairs in store.rows(sql, parameters):
            found[series.runs[run], series.keys[key]] = [(int(step), value) for step, value in pairs]
    return found


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


@dataclass(frozen=True, slots=True)
class _Series:
    """What one statement downsamples."""

    runs: list[str]
    keys: list[str]
    count: int
    steps: str
    """Condition on steps."""
    parameters: dict[str, Parameter]

    @property
    def single(self) -> bool:
        return len(self.runs) == len(self.keys) == 1

    def sql(self, template: str) -> str:
        # The parameter of the aggregate function must be a literal; a checked integer is one.
        found = template.replace("{steps}", self.steps).replace("{count}", str(self.count))
        # One series needs no numbers: its bounds are constants.
        one_run, one_key = len(self.runs) == 1, len(self.keys) == 1
        for name, expression in (
            ("run_number", "toUInt32(0)" if one_run else _RUN_NUMBER),
            ("key_number", "toUInt32(0)" if one_key else _KEY_NUMBER),
            ("first", "{firsts:Array(Int64)}[1]" if one_run else _FIRST),
            ("span", "{spans:Array(UInt64)}[1]" if one_run else _SPAN),
        ):
            found = found.replace(f"{{{name}}}", expression)
        return found


def _bounds(store: Store, series: _Series) -> dict[str, tuple[int, int]]:
    """run id -> smallest and largest step."""
    if not series.single:
        return {run: (int(low), int(high)) for run, low, high in store.rows(series.sql(_BOUNDS), series.parameters)}
    found: dict[str, tuple[int, int]] = {}
    for run, step in store.rows(series.sql(_ENDS), series.parameters):
        low, high = found.get(run, (step, step))
        found[run] = min(low, int(step)), max(high, int(step))
    return found


def _series(
    store: Store,
    run_ids: Sequence[str],
    keys: Sequence[str],
    count: int,
    first_step: int | None,
    last_step: int | None,
) -> Iterator[_Series]:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_BUCKETS:
        raise InvalidQuery(f"{count!r} buckets: expected a whole number from 1 to {MAX_BUCKETS}")
    steps, parameters = _step_range(first_step, last_step)
    names = list(dict.fromkeys(_texts(keys)))
    for chunk in id_chunks(list(dict.fromkeys(_texts(run_ids)))) if names else ():
        # Once here instead of once for each of millions of points.
        purged = {row[0] for row in store.rows(_PURGED, {"runs": chunk})}
        runs = [run for run in chunk if run not in purged]
        if runs:
            yield _Series(runs, names, count, steps, {"runs": runs, "keys": names, **parameters})


def _numbered(runs: list[str], keys: list[str]) -> dict[str, Parameter]:
    return {
        "runs": runs,
        "keys": keys,
        "run_numbers": list(range(len(runs))),
        "key_numbers": list(range(len(keys))),
    }


def _extent(bounds: tuple[int, int]) -> int:
    return max(abs(bounds[0]), abs(bounds[1]))


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
