"""Rows of the logged-model views as MLflow's messages, and their search. Functions block; called in worker threads.

The search language is MLflow's for logged models: comparisons joined by AND over attributes, metrics, params and tags.
Parsing is done here with one regular expression a comparison; every value is bound as a parameter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runstream_schemas.names import CONTROL

from .artifact_root import ArtifactRoot
from .errors import ApiError, invalid
from .search_text import page_offset, page_token
from .state import Reading

_COLUMNS: Final = """m.model_id, m.experiment_id, m.name, m.model_type, m.status, m.lifecycle_stage, m.source_run_id,
    m.artifact_uri, toUnixTimestamp64Milli(m.created_at) AS created_ms,
    toUnixTimestamp64Milli(m.updated_at) AS updated_ms"""
_ATTRIBUTES: Final = {
    "name": ("m.name", "String"),
    "model_id": ("m.model_id", "String"),
    "model_type": ("m.model_type", "String"),
    "status": ("m.status", "String"),
    "source_run_id": ("m.source_run_id", "String"),
    "creation_timestamp": ("created_ms", "Int64"),
    "creation_time": ("created_ms", "Int64"),
    "creation_timestamp_ms": ("created_ms", "Int64"),
    "last_updated_timestamp": ("updated_ms", "Int64"),
    "last_updated_timestamp_ms": ("updated_ms", "Int64"),
}
_NUMERIC_OPERATORS: Final = ("<", "<=", ">", ">=", "=", "!=")
_TEXT_OPERATORS: Final = ("=", "!=", "LIKE", "ILIKE", "IN", "NOT IN")
_COMPARISON = re.compile(
    r"""\s*(?P<entity>(?:[a-z]+\.)?(?:`[^`]+`|"[^"]+"|[\w/\-. ]*?[\w/\-]))\s*
        (?P<operator><=|>=|!=|<>|<|>|=|NOT\s+IN\b|IN\b|LIKE\b|ILIKE\b)\s*
        (?P<value>'(?:[^'])*'|"(?:[^"])*"|\((?:\s*(?:'[^']*'|"[^"]*")\s*,?)+\)|[^\s'"()]+)\s*""",
    re.VERBOSE | re.IGNORECASE,
)
_AND = re.compile(r"AND\b", re.IGNORECASE)
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")


@dataclass(slots=True)
class ModelRow:
    """One logged model without its metrics."""

    model_id: str
    experiment_id: str
    name: str
    model_type: str
    status: str
    lifecycle_stage: str
    source_run_id: str
    artifact_uri: str
    """As clients are told."""
    created_at: int
    updated_at: int
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def message(self, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """MLflow's LoggedModel."""
        info: dict[str, Any] = {
            "model_id": self.model_id,
            "experiment_id": self.experiment_id,
            "name": self.name,
            "creation_timestamp_ms": self.created_at,
            "last_updated_timestamp_ms": self.updated_at,
            "artifact_uri": self.artifact_uri,
            "status": f"LOGGED_MODEL_{self.status}",
            "model_type": self.model_type,
            "source_run_id": self.source_run_id,
        }
        if self.tags:
            info["tags"] = [{"key": key, "value": value} for key, value in self.tags.items()]
        data: dict[str, Any] = {}
        if self.params:
            data["params"] = [{"key": key, "value": value} for key, value in self.params.items()]
        if metrics:
            data["metrics"] = list(metrics)
        return {"info": info, "data": data}


def _filled(reading: Reading, artifacts: ArtifactRoot, rows: Sequence[Sequence[Any]]) -> list[ModelRow]:
    found = [
        ModelRow(model, experiment, name, kind, status, stage, run, artifacts.present(uri), int(created), int(updated))
        for model, experiment, name, kind, status, stage, run, uri, created, updated in rows
    ]
    by_id = {row.model_id: row for row in found}
    if by_id:
        for view in ("params", "tags"):
            sql = f"SELECT model_id, key, value FROM model_{view} WHERE model_id IN {{ids:Array(String)}} ORDER BY key"
            for model_id, key, value in reading.rows(sql, {"ids": list(by_id)}, ()):
                getattr(by_id[model_id], view)[key] = value
    return found


def model_rows(reading: Reading, artifacts: ArtifactRoot, ids: Sequence[str]) -> list[ModelRow]:
    """The models of `ids` that exist, deleted ones too."""
    sql = f"SELECT {_COLUMNS} FROM logged_models AS m WHERE m.model_id IN {{ids:Array(String)}}"
    return _filled(reading, artifacts, reading.rows(sql, {"ids": list(ids)}, (CONTROL,)))


def model_messages(reading: Reading, rows: Sequence[ModelRow]) -> list[dict[str, Any]]:
    """The models with the newest point of each metric, run and data set."""
    sql = """SELECT model_id, key, argMax(value, (step, timestamp)) AS value,
            toUnixTimestamp64Milli(argMax(timestamp, (step, timestamp))) AS time, max(step) AS last_step,
            run_id, dataset_name, dataset_digest
        FROM model_metrics WHERE model_id IN {ids:Array(String)}
        GROUP BY model_id, key, run_id, dataset_name, dataset_digest
        ORDER BY key, run_id, dataset_name, dataset_digest"""
    metrics: dict[str, list[dict[str, Any]]] = {}
    for model_id, key, value, time, step, run_id, name, digest in reading.rows(
        sql, {"ids": [row.model_id for row in rows]}, ()
    ):
        metric = {"key": key, "value": value, "timestamp": int(time), "step": int(step), "model_id": model_id}
        metric |= {"run_id": run_id} if run_id else {}
        metric |= {"dataset_name": name} if name else {}
        metric |= {"dataset_digest": digest} if digest else {}
        metrics.setdefault(model_id, []).append(metric)
    return [row.message(metrics.get(row.model_id, ())) for row in rows]


class _Query:
    """Conditions and order with their bound parameters."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.conditions: list[str] = []

    def bind(self, value: Any, kind: str) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f"{{{name}:{kind}}}"


def _text_condition(query: _Query, column: str, operator: str, value: str, values: Sequence[str] | None) -> str:
    if operator in ("IN", "NOT IN"):
        if values is None:
            raise invalid(f"Invalid value for {operator}: expected a list such as ('a', 'b').")
        return f"{column} {operator} {query.bind(list(values), 'Array(String)')}"
    if values is not None:
        raise invalid(f"Invalid comparison operator for a list: {operator!r}. Expected IN or NOT IN.")
    return f"{column} {operator} {query.bind(value, 'String')}"


def _condition(query: _Query, entity: str, operator: str, raw: str, datasets: Sequence[tuple[str, str]]) -> str:
    kind, dot, key = entity.partition(".")
    if not dot:
        kind, key = "attributes", entity
    key = key.strip().strip('`"')
    numeric = kind == "metrics"
    column = "value"
    if kind == "attributes":
        if key not in _ATTRIBUTES:
            raise invalid(f"Invalid attribute name: {key!r}. Expected one of {', '.join(_ATTRIBUTES)}.")
        column, column_type = _ATTRIBUTES[key]
        numeric = column_type == "Int64"
    elif kind not in ("metrics", "params", "tags"):
        raise invalid(f"Invalid entity type: {kind!r}. Expected one of ['attributes', 'metrics', 'params', 'tags'].")
    allowed = _NUMERIC_OPERATORS if numeric else _TEXT_OPERATORS
    if operator not in allowed:
        raise invalid(f"Invalid comparison operator for {entity}: {operator!r}. Expected one of {allowed}.")
    if numeric:
        try:
            condition = f"{column} {operator} {query.bind(float(raw), 'Float64')}"
        except ValueError:
            raise invalid(f"Invalid value for {entity}: {raw!r} is not a number.") from None
    else:
        listed = [a or b for a, b in _QUOTED.findall(raw)] if raw.startswith("(") else None
        condition = _text_condition(query, column, operator, raw.strip("'\""), listed)
    if kind == "attributes":
        return condition
    where = f"key = {query.bind(key, 'String')} AND {condition}"
    if kind == "metrics" and datasets:
        where += f" AND ({_dataset_condition(query, datasets)})"
    return f"m.model_id IN (SELECT model_id FROM model_{kind} WHERE {where})"


def _dataset_condition(query: _Query, datasets: Sequence[tuple[str, str]]) -> str:
    parts = []
    for name, digest in datasets:
        part = f"dataset_name = {query.bind(name, 'String')}"
        if digest:
            part += f" AND dataset_digest = {query.bind(digest, 'String')}"
        parts.append(f"({part})")
    return " OR ".join(parts)


def _not_a_list(text: str) -> ApiError:
    return invalid(
        f"Invalid filter string: {text!r}. Expected a list of comparisons separated by 'AND'"
        " (e.g. 'metrics.loss > 0.1 AND params.lr = 0.01')."
    )


def _add_filter(query: _Query, text: str, datasets: Sequence[tuple[str, str]]) -> bool:
    """Add the comparisons of `text`; whether one is about a metric."""
    position = 0
    about_metric = False
    while text[position:].strip():
        match = _COMPARISON.match(text, position)
        if match is None:
            raise _not_a_list(text)
        operator = re.sub(r"\s+", " ", match["operator"].upper()).replace("<>", "!=")
        query.conditions.append(_condition(query, match["entity"], operator, match["value"], datasets))
        about_metric |= match["entity"].startswith("metrics.")
        position = match.end()
        if not text[position:].strip():
            break
        joint = _AND.match(text, position)
        if joint is None or not text[joint.end() :].strip():
            raise _not_a_list(text)
        position = joint.end()
    return about_metric


def _order(query: _Query, order: Sequence[tuple[str, bool, str, str]]) -> str:
    terms = []
    names = set()
    for field_name, ascending, dataset_name, dataset_digest in order:
        direction = "ASC" if ascending else "DESC"
        if "." not in field_name:
            if field_name not in _ATTRIBUTES:
                raise invalid(f"Invalid order by field name: {field_name}")
            column = _ATTRIBUTES[field_name][0]
            names.add(column)
            terms.append(f"{column} {direction}")
            continue
        entity, _, key = field_name.partition(".")
        if entity != "metrics":
            raise invalid(f"Invalid order by field name: {field_name}. Only metrics are supported.")
        where = f"key = {query.bind(key.strip('`'), 'String')}"
        if dataset_name:
            where += f" AND ({_dataset_condition(query, [(dataset_name, dataset_digest)])})"
        alias = f"o{len(terms)}"
        query.parameters.setdefault("_joins", []).append(
            f"LEFT JOIN (SELECT model_id, argMax(value, (timestamp, step)) AS value FROM model_metrics"
            f" WHERE {where} GROUP BY model_id) AS {alias} ON {alias}.model_id = m.model_id"
        )
        terms.append(f"{alias}.model_id = '' ASC, {alias}.value {direction} NULLS LAST")
    if "created_ms" not in names:
        terms.append("created_ms DESC")
    if "m.model_id" not in names:
        terms.append("m.model_id ASC")
    return ", ".join(terms)


def search_models(
    reading: Reading,
    artifacts: ArtifactRoot,
    experiment_ids: Sequence[str],
    filter_string: str,
    datasets: Sequence[tuple[str, str]],
    order: Sequence[tuple[str, bool, str, str]],
    limit: int,
    token: str | None,
) -> tuple[list[ModelRow], str | None]:
    """One page of models that are not deleted, and the next page's token.

    Raises:
        ApiError: the filter, the order or the token does not fit.
    """
    query = _Query()
    about_metric = _add_filter(query, filter_string, datasets)
    if datasets and not about_metric:
        query.conditions.append(
            f"m.model_id IN (SELECT model_id FROM model_metrics WHERE {_dataset_condition(query, datasets)})"
        )
    ordering = _order(query, order)
    joins = " ".join(query.parameters.pop("_joins", []))
    mark = hashlib.blake2b(repr((list(experiment_ids), filter_string, list(order))).encode(), digest_size=6)
    offset = 0
    if token:
        head, _, tail = token.partition(".")
        if tail != mark.hexdigest():
            raise invalid("Invalid page token: it belongs to another search.")
        offset = page_offset(head)
    conditions = " AND ".join(
        ["m.lifecycle_stage != 'deleted'", "m.experiment_id IN {experiments:Array(String)}", *query.conditions]
    )
    sql = f"""SELECT {_COLUMNS} FROM logged_models AS m {joins} WHERE {conditions}
        ORDER BY {ordering} LIMIT {{limit:UInt64}} OFFSET {{offset:UInt64}}"""
    parameters = {
        **query.parameters,
        "experiments": list(experiment_ids),
        "limit": limit + 1,
        "offset": offset,
    }
    rows = _filled(reading, artifacts, reading.rows(sql, parameters))
    following = f"{page_token(offset + limit)}.{mark.hexdigest()}" if len(rows) > limit else None
    return rows[:limit], following
