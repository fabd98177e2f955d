"""Text -> tree: filters through the grammar, `order_by` entries by hand. Owns names, aliases, what may be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final, Literal, cast

from ..errors import InvalidFilter
from .tree import And, Comparison, Entity, Field, Filter, Not, Operator, Or, Value

__all__ = ["EXPERIMENTS", "RUNS", "Order", "Subject", "parse_filter", "parse_order"]

MAX_FILTER_CHARS: Final = 200_000
MAX_COMPARISONS: Final = 200
MAX_DEPTH: Final = 50
MAX_ORDERS: Final = 20

Kind = Literal["number", "text"]

_ENTITIES: Final[Mapping[str, Entity]] = {
    "metric": "metric", "metrics": "metric",
    "param": "param", "params": "param", "parameter": "param", "parameters": "param",
    "tag": "tag", "tags": "tag",
    "attribute": "attribute", "attributes": "attribute", "attr": "attribute", "run": "attribute",
    "dataset": "dataset", "datasets": "dataset",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """What may be said of runs, or of experiments."""

    name: str
    entities: frozenset[Entity]
    attributes: Mapping[str, Kind]
    aliases: Mapping[str, str]
    """Other names of attributes, lower case."""
    properties: tuple[str, ...] = ()
    """Of a data set."""


RUNS: Final = Subject(
    name="runs",
    entities=frozenset({"metric", "param", "tag", "attribute", "dataset"}),
    attributes={
        "run_id": "text", "run_name": "text", "status": "text", "artifact_uri": "text", "user_id": "text",
        "experiment_id": "text", "start_time": "number", "end_time": "number",
        "source_name": "text", "source_type": "text", "source_version": "text", "parent_run_id": "text",
        "lifecycle_stage": "text",
    },
    aliases={
        "created": "start_time", "run name": "run_name", "name": "run_name", "run id": "run_id", "run_uuid": "run_id",
        "id": "run_id", "user": "user_id", "started_at": "start_time", "ended_at": "end_time",
    },
    properties=("name", "digest", "context"),
)  # fmt: skip
EXPERIMENTS: Final = Subject(
    name="experiments",
    entities=frozenset({"tag", "attribute"}),
    attributes={
        "name": "text", "experiment_id": "text", "creation_time": "number", "last_update_time": "number",
        "artifact_location": "text", "lifecycle_stage": "text",
    },
    aliases={
        "created": "creation_time", "created_at": "creation_time", "updated_at": "last_update_time",
        "last_updated": "last_update_time", "id": "experiment_id",
    },
)  # fmt: skip

_TERMINALS: Final[Mapping[str, str]] = {
    "COMPARATOR": "a comparator (=, !=, <, <=, >, >=)", "LIKE": "LIKE", "ILIKE": "ILIKE", "IN": "IN", "IS": "IS",
    "NULL": "NULL", "STRING": "a quoted string", "NUMBER": "a number", "_AND": "AND", "_OR": "OR", "_NOT": "NOT",
    "LPAR": "(", "RPAR": ")", "COMMA": ",", "$END": "the end",
    "NAME": "a field such as metrics.loss, params.lr, tags.team or status",
}  # fmt: skip
_FIELD_TERMINALS: Final = frozenset({"DOTTED", "DOTTED_QUOTED", "QUOTED_NAME", "NAME"})
_TEXT_OPERATORS: Final = frozenset({"=", "!=", "LIKE", "ILIKE", "IN", "NOT IN", "IS NULL", "IS NOT NULL"})
_NUMBER_OPERATORS: Final = frozenset({"=", "!=", "<", "<=", ">", ">=", "IS NULL", "IS NOT NULL"})


def parse_filter(text: str, subject: Subject = RUNS) -> Filter | None:
    """The tree of `text`; None where it is blank.

    Raises:
        InvalidFilter: it does not parse, names an unknown field, or compares a field with what it cannot be.
    """
    _check_text(text, "filter")
    if not text.strip():
        return None
    if len(text) > MAX_FILTER_CHARS:
        raise InvalidFilter(f"the filter has {len(text)} characters; at most {MAX_FILTER_CHARS} are allowed", text)
    from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedToken, VisitError

    builder = _Builder(text, subject)
    try:
        tree = builder.build(_parser().parse(text))
    except UnexpectedCharacters as exc:
        position = exc.pos_in_stream or 0
        reason = _unreadable(text, position, set(exc.allowed or ()))
        raise InvalidFilter(reason, text, position) from None
    except UnexpectedToken as exc:
        at_end = exc.token.type == "$END"
        position = len(text.rstrip()) if at_end else exc.token.start_pos
        found = "the filter ends" if at_end else f"{str(exc.token)[:50]!r} does not fit"
        raise InvalidFilter(
            f"{found} here: expected {_expected(set(exc.accepts or exc.expected))}", text, position
        ) from None
    except UnexpectedEOF:
        raise InvalidFilter("the filter ends too early", text, len(text)) from None
    except VisitError as exc:
        raise exc.orig_exc from None
    return tree


@dataclass(frozen=True, slots=True)
class Order:
    """One entry of `order_by`."""

    field: Field
    ascending: bool = True


_ORDER: Final = re.compile(r"\s*(?P<field>.+?)(?:\s+(?P<direction>ASC|DESC))?\s*\Z", re.IGNORECASE | re.DOTALL)
_ORDER_FIELD: Final = re.compile(
    r"""(?:(?P<entity>[^\W\d]\w*)\s*\.\s*)?(?:`(?P<ticked>[^`]+)`|"(?P<quoted>[^"]+)"|(?P<bare>[^`"\s](?:[^`"]*[^`"\s])?))\Z"""
)


def parse_order(entries: Sequence[str], subject: Subject = RUNS) -> list[Order]:
    """The fields to order by, in that order.

    Raises:
        InvalidFilter: an entry does not parse, names an unknown field, or names one twice.
    """
    if isinstance(entries, str):
        raise InvalidFilter("order_by takes a list of entries such as ['metrics.loss DESC'], not one string", entries)
    if len(entries) > MAX_ORDERS:
        raise InvalidFilter(f"order_by has {len(entries)} entries; at most {MAX_ORDERS} are allowed", "")
    orders: list[Order] = []
    for entry in entries:
        _check_text(entry, "order_by")
        match = _ORDER.match(entry)
        parts = match and _ORDER_FIELD.match(match["field"])
        if not match or not parts:
            raise InvalidFilter(
                f"order_by entry {entry[:100]!r} does not fit: expected a field and ASC or DESC, "
                "such as 'metrics.`val loss` DESC'",
                entry,
            )
        key = parts["ticked"] or parts["quoted"] or parts["bare"]
        entity = parts["entity"]
        if parts["bare"] and any(map(str.isspace, key)) and key.lower() not in subject.aliases:
            raise InvalidFilter(f"order_by entry {entry[:100]!r}: expected ASC or DESC behind the field", entry)
        field = _field(entity, key, parts["bare"] is None, 0, entry, subject)
        if field.entity == "dataset":
            raise InvalidFilter("runs cannot be ordered by a data set: a run may have several", entry)
        if any(order.field.identity == field.identity for order in orders):
            raise InvalidFilter(f"order_by names {entry[:100]!r} twice", entry)
        orders.append(Order(field, (match["direction"] or "ASC").upper() == "ASC"))
    return orders


class _Builder:
    """Lark's tree -> ours, without recursion in the deep direction that a caller controls."""

    def __init__(self, text: str, subject: Subject) -> None:
        self._text = text
        self._subject = subject
        self._comparisons = 0

    def build(self, node: Any, depth: int = 0) -> Filter:
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"the filter is nested more than {MAX_DEPTH} deep", self._text)
        kind, children = node.data, node.children
        if kind in ("disjunction", "conjunction"):
            parts = tuple(self.build(child, depth + 1) for child in children)
            return Or(parts) if kind == "disjunction" else And(parts)
        if kind == "negated":
            return Not(self.build(children[0], depth + 1))
        if kind == "group":
            return self.build(children[0], depth + 1)
        return self._comparison(kind, children)

    def _comparison(self, kind: str, children: list[Any]) -> Comparison:
        self._comparisons += 1
        if self._comparisons > MAX_COMPARISONS:
            raise InvalidFilter(f"the filter has more than {MAX_COMPARISONS} conditions", self._text)
        token = children[0].children[0]
        field = self._named(str(token), token.start_pos)
        if kind in ("is_null", "is_not_null"):
            found = Comparison(field, "IS NULL" if kind == "is_null" else "IS NOT NULL", None, token.start_pos)
        elif kind == "not_in":
            found = Comparison(field, "NOT IN", self._list(children[2]), _position(children[2]))
        else:
            operator = cast(Operator, str(children[1]).upper())
            right = children[2]
            value = self._list(right) if operator == "IN" else self._value(right)
            found = Comparison(field, operator, value, _position(right))
        self._check(found)
        return found

    def _named(self, text: str, position: int) -> Field:
        match = _ORDER_FIELD.match(text)
        if match is None:  # the grammar's terminals are narrower than this expression
            raise InvalidFilter("this is no field", self._text, position)
        key = match["ticked"] or match["quoted"] or match["bare"]
        return _field(match["entity"], key, match["bare"] is None, position, self._text, self._subject)

    def _value(self, node: Any) -> Value:
        token = node if not hasattr(node, "children") else node.children[0]
        text = str(token)
        if token.type == "STRING":
            quote = text[0]
            # Only quotes and backslashes are escaped, so that a Windows path or a regular expression stays as it is.
            return re.sub(rf"\\([\\'\"])|({quote}){quote}", lambda found: found[1] or found[2], text[1:-1])
        if re.fullmatch(r"[+-]?\d{1,19}", text):
            return int(text)
        return float(text)

    def _list(self, node: Any) -> tuple[Value, ...]:
        return tuple(self._value(child) for child in node.children if child is not None)

    def _check(self, found: Comparison) -> None:
        field, operator = found.field, found.operator
        numeric = field.entity == "metric" or (
            field.entity == "attribute" and self._subject.attributes[field.key] == "number"
        )
        name = _shown(field)
        if operator not in (_NUMBER_OPERATORS if numeric else _TEXT_OPERATORS):
            allowed = "=, !=, <, <=, >, >=, IS [NOT] NULL" if numeric else "=, !=, [NOT] IN, LIKE, ILIKE, IS [NOT] NULL"
            raise InvalidFilter(
                f"{name} cannot be compared by {operator}: expected {allowed}", self._text, found.position
            )
        values = found.value if isinstance(found.value, tuple) else () if found.value is None else (found.value,)
        for value in values:
            if numeric and isinstance(value, str):
                raise InvalidFilter(f"{name} is a number: expected a number without quotes", self._text, found.position)
            if not numeric and not isinstance(value, str):
                raise InvalidFilter(
                    f"{name} is a string: expected a value in quotes, such as '{value}'", self._text, found.position
                )
            if isinstance(value, str) and "\0" in value:
                raise InvalidFilter(
                    "the value holds a NUL character, which no logged value can", self._text, found.position
                )


def _field(entity: str | None, key: str, quoted: bool, position: int, text: str, subject: Subject) -> Field:
    if entity is None and not quoted and "." in key:
        entity, _, key = key.partition(".")
    if entity is None:
        kind: Entity | None = "attribute"
    else:
        kind = _ENTITIES.get(entity.lower())
    if kind is None or kind not in subject.entities:
        known = ", ".join(sorted(name for name, value in _ENTITIES.items() if value in subject.entities))
        raise InvalidFilter(f"{entity!r} is no entity of {subject.name}: expected one of {known}", text, position)
    if kind == "attribute":
        name = key.strip().lower()
        name = subject.aliases.get(name, name)
        if name not in subject.attributes:
            hint = ""
            if entity is None:
                prefixes = [f"{other}s.{key}" for other in ("metric", "param", "tag") if other in subject.entities]
                hint = f" (or did you mean {' or '.join(prefixes)}?)"
            raise InvalidFilter(
                f"{subject.name} have no attribute {key!r}: expected one of {', '.join(subject.attributes)}{hint}",
                text,
                position,
            )
        return Field(kind, name, position)
    if kind == "dataset":
        if key.lower() not in subject.properties:
            raise InvalidFilter(
                f"a data set has no {key!r}: expected datasets.{', datasets.'.join(subject.properties)}", text, position
            )
        return Field(kind, key.lower(), position)
    return Field(kind, key, position)


def _shown(field: Field) -> str:
    return f"{field.entity}s.{field.key}" if field.entity != "attribute" else f"attribute {field.key}"


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str):
        raise InvalidFilter(f"{what} takes text, not {type(text).__name__}", repr(text)[:200])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidFilter(f"{what} holds a lone surrogate, which is not valid text", ascii(text)) from exc


def _position(node: Any) -> int:
    while hasattr(node, "children"):
        node = node.children[0]
    return int(node.start_pos)


def _unreadable(text: str, position: int, allowed: set[str]) -> str:
    char = text[position]
    expected = _expected(allowed)
    if char in "'\"" and "STRING" in allowed:
        return f"a string that starts here has no closing {char}"
    if char in '`"':
        return f"a name that starts here has no closing {char}, or is empty"
    return f"{char!r} does not fit here: expected {expected}"


def _expected(terminals: set[str]) -> str:
    names = {"NAME" if name in _FIELD_TERMINALS else name for name in terminals}
    return " or ".join(sorted(_TERMINALS.get(name, name) for name in names)) or "nothing more"


@cache
def _parser() -> Any:
    from lark import Lark

    grammar = files(__package__).joinpath("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", propagate_positions=False, maybe_placeholders=False)
