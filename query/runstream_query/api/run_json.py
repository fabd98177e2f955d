"""Many runs as MLflow's JSON, written by the store: a page of thousands never becomes Python objects.

The store answers with lines of `number of the run, kind, JSON`; here they are only put in order and together. Few runs
are cheaper to read as rows (`run_rows`): planning these expressions costs more than writing a few answers in Python.
Both give the same messages (tested).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from runstream_query.facts import Facts
from runstream_query.records import BULK_CHARS, BULK_RUNS, id_chunks
from runstream_query.run_records import INFO, NOT_PURGED

from .artifact_root import PROXY_SCHEME, ArtifactRoot
from .state import Reading
from .validation import MAX_DOUBLE

_AT_ONCE: Final = 2
"""Statements of one page: the store reads with few threads where a table is small, and JSON is written by one."""

_SETTINGS: Final = {"output_format_json_escape_forward_slashes": "0"}

_IDS: Final = "WITH {ids:Array(String)} AS ids\n"
_LINES: Final = "SELECT toUInt32(transform(toString(run_id), ids, arrayEnumerate(ids), toUInt32(0))), "
_JOINED: Final = "arrayStringConcat(arraySort(groupArray({json})), ',') AS json\nFROM ({rows})\nGROUP BY run_id"

_METRIC: Final = (
    """concat('{"key":', toJSONString(key), ',"value":', multiIf(last.is_nan = 1, '"NaN"', """
    f"last.value = inf, '{MAX_DOUBLE!r}', last.value = -inf, '-{MAX_DOUBLE!r}', toString(last.value)), "
    """',"timestamp":', toString(toUnixTimestamp64Milli(last.timestamp)), ',"step":', toString(last.step), '}')"""
)
_PAIR: Final = """concat('{"key":', toJSONString(key), ',"value":', toJSONString({value}), '}')"""
_INPUT: Final = """concat(
    '{"dataset":{"name":', toJSONString(name), ',"digest":', toJSONString(digest), ',"source_type":',
    toJSONString(latest.source_type), ',"source":', toJSONString(latest.source),
    if(latest.schema != '', concat(',"schema":', toJSONString(latest.schema)), ''),
    if(latest.profile != '', concat(',"profile":', toJSONString(latest.profile)), ''), '}',
    if(notEmpty(tags), concat(',"tags":[', arrayStringConcat(arrayMap(
        (k, v) -> concat('{"key":', toJSONString(k), ',"value":', toJSONString(v), '}'), mapKeys(tags), mapValues(tags)
    ), ','), ']'), ''), '}')"""
_TAGS: Final = """mapSort(if(latest.context = '', latest.tags,
    mapUpdate(map('mlflow.data.context', latest.context), latest.tags))) AS tags"""

_FACTS: Final = {
    "metrics": (_METRIC, "SELECT run_id, key, last FROM rollup FINAL PREWHERE run_id IN ids"),
    "params": (
        _PAIR.replace("{value}", "first.value"),
        "SELECT run_id, key, first FROM param_facts FINAL PREWHERE run_id IN ids",
    ),
    "tags": (
        _PAIR.replace("{value}", "latest.value"),
        "SELECT run_id, key, latest FROM (SELECT * FROM run_tag_facts FINAL PREWHERE run_id IN ids) "
        "WHERE latest.deleted = 0",
    ),
}
_INPUTS: Final = (
    "SELECT toUInt32(transform(toString(run_id), ids, arrayEnumerate(ids), toUInt32(0))), "
    "arrayStringConcat(arrayMap(item -> item.3, arraySort(groupArray((latest.time_ms, name, "
    f"{_INPUT})))), ',')\nFROM (SELECT run_id, name, digest, latest, {_TAGS} FROM "
    "(SELECT run_id, name, digest, latest FROM input_facts FINAL PREWHERE run_id IN ids))\nGROUP BY run_id"
)
_MODELS: Final = """SELECT toUInt32(transform(toString(run_id), ids, arrayEnumerate(ids), toUInt32(0))),
    arrayStringConcat(arrayMap(item -> item.3, arraySort(groupArray((logged_at, model_id, {json})))), ',')
FROM (SELECT * FROM model_links FINAL PREWHERE run_id IN ids) WHERE direction = '{direction}'
GROUP BY run_id"""
_MODEL_LISTS: Final = {
    "model_inputs": ("input", """concat('{"model_id":', toJSONString(model_id), '}')"""),
    "model_outputs": ("output", """concat('{"model_id":', toJSONString(model_id), ',"step":', toString(step), '}')"""),
}


def run_json(reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str], facts: Facts) -> list[bytes]:
    """The JSON of the runs of `ids` that exist, in that order. Blocks."""
    found: list[bytes] = []
    for chunk in id_chunks(ids, BULK_RUNS, BULK_CHARS):
        found += _Page(reading, chunk).messages(artifacts, facts)
    return found


class _Page:
    """One statement's worth of runs."""

    def __init__(self, reading: Reading, ids: list[str]) -> None:
        self._reading = reading
        self._parameters = {"ids": ids}
        self._count = len(ids)

    def messages(self, artifacts: ArtifactRoot, facts: Facts) -> list[bytes]:
        wanted: dict[str, tuple[str, dict[str, object]]] = {"infos": _info(artifacts, facts)}
        for name, (json, rows) in _FACTS.items():
            wanted[name] = _LINES + _JOINED.replace("{json}", json).replace("{rows}", rows), {}
        if facts.any_inputs:
            wanted["dataset_inputs"] = _INPUTS, {}
        if facts.any_models:
            for name, (direction, json) in _MODEL_LISTS.items():
                wanted[name] = _MODELS.replace("{direction}", direction).replace("{json}", json), {}
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="runstream-page") as executor:
            found = dict(zip(wanted, executor.map(lambda each: self._lines(*each), wanted.values()), strict=True))
        nothing = [b""] * self._count
        data = {name: found[name] for name in _FACTS}
        inputs = {name: found.get(name, nothing) for name in ("dataset_inputs", "model_inputs")}
        outputs = {"model_outputs": found.get("model_outputs", nothing)}
        return [
            b'{"info":%b,"data":{%b},"inputs":{%b},"outputs":{%b}}'
            % (
                info,
                _lists(data, place),
                _lists(inputs, place),
                _lists(outputs, place),
            )
            for place, info in enumerate(found["infos"])
            if info
        ]

    def _lines(self, sql: str, parameters: dict[str, object]) -> list[bytes]:
        """The JSON of each run, in the order of the ids; empty where there is none."""
        found = [b""] * self._count
        answer = self._reading.raw(_IDS + sql, "TSVRaw", {**self._parameters, **parameters}, _SETTINGS)
        for line in answer.split(b"\n"):
            number, _, json = line.partition(b"\t")
            if number:
                found[int(number) - 1] = json
        return found


def _lists(lists: dict[str, list[bytes]], place: int) -> bytes:
    return b",".join(b'"%b":[%b]' % (name.encode(), items[place]) for name, items in lists.items() if items[place])


def _info(artifacts: ArtifactRoot, facts: Facts) -> tuple[str, dict[str, object]]:
    """The statement for RunInfo, and its parameters."""
    parameters: dict[str, object] = {"root": facts.artifact_root}
    shown = "full_uri"
    if artifacts.served:
        cases = ""
        for number, prefix in enumerate(artifacts.prefixes()):
            parameters[f"prefix{number}"] = f"{prefix}/"
            place = f"{{prefix{number}:String}}"
            below = f"substring(full_uri, {len(prefix.encode()) + 2})"
            cases += f"startsWith(full_uri, {place}), concat('{PROXY_SCHEME}', {below}), "
        shown = f"multiIf({cases}full_uri)"
    stage = "lifecycle.stage"
    conditions = ["start.inverse_version > 0"]
    if facts.experiments:
        parameters["deleted"] = list(facts.experiments)
        parameters["stages"] = [stage for stage, _ in facts.experiments.values()]
        parameters["versions"] = [str(version) for _, version in facts.experiments.values()]
        place = "indexOf({deleted:Array(String)}, start.experiment_id)"
        version = f"toUInt128OrZero({{versions:Array(String)}}[{place}])"
        stage = f"if({version} > lifecycle.version, {{stages:Array(String)}}[{place}], lifecycle.stage)"
    if facts.purged_experiments:
        parameters["purged"] = list(facts.purged_experiments)
        parameters["purges"] = [str(version) for version in facts.purged_experiments.values()]
        place = "indexOf({purged:Array(String)}, start.experiment_id)"
        conditions.append(f"bitNot(start.inverse_version) > toUInt128OrZero({{purges:Array(String)}}[{place}])")
    rows = INFO.replace("{ids:Array(String)}", "ids").replace("{condition}", NOT_PURGED if facts.any_purged else "")
    sql = f"""{_LINES}concat(
    '{{"run_uuid":', id, ',"run_id":', id, ',"run_name":', toJSONString(if(name.version > 0, name.name, start.name)),
    ',"experiment_id":', toJSONString(start.experiment_id), ',"user_id":', toJSONString(start.user),
    ',"status":', toJSONString(state), ',"start_time":', toString(start.started_at),
    if(status.version > 0 AND status.ended_at > 0 AND state NOT IN ('RUNNING', 'SCHEDULED'),
        concat(',"end_time":', toString(status.ended_at)), ''),
    ',"artifact_uri":', toJSONString({shown}),
    ',"lifecycle_stage":"', if({stage} = 'deleted', 'deleted', 'active'), '"}}')
FROM
(
    SELECT *, toJSONString(toString(run_id)) AS id, if(status.version > 0, status.status, 'RUNNING') AS state,
        if(position(start.artifact_uri, '://') > 0, start.artifact_uri,
            concat({{root:String}}, '/', start.artifact_uri)) AS full_uri
    FROM ({rows})
)
WHERE {" AND ".join(conditions)}"""
    return sql, parameters
