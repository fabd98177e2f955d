"""A second opinion on searches: filters and orders evaluated in plain Python over known runs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from runstream.entities import Run
from runstream_query.search.parse import Order
from runstream_query.search.tree import And, Comparison, Field, Filter, Not, Or


def matches(tree: Filter | None, run: Run) -> bool:
    """Whether `run` meets the filter."""
    if tree is None:
        return True
    if isinstance(tree, And):
        return all(matches(part, run) for part in tree.parts)
    if isinstance(tree, Or):
        return any(matches(part, run) for part in tree.parts)
    if isinstance(tree, Not):
        return not matches(tree.part, run)
    if tree.field.entity == "dataset":
        values = [_of_dataset(tree.field.key, each) for each in run.inputs.dataset_inputs]
        if tree.operator in ("IS NULL", "IS NOT NULL"):
            return bool(values) == (tree.operator == "IS NOT NULL")
        return any(_compare(tree, value) for value in values)
    value = value_of(tree.field, run)
    if tree.operator in ("IS NULL", "IS NOT NULL"):
        return (value is None) == (tree.operator == "IS NULL")
    return value is not None and _compare(tree, value)


def ordered(runs: Sequence[Run], orders: Sequence[Order]) -> list[Run]:
    """`runs` in order: NULL last, NaN before NULL, ties by start time (newest first) and run id."""
    found = sorted(runs, key=lambda run: run.info.run_id)
    found.sort(key=lambda run: run.info.start_time, reverse=True)
    for order in reversed(orders):
        values = [(run, value_of(order.field, run)) for run in found]
        known = [(run, value) for run, value in values if value is not None and not _is_nan(value)]
        known.sort(key=lambda pair: pair[1], reverse=not order.ascending)
        nans = [run for run, value in values if _is_nan(value)]
        nulls = [run for run, value in values if value is None]
        found = [run for run, _ in known] + nans + nulls
    return found


def value_of(field: Field, run: Run) -> Any:
    """The value of a field, None where the run has none."""
    data = {"metric": run.data.metrics, "param": run.data.params, "tag": run.data.tags}
    if field.entity in data:
        return data[field.entity].get(field.key)
    names = {"experiment_id": "experiment_id"}
    return getattr(run.info, names.get(field.key, field.key))


def _of_dataset(key: str, used: Any) -> str:
    if key == "context":
        return next((tag.value for tag in used.tags if tag.key == "mlflow.data.context"), "")
    return str(getattr(used.dataset, key))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _compare(comparison: Comparison, value: Any) -> bool:
    operator, wanted = comparison.operator, comparison.value
    if operator == "=":
        return bool(value == wanted)
    if operator == "!=":
        return bool(value != wanted)
    if operator in ("IN", "NOT IN"):
        assert isinstance(wanted, tuple)
        return (value in wanted) == (operator == "IN")
    if operator in ("LIKE", "ILIKE"):
        assert isinstance(wanted, str)
        pattern = "".join(".*" if char == "%" else "." if char == "_" else re.escape(char) for char in wanted)
        return re.fullmatch(pattern, value, re.DOTALL | (re.IGNORECASE if operator == "ILIKE" else 0)) is not None
    assert isinstance(wanted, int | float)
    return bool({"<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted}[operator])
