"""Metrics: log one, log a batch (with params and tags), and read histories whole, by page, in bulk and sampled."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Final

from starlette.requests import Request
from starlette.responses import Response

from runstream.transport import Event
from runstream_schemas.identity import now_ms
from runstream_schemas.limits import MAX_TIME_MS

from .backend import Backend
from .errors import invalid
from .event import metric_batch
from .model_events import metric_events
from .routing import Endpoint
from .runs import apply_tags, commit, new_params, param_events
from .search_text import page_offset, page_token
from .state import Reading
from .validation import (
    MAX_DOUBLE,
    check_batch,
    check_metric,
    check_run_id,
    check_unique_params,
    clean_param,
    clean_tag,
    is_safe_name,
)
from .wire import (
    Double,
    Empty,
    Int32,
    Int64,
    JsonResponse,
    KeyValue,
    Message,
    check_content_type,
    json_fields,
    missing_value,
    pairs_of,
    parse,
    query_fields,
    read,
)

MAX_STEP: Final = 1 << 63
MAX_EXACT: Final = 1 << 53
"""Whole numbers up to here are doubles."""
_RUN_NAMES: Final = frozenset({"run_id", "run_uuid"})
"""A run's id and its former name, which counts only where the first is missing."""
MAX_BULK_RUNS: Final = 100
MAX_BULK_RESULTS: Final = 25_000
MAX_INTERVAL_RESULTS: Final = 2_500
MAX_HISTORY_RESULTS: Final = 10_000_000
"""Points of one answer without a page size; a longer history must be paged."""
_CANNOT_PAGE: Final = "mlflow-java-client/"
"""Asks for pages of 25,000 points and throws when there is a second one (2.17): it gets the whole history at once."""

_POINT: Final = (
    f"if(isInfinite(m.value), if(m.value > 0, {MAX_DOUBLE!r}, -{MAX_DOUBLE!r}), m.value) AS value, "
    "toUnixTimestamp64Milli(m.timestamp) AS timestamp, m.step AS step"
)


class LogMetric(Message):
    """runs/log-metric"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "key", "value", "timestamp")
    run_id: str | None = None
    key: str | None = None
    value: Double | None = None
    timestamp: Int64 | None = None
    step: Int64 | None = None
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class BatchMetric(Message):
    """One metric of a batch"""

    key: str | None = None
    value: Double | None = None
    timestamp: Int64 | None = None
    step: Int64 | None = None
    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class LogBatch(Message):
    """runs/log-batch"""

    required: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None = None
    metrics: list[BatchMetric] | None = None
    params: list[KeyValue] | None = None
    tags: list[KeyValue] | None = None


class GetMetricHistory(Message):
    """metrics/get-history"""

    required: ClassVar[tuple[str, ...]] = ("run_id", "metric_key")
    run_id: str | None = None
    metric_key: str | None = None
    page_token: str | None = None
    max_results: Int32 | None = None


class GetMetricHistoryBulkInterval(Message):
    """metrics/get-history-bulk-interval"""

    required: ClassVar[tuple[str, ...]] = ("run_ids", "metric_key")
    run_ids: list[str] | None = None
    metric_key: str | None = None
    start_step: Int64 | None = None
    end_step: Int64 | None = None
    max_results: Int32 | None = None


class GetMetricHistoryBulk(Message):
    """metrics/get-history-bulk, which MLflow's older UI calls"""

    run_id: list[str] | None = None
    metric_key: str | None = None
    max_results: Int32 | None = None


def _plain_metric(fields: dict[str, Any]) -> tuple[str, tuple[str, float, int, int]] | None:
    """Run id and point of a request as clients write it; None: it must be looked at field by field."""
    run_id = fields.get("run_id")
    if type(run_id) is not str or not run_id:
        return None
    points = _plain_points([{name: value for name, value in fields.items() if name not in _RUN_NAMES}])
    return None if points is None else (run_id, points[0])


async def _log_metric(backend: Backend, request: Request) -> Response:
    check_content_type(request)
    fields = json_fields(await request.body())
    plain = _plain_metric(fields)
    if plain is not None:
        run_id, point = plain
        await backend.active_run(run_id)
        await backend.write(metric_batch(run_id, [point], now_ms()))
        return Empty()
    message = parse(LogMetric, fields)
    run_id, key, value, timestamp = message.run_id or "", message.key, message.value, message.timestamp
    assert key is not None and value is not None and timestamp is not None  # required
    step = message.step or 0
    check_metric(key, value, timestamp, step)
    state = await backend.active_run(run_id)
    events = [metric_batch(run_id, [(key, value, timestamp, step)], now_ms())]
    if message.model_id:
        about = (
            message.model_id,
            key,
            value,
            timestamp,
            step,
            message.dataset_name or "",
            message.dataset_digest or "",
        )
        events += metric_events(backend, state, [about])
    await backend.write(*events)
    return Empty()


def _plain_points(metrics: object) -> list[tuple[str, float, int, int]] | None:
    """The points of a batch in which everything is as clients write it; None: it must be looked at field by field.

    The same checks in the same words take three times as long through models.
    """
    if type(metrics) is not list:
        return None
    points = []
    for metric in metrics:
        if type(metric) is not dict or len(metric) != 4:
            return None
        key, value = metric.get("key"), metric.get("value")
        timestamp, step = metric.get("timestamp"), metric.get("step")
        if type(value) is int and -MAX_EXACT <= value <= MAX_EXACT:
            value = float(value)
        if type(key) is not str or type(value) is not float or type(timestamp) is not int or type(step) is not int:
            return None
        if not is_safe_name(key) or not 0 <= timestamp < MAX_TIME_MS or not -MAX_STEP <= step < MAX_STEP:
            return None
        points.append((key, value, timestamp, step))
    return points


async def _log_batch(backend: Backend, request: Request) -> Response:
    check_content_type(request)
    fields = json_fields(await request.body())
    plain = _plain_points(fields.get("metrics"))
    if plain is not None:
        del fields["metrics"]
    message = parse(LogBatch, fields)
    run_id = message.run_id or ""
    metrics = message.metrics or []
    for index, metric in enumerate(metrics):
        if not metric.key:
            raise missing_value(f"metrics[{index}].key")
        if metric.value is None:
            raise missing_value(f"metrics[{index}].value")
        if metric.timestamp is None:
            raise missing_value(f"metrics[{index}].timestamp")
    params = pairs_of(message.params, "params")
    tags = pairs_of(message.tags, "tags")
    check_run_id(run_id)
    points = plain or []
    of_models = []
    for index, metric in enumerate(metrics):
        key, value, timestamp, step = metric.key or "", metric.value or 0.0, metric.timestamp or 0, metric.step or 0
        check_metric(key, value, timestamp, step, f"metrics[{index}]")
        points.append((key, value, timestamp, step))
        if metric.model_id:
            dataset = metric.dataset_name or "", metric.dataset_digest or ""
            of_models.append((metric.model_id, key, value, timestamp, step, *dataset))
    params = [clean_param(key, value, f"params[{index}]") for index, (key, value) in enumerate(params)]
    tags = [clean_tag(key, value, f"tags[{index}]") for index, (key, value) in enumerate(tags)]
    check_batch(len(points), len(params), len(tags))
    check_unique_params(params)
    state = await backend.active_run(run_id)
    events: list[Event] = []
    fresh = new_params(state, params)
    if fresh:
        state.params.update(fresh)
        events += param_events(backend, run_id, fresh)
    if points:
        events.append(metric_batch(run_id, points, now_ms()))
        events += metric_events(backend, state, of_models)
    if tags:
        events += apply_tags(backend, state, tags)
    if fresh or tags:
        await commit(backend, state, events)
    elif events:
        await backend.write(*events)
    return Empty()


def _array(rows: bytes) -> bytes:
    # A quote inside a JSON string is escaped, so this can only be the value of a NaN.
    return rows.replace(b'"value":"nan"', b'"value":"NaN"')


def _metrics_answer(rows: bytes) -> Response:
    array = _array(rows).strip()
    if array[1:-1].strip() == b"":
        return JsonResponse({})
    return Response(b'{"metrics":' + array + b"}", media_type="application/json")


_HISTORY: Final = f"""
SELECT concat('{{"key":', {{name:String}}, ',"value":', multiIf(isNaN(value), '"NaN"', value = inf, '{MAX_DOUBLE!r}',
    value = -inf, '-{MAX_DOUBLE!r}', toString(value)), ',"timestamp":', toString(toUnixTimestamp64Milli(timestamp)),
    ',"step":', toString(step), '}},')
FROM points PREWHERE run_id = {{run_id:String}} AND key = {{key:String}}"""
_HISTORY_ORDER: Final = """
ORDER BY timestamp, step, value LIMIT 1 BY step, timestamp, writer, seq
LIMIT {limit:UInt64} OFFSET {offset:UInt64}"""
"""Each point once, as FINAL gives it, at two thirds of the cost."""


def _history_answer(reading: Reading, run_id: str, key: str, offset: int, limit: int | None) -> bytes:
    """One page as JSON, written by the store line by line: 100,000 points never become Python objects."""
    facts = reading.facts()
    sql = _HISTORY + (" WHERE run_id NOT IN (SELECT run_id FROM purged_runs)" if facts.any_purged else "")
    parameters: dict[str, Any] = {"run_id": run_id, "key": key, "name": json.dumps(key), "offset": offset}
    parameters["limit"] = MAX_HISTORY_RESULTS if limit is None else limit + 1
    lines = reading.raw(sql + _HISTORY_ORDER, "TSVRaw", parameters, {})
    if not lines:
        return b"{}"
    token = b""
    if limit is not None and lines.count(b"\n") > limit:
        lines = lines[: lines.rindex(b"\n", 0, -1) + 1]
        token = b',"next_page_token":"%b"' % page_token(offset + limit).encode()
    return b"".join((b'{"metrics":[', memoryview(lines)[:-2], b"]", token, b"}"))


async def _history(backend: Backend, request: Request) -> Response:
    message = await read(GetMetricHistory, request)
    offset = page_offset(message.page_token)
    limit = message.max_results
    if limit is not None and limit <= 0:
        raise invalid(f"Invalid value {limit} for parameter 'max_results' supplied. It must be a positive integer.")
    if request.headers.get("user-agent", "").startswith(_CANNOT_PAGE):
        limit = None
    about = message.run_id or "", message.metric_key or "", offset, limit
    return Response(await backend.read(_history_answer, backend.reading, *about), media_type="application/json")


async def _bulk(backend: Backend, request: Request) -> Response:
    raw = query_fields(GetMetricHistoryBulk, request.scope["query_string"])
    run_ids = raw.get("run_id") or []
    if not run_ids:
        raise invalid("GetMetricHistoryBulk request must specify at least one run_id.")
    if len(run_ids) > MAX_BULK_RUNS:
        raise invalid(
            f"GetMetricHistoryBulk request cannot specify more than {MAX_BULK_RUNS} run_ids."
            f" Received {len(run_ids)} run_ids."
        )
    if raw.get("metric_key") is None:
        raise invalid("GetMetricHistoryBulk request must specify a metric_key.")
    message = await read(GetMetricHistoryBulk, request)
    limit = MAX_BULK_RESULTS if message.max_results is None else message.max_results
    if limit < 1:
        raise invalid(f"Invalid value {limit} for parameter 'max_results' supplied. It must be a positive integer.")
    sql = f"""SELECT m.key AS key, {_POINT}, m.run_id AS run_id FROM metrics AS m
        WHERE m.run_id IN {{ids:Array(String)}} AND m.key = {{key:String}}
        ORDER BY m.run_id, m.timestamp, m.step, m.value LIMIT {{limit:UInt64}}"""
    parameters = {"ids": run_ids, "key": message.metric_key, "limit": min(limit, MAX_BULK_RESULTS)}
    rows = await backend.read(backend.reading.json_rows, sql, parameters)
    return Response(b'{"metrics":' + (_array(rows).strip() or b"[]") + b"}", media_type="application/json")


async def _interval(backend: Backend, request: Request) -> Response:
    message = await read(GetMetricHistoryBulkInterval, request)
    run_ids = message.run_ids or []
    if not run_ids:
        raise missing_value("run_ids")
    if len(run_ids) > MAX_BULK_RUNS:
        raise invalid(
            f"GetMetricHistoryBulkInterval request must specify at most {MAX_BULK_RUNS} run_ids."
            f" Received {len(run_ids)} run_ids. See the API docs for more information about request parameters."
        )
    limit = MAX_INTERVAL_RESULTS if message.max_results is None else message.max_results
    if not 1 <= limit <= MAX_INTERVAL_RESULTS:
        raise invalid(
            f"max_results must be between 1 and {MAX_INTERVAL_RESULTS}."
            " See the API docs for more information about request parameters."
        )
    first, last = message.start_step, message.end_step
    if (first is None) != (last is None):
        raise invalid("If either start step or end step are specified, both must be specified.")
    if first is not None and last is not None and first > last:
        raise invalid(f"end_step must be greater than start_step. Found start_step={first} and end_step={last}.")
    parameters: dict[str, Any] = {"ids": run_ids, "key": message.metric_key or "", "limit": limit}
    steps = ""
    if first is not None:
        steps = "AND m.step BETWEEN {first:Int64} AND {last:Int64}"
        parameters |= {"first": first, "last": last}
    # `limit` buckets of nearly equal size over the ordered points of a run; the first point of each is kept, in the
    # last bucket the last point instead. Bucket sizes differ by at most one, larger ones first.
    sql = f"""WITH {{limit:Int64}} AS k SELECT key, value, timestamp, step, run_id FROM
        (
            SELECT m.key AS key, {_POINT}, m.run_id AS run_id,
                toInt64(row_number() OVER
                    (PARTITION BY m.run_id ORDER BY m.step, m.timestamp, m.value, isNaN(m.value))) - 1 AS i,
                toInt64(count() OVER (PARTITION BY m.run_id)) AS n
            FROM metrics AS m WHERE m.run_id IN {{ids:Array(String)}} AND m.key = {{key:String}} {steps}
        )
        WHERE n <= k OR i = n - 1 OR (i != n - intDiv(n, k) AND if(
            i < (n % k) * (intDiv(n, k) + 1),
            i % (intDiv(n, k) + 1) = 0,
            (i - (n % k) * (intDiv(n, k) + 1)) % greatest(intDiv(n, k), 1) = 0))
        ORDER BY indexOf({{ids:Array(String)}}, run_id), i"""
    return _metrics_answer(await backend.read(backend.reading.json_rows, sql, parameters))


ENDPOINTS = (
    Endpoint("POST", "/mlflow/runs/log-metric", _log_metric, LogMetric),
    Endpoint("POST", "/mlflow/runs/log-batch", _log_batch, LogBatch),
    Endpoint("GET", "/mlflow/metrics/get-history", _history, GetMetricHistory),
    Endpoint("GET", "/mlflow/metrics/get-history-bulk", _bulk, GetMetricHistoryBulk),
    Endpoint(
        "GET",
        "/mlflow/metrics/get-history-bulk-interval",
        _interval,
        GetMetricHistoryBulkInterval,
        versions=("2.0", "2.11"),
    ),
)
