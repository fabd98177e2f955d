"""Pieces of SQL that searches are made of: parameters, comparisons, orderings and the place where a page begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..store import Parameter
from .tree import Comparison, Operator

__all__ = ["Column", "Parameters", "Sort", "compare_number", "compare_text", "seek"]

_INT64: Final = range(-(1 << 63), 1 << 63)
_SYMBOLS: Final[dict[Operator, str]] = {"=": "=", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class Parameters:
    """Collects values; what a caller wrote reaches the store only through these."""

    def __init__(self) -> None:
        self.values: dict[str, Parameter] = {}

    def add(self, value: Parameter) -> str:
        """The placeholder for `value`."""
        name = f"p{len(self.values)}"
        if isinstance(value, str):
            kind = "String"
        elif isinstance(value, int) and value in _INT64:
            kind = "Int64"
        elif isinstance(value, int | float):
            value, kind = float(value), "Float64"
        else:
            value, kind = [str(item) for item in value], "Array(String)"
        self.values[name] = value
        return f"{{{name}:{kind}}}"


def compare_number(expression: str, comparison: Comparison, parameters: Parameters) -> str:
    """The condition that `comparison` sets on a number that is there; NaN is unequal to everything."""
    value = comparison.value
    assert isinstance(value, int | float) and not isinstance(value, bool)  # checked by the parser
    return f"{expression} {_SYMBOLS[comparison.operator]} {parameters.add(value)}"


def compare_text(expression: str, comparison: Comparison, parameters: Parameters) -> str:
    """The condition that `comparison` sets on a string that is there."""
    operator, value = comparison.operator, comparison.value
    if operator in ("IN", "NOT IN"):
        assert isinstance(value, tuple)  # checked by the parser
        return f"{expression} {operator} {parameters.add([str(item) for item in value])}"
    assert isinstance(value, str)  # checked by the parser
    if operator in ("LIKE", "ILIKE"):
        # In MLflow's patterns a backslash is a character like any other; in ClickHouse's it escapes.
        return f"{expression} {operator} {parameters.add(value.replace(chr(92), chr(92) * 2))}"
    return f"{expression} {_SYMBOLS[operator]} {parameters.add(value)}"


@dataclass(frozen=True, slots=True)
class Column:
    """One expression that a page is ordered by."""

    expression: str
    ascending: bool
    kind: type[int] | type[float] | type[str]


@dataclass(frozen=True, slots=True)
class Sort:
    """The whole order, which no two rows share."""

    columns: Sequence[Column]

    def names(self) -> list[str]:
        """Aliases of the columns in the SELECT."""
        return [f"sort{number}" for number in range(len(self.columns))]

    def select(self) -> str:
        """The columns for the SELECT list."""
        pairs = zip(self.columns, self.names(), strict=True)
        return ", ".join(f"{column.expression} AS {name}" for column, name in pairs)

    def order_by(self) -> str:
        """The ORDER BY list."""
        pairs = zip(self.columns, self.names(), strict=True)
        return ", ".join(f"{name} {'ASC' if column.ascending else 'DESC'}" for column, name in pairs)


def seek(sort: Sort, after: Sequence[int | float | str], parameters: Parameters) -> str:
    """The condition for rows that come behind the row whose sort columns are `after`."""
    condition = ""
    for column, value in reversed(list(zip(sort.columns, after, strict=True))):
        placeholder = parameters.add(value)
        behind = f"{column.expression} {'>' if column.ascending else '<'} {placeholder}"
        if condition:
            behind = f"({behind} OR ({column.expression} = {placeholder} AND {condition}))"
        condition = behind
    return condition
