"""What a filter says, as a tree of frozen values. No SQL and no parsing here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["And", "Comparison", "Entity", "Field", "Filter", "Not", "Operator", "Or", "Value"]

Entity = Literal["metric", "param", "tag", "attribute", "dataset"]
Operator = Literal["=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "IN", "NOT IN", "IS NULL", "IS NOT NULL"]
Value = str | int | float
"""A quoted string, or a number (int where it was written without point and exponent)."""


@dataclass(frozen=True, slots=True)
class Field:
    """What is compared or ordered by."""

    entity: Entity
    key: str
    """Key of a metric, param or tag; normal name of an attribute or of a data set's property."""
    position: int = 0
    """Where it stands in the text."""

    @property
    def identity(self) -> tuple[str, str]:
        """What makes two fields the same."""
        return self.entity, self.key


@dataclass(frozen=True, slots=True)
class Comparison:
    """One condition on one field. A run without the metric, param, tag or data set meets only IS NULL."""

    field: Field
    operator: Operator
    value: Value | tuple[Value, ...] | None
    """A tuple for IN and NOT IN, None for IS NULL and IS NOT NULL."""
    position: int = 0
    """Where the value stands in the text (the field, where there is none)."""


@dataclass(frozen=True, slots=True)
class And:
    """All parts hold."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: Filter


Filter = Comparison | And | Or | Not
