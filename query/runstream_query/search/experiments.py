"""A search for experiments -> one SELECT over the view `experiments`: they are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from runstream.entities import ViewType

from ..records import EXPERIMENT_COLUMNS
from ..store import Parameter
from .parse import EXPERIMENTS, Order
from .sql import Column, Parameters, Sort, compare_number, compare_text, seek
from .tree import And, Comparison, Filter, Not, Or

__all__ = ["ExperimentQuery", "compile_experiments"]

_ATTRIBUTES: Final = {
    "name": "r.name",
    "experiment_id": "r.experiment_id",
    "creation_time": "toUnixTimestamp64Milli(r.created_at)",
    "last_update_time": "toUnixTimestamp64Milli(r.updated_at)",
    "artifact_location": "r.artifact_uri",
    "lifecycle_stage": "r.lifecycle_stage",
}


@dataclass(frozen=True, slots=True)
class ExperimentQuery:
    """A SELECT whose rows are `EXPERIMENT_COLUMNS` and the sort columns."""

    sql: str
    parameters: dict[str, Parameter]
    sort: Sort


def compile_experiments(
    tree: Filter | None,
    orders: Sequence[Order],
    view: ViewType,
    *,
    limit: int,
    after: Sequence[int | float | str] | None = None,
) -> ExperimentQuery:
    """The SELECT of up to `limit` experiment ids, in order, behind the row with the sort values `after`."""
    parameters = Parameters()
    conditions = ["1"] if tree is None else [_condition(tree, parameters)]
    if view is not ViewType.ALL:
        conditions.append(f"r.lifecycle_stage = '{'active' if view is ViewType.ACTIVE_ONLY else 'deleted'}'")
    sort = _sort(orders, parameters)
    if after is not None:
        conditions.append(seek(sort, after, parameters))
    sql = (
        f"SELECT {EXPERIMENT_COLUMNS}, {sort.select()}\nFROM experiments AS r\n"
        f"WHERE {' AND '.join(conditions)}\nORDER BY {sort.order_by()}\nLIMIT {int(limit)}"
    )
    return ExperimentQuery(sql, parameters.values, sort)


def _condition(tree: Filter, parameters: Parameters) -> str:
    if isinstance(tree, And | Or):
        word = " AND " if isinstance(tree, And) else " OR "
        return f"({word.join(_condition(part, parameters) for part in tree.parts)})"
    if isinstance(tree, Not):
        return f"(NOT {_condition(tree.part, parameters)})"
    return _comparison(tree, parameters)


def _comparison(comparison: Comparison, parameters: Parameters) -> str:
    field = comparison.field
    if field.entity == "tag":
        key = parameters.add(field.key)
        present, expression = f"mapContains(r.tags, {key})", f"r.tags[{key}]"
    else:
        present, expression = "1", _ATTRIBUTES[field.key]
    if comparison.operator == "IS NULL":
        return f"(NOT {present})"
    if comparison.operator == "IS NOT NULL":
        return f"({present})"
    number = field.entity == "attribute" and EXPERIMENTS.attributes[field.key] == "number"
    compare = compare_number if number else compare_text
    return f"({present} AND {compare(expression, comparison, parameters)})"


def _sort(orders: Sequence[Order], parameters: Parameters) -> Sort:
    columns: list[Column] = []
    for order in orders:
        field = order.field
        if field.entity == "tag":
            key = parameters.add(field.key)
            columns.append(Column(f"toUInt8(NOT mapContains(r.tags, {key}))", True, int))
            columns.append(Column(f"r.tags[{key}]", order.ascending, str))
        else:
            number = EXPERIMENTS.attributes[field.key] == "number"
            columns.append(Column(_ATTRIBUTES[field.key], order.ascending, int if number else str))
    named = {order.field.key for order in orders if order.field.entity == "attribute"}
    if not orders:
        columns.append(Column(_ATTRIBUTES["creation_time"], False, int))
    if "experiment_id" not in named:
        columns.append(Column("r.experiment_id", True, str))
    return Sort(columns)
