"""A search for runs -> one SELECT of run ids. Reads the private tables: the views would merge every run's every fact.

The selection touches only what filter and order need: the start facts of the chosen experiments, and one subquery for
each metric, param or tag key, joined by run id. The page's runs are fetched afterwards by id (`records`). For a short
page of a large store the selection is first narrowed to candidates (`candidates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runstream.entities import ViewType
from runstream_schemas.limits import LOST_AFTER_SECONDS

from ..facts import Facts
from ..store import Parameter
from .parse import RUNS, Order
from .sql import Column, Parameters, Sort, compare_number, compare_text, seek
from .tree import And, Comparison, Field, Filter, Not, Or

__all__ = ["RunQuery", "compile_runs", "conjuncts"]

LOST: Final = "LOST"

# FINAL reads whole tuples: a subcolumn comes out of the first part only. PREWHERE before the merge, because the key is
# part of the sorting key: 62 ms instead of 490 for one key of 2 million series; metrics have a table ordered by key.
_KEYED: Final = {
    "metric": "SELECT run_id, 1 AS present, last.value AS value, last.is_nan AS is_nan "
    "FROM (SELECT run_id, last FROM rollup_by_key FINAL PREWHERE key = {key}{among})",
    "param": "SELECT run_id, 1 AS present, first.value AS value "
    "FROM (SELECT run_id, first FROM param_facts FINAL PREWHERE key = {key}{among})",
    "tag": "SELECT run_id, 1 AS present, latest.value AS value "
    "FROM (SELECT run_id, latest FROM run_tag_facts FINAL PREWHERE key = {key}{among}) WHERE latest.deleted = 0",
}
_DATASETS: Final = (
    "SELECT run_id FROM (SELECT run_id, name, digest, latest.context AS context "
    "FROM (SELECT run_id, name, digest, latest FROM input_facts FINAL))"
)

_START: Final = {
    "experiment_id": "argMax(start.experiment_id, start.inverse_version)",
    "user_id": "argMax(start.user, start.inverse_version)",
    "source_name": "argMax(start.source_name, start.inverse_version)",
    "source_type": "argMax(start.source_type, start.inverse_version)",
    "source_version": "argMax(start.source_version, start.inverse_version)",
    "parent_run_id": "argMax(start.parent_run_id, start.inverse_version)",
    "relative_uri": "argMax(start.artifact_uri, start.inverse_version)",
    "start_time": "argMax(start.started_at, start.inverse_version)",
}
"""What a run's start says: these read the rows of its start alone."""
_STATE: Final = {
    "run_name": "if(max(name.version) > 0, argMax(name.name, name.version), argMax(start.name, start.inverse_version))",
    "status": "if(max(status.version) > 0, argMax(status.status, status.version), 'RUNNING')",
    "ended_at": "if(max(status.version) > 0, argMax(status.ended_at, status.version), -1)",
    "heartbeat": "max(heartbeat_at)",
}
"""What later events say: these must read all rows of a run."""


@dataclass(frozen=True, slots=True)
class RunQuery:
    """A SELECT whose rows are a run id and the sort columns."""

    sql: str
    parameters: dict[str, Parameter]
    sort: Sort
    by_metrics: bool
    """Filter or order look at metrics."""
    by_clock: bool
    """The filter asks what time it is."""


def compile_runs(
    experiment_ids: Sequence[str],
    tree: Filter | None,
    orders: Sequence[Order],
    view: ViewType,
    *,
    limit: int,
    facts: Facts,
    after: Sequence[int | float | str] | None = None,
    among: Sequence[str] | None = None,
) -> RunQuery:
    """The SELECT of up to `limit` run ids, in order, behind the row with the sort values `after`.

    Args:
        among: only these runs; None for all.
    """
    return _Compiler(experiment_ids, view, facts, among).compile(tree, orders, limit, after)


class _Compiler:
    def __init__(
        self, experiment_ids: Sequence[str], view: ViewType, facts: Facts, among: Sequence[str] | None
    ) -> None:
        self._parameters = Parameters()
        self._head = "" if among is None else f"WITH {self._parameters.add(list(among))} AS candidates\n"
        self._among = "" if among is None else " AND run_id IN candidates"
        self._experiments = self._parameters.add(list(experiment_ids))
        self._view = view
        self._facts = facts
        self._needs_lifecycle = view is not ViewType.ALL and facts.any_lifecycle
        self._columns: dict[str, str] = {"experiment_id": _START["experiment_id"], "start_time": _START["start_time"]}
        self._joins: dict[tuple[str, str], _Join] = {}
        self._by_clock = False

    def compile(
        self, tree: Filter | None, orders: Sequence[Order], limit: int, after: Sequence[int | float | str] | None
    ) -> RunQuery:
        conditions = [self._condition(part) for part in self._pushed_down(tree)]
        sort = self._sort(orders)
        if after is not None:
            conditions.append(seek(sort, after, self._parameters))
        if self._facts.any_purged:
            conditions.append("r.run_id NOT IN (SELECT run_id FROM purged_runs)")
        if self._view is ViewType.DELETED_ONLY and not self._facts.any_lifecycle:
            conditions.append("0")
        elif self._view is not ViewType.ALL and self._needs_lifecycle:
            sign = "!=" if self._view is ViewType.ACTIVE_ONLY else "="
            conditions.append(f"if(x.stage_version > l.stage_version, x.stage, l.stage) {sign} 'deleted'")
        lines = [f"{self._head}SELECT r.run_id AS run_id, {sort.select()}", f"FROM ({self._base()}) AS r"]
        lines += [join.sql(name) for name, join in zip(self._names(), self._joins.values(), strict=True)]
        if self._needs_lifecycle:
            lines += [self._lifecycle()]
        lines += [f"WHERE {' AND '.join(conditions) or '1'}", f"ORDER BY {sort.order_by()}", f"LIMIT {int(limit)}"]
        by_metrics = any(entity == "metric" for entity, _ in self._joins)
        return RunQuery("\n".join(lines), self._parameters.values, sort, by_metrics, self._by_clock)

    def _base(self) -> str:
        columns = ", ".join(f"{expression} AS {name}" for name, expression in self._columns.items())
        if self._columns.keys() <= _START.keys():
            # A resumed run is started again in the same experiment, so that its first start is among these rows.
            return (
                f"SELECT run_id, {columns} FROM run_facts "
                f"WHERE start.experiment_id IN {self._experiments}{self._among} GROUP BY run_id"
            )
        return (
            f"SELECT run_id, {columns} FROM run_facts {self._among.replace(' AND', 'WHERE')} GROUP BY run_id "
            f"HAVING max(start.inverse_version) > 0 AND experiment_id IN {self._experiments}"
        )

    def _lifecycle(self) -> str:
        # The newest of run and experiment lifecycle wins; a run started in a deleted experiment restores it.
        return (
            "LEFT JOIN (SELECT run_id, argMax(lifecycle.stage, lifecycle.version) AS stage, "
            "max(lifecycle.version) AS stage_version "
            "FROM run_facts WHERE lifecycle.version > 0 GROUP BY run_id) AS l ON l.run_id = r.run_id\n"
            "LEFT JOIN (SELECT experiment_id, if(restored, 'active', f.lifecycle.stage) AS stage, "
            "if(restored, f.last_start.version, f.lifecycle.version) AS stage_version, "
            "f.lifecycle.stage = 'deleted' AND f.last_start.version > f.lifecycle.version AS restored "
            "FROM (SELECT experiment_id, lifecycle, last_start FROM experiment_facts FINAL) AS f) AS x "
            "ON x.experiment_id = r.experiment_id"
        )

    def _names(self) -> list[str]:
        return [f"k{number}" for number in range(len(self._joins))]

    def _join(self, field: Field) -> tuple[str, _Join]:
        join = self._joins.get(field.identity)
        if join is None:
            source = _KEYED[field.entity].replace("{key}", self._parameters.add(field.key))
            source = source.replace("{among}", self._among)
            join = self._joins[field.identity] = _Join(source)
        return self._names()[list(self._joins).index(field.identity)], join

    def _column(self, name: str) -> str:
        self._columns.setdefault(name, _START.get(name) or _STATE[name])
        return f"r.{name}"

    def _pushed_down(self, tree: Filter | None) -> list[Filter]:
        """Conditions that must hold move into the subquery of their key, which then is small; the rest is returned."""
        rest: list[Filter] = []
        for part in conjuncts(tree):
            keyed = isinstance(part, Comparison) and part.field.entity in _KEYED and part.operator != "IS NULL"
            if isinstance(part, Comparison) and keyed:
                _, join = self._join(part.field)
                join.required = True
                if part.operator != "IS NOT NULL":
                    join.conditions.append(self._keyed("", part))
            else:
                rest.append(part)
        return rest

    def _condition(self, tree: Filter) -> str:
        if isinstance(tree, And | Or):
            return f"({(' AND ' if isinstance(tree, And) else ' OR ').join(map(self._condition, tree.parts))})"
        if isinstance(tree, Not):
            return f"(NOT {self._condition(tree.part)})"
        field = tree.field
        if field.entity == "attribute":
            return self._attribute(tree)
        if field.entity == "dataset":
            return self._dataset(tree)
        name, _ = self._join(field)
        if tree.operator in ("IS NULL", "IS NOT NULL"):
            return f"({name}.present = {0 if tree.operator == 'IS NULL' else 1})"
        return f"({name}.present = 1 AND {self._keyed(f'{name}.', tree)})"

    def _keyed(self, prefix: str, comparison: Comparison) -> str:
        if comparison.field.entity == "metric":
            return compare_number(f"if({prefix}is_nan = 1, nan, {prefix}value)", comparison, self._parameters)
        return compare_text(f"{prefix}value", comparison, self._parameters)

    def _dataset(self, comparison: Comparison) -> str:
        if comparison.operator in ("IS NULL", "IS NOT NULL"):
            sign = "NOT IN" if comparison.operator == "IS NULL" else "IN"
            return f"(r.run_id {sign} (SELECT run_id FROM input_facts))"
        condition = compare_text(comparison.field.key, comparison, self._parameters)
        return f"(r.run_id IN ({_DATASETS} WHERE {condition}))"

    def _attribute(self, comparison: Comparison) -> str:
        key = comparison.field.key
        if key == "status":
            return self._status(comparison)
        expression, present = self._expression(key)
        if comparison.operator == "IS NULL":
            return f"(NOT {present})"
        if comparison.operator == "IS NOT NULL":
            return f"({present})"
        compare = compare_number if RUNS.attributes[key] == "number" else compare_text
        return f"({present} AND {compare(expression, comparison, self._parameters)})"

    def _status(self, comparison: Comparison) -> str:
        """LOST may be asked for like a status; it comes beside RUNNING and does not replace it."""
        operator, value = comparison.operator, comparison.value
        status = self._column("status")
        if operator in ("IS NULL", "IS NOT NULL"):
            return "0" if operator == "IS NULL" else "1"
        if operator in ("=", "!=") and value == LOST:
            return f"({'' if operator == '=' else 'NOT '}{self._lost()})"
        if isinstance(value, tuple) and LOST in value:
            others = Comparison(comparison.field, "IN", tuple(item for item in value if item != LOST))
            either = f"({compare_text(status, others, self._parameters)} OR {self._lost()})"
            return either if operator == "IN" else f"(NOT {either})"
        return f"({compare_text(status, comparison, self._parameters)})"

    def _lost(self) -> str:
        self._by_clock = True
        limit = f"toUnixTimestamp64Milli(now64(3)) - {LOST_AFTER_SECONDS * 1000}"
        return f"({self._column('status')} = 'RUNNING' AND {self._column('heartbeat')} < {limit})"

    def _expression(self, key: str) -> tuple[str, str]:
        """An attribute's value, and the condition that there is one."""
        if key == "run_id":
            return "r.run_id", "1"
        if key == "end_time":
            ended = self._column("ended_at")
            return ended, f"({ended} >= 0 AND {self._column('status')} NOT IN ('RUNNING', 'SCHEDULED'))"
        if key == "artifact_uri":
            uri = self._column("relative_uri")
            return (
                f"if({uri} LIKE '%://%', {uri}, concat({self._parameters.add(self._facts.artifact_root)}, '/', {uri}))",
                "1",
            )
        if key == "lifecycle_stage":
            if not self._facts.any_lifecycle:
                return "'active'", "1"
            self._needs_lifecycle = True
            return "if(if(x.stage_version > l.stage_version, x.stage, l.stage) = 'deleted', 'deleted', 'active')", "1"
        expression = self._column(key)
        return expression, f"{expression} != ''" if key == "parent_run_id" else "1"

    def _sort(self, orders: Sequence[Order]) -> Sort:
        columns: list[Column] = []
        for order in orders:
            field = order.field
            if field.entity == "attribute":
                expression, present = self._expression(field.key)
                number = RUNS.attributes[field.key] == "number"
                if present != "1":
                    columns.append(Column(f"toUInt8(NOT {present})", True, int))
                    expression = f"if({present}, {expression}, {'0' if number else chr(39) * 2})"
                columns.append(Column(expression, order.ascending, int if number else str))
                continue
            name, _ = self._join(field)
            if field.entity == "metric":
                columns.append(Column(f"multiIf({name}.present = 0, 2, {name}.is_nan = 1, 1, 0)", True, int))
                columns.append(Column(f"{name}.value", order.ascending, float))
            else:
                columns.append(Column(f"toUInt8({name}.present = 0)", True, int))
                columns.append(Column(f"{name}.value", order.ascending, str))
        named = {order.field.identity for order in orders}
        if ("attribute", "start_time") not in named:
            columns.append(Column("r.start_time", False, int))
        if ("attribute", "run_id") not in named:
            columns.append(Column("r.run_id", True, str))
        return Sort(columns)


class _Join:
    """The subquery of one key of one entity."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.required = False
        """Runs without the key cannot match."""
        self.conditions: list[str] = []

    def sql(self, name: str) -> str:
        source = self._source
        if self.conditions:
            # Around the whole: the source may have a condition of its own.
            source = f"SELECT * FROM ({source}) WHERE {' AND '.join(self.conditions)}"
        return f"{'INNER' if self.required else 'LEFT'} JOIN ({source}) AS {name} ON {name}.run_id = r.run_id"


def conjuncts(tree: Filter | None) -> list[Filter]:
    """The conditions that must all hold."""
    if tree is None:
        return []
    if isinstance(tree, And):
        return [part for child in tree.parts for part in conjuncts(child)]
    return [tree]
