"""Text -> tree: filters through the grammar, `order_by` entries by hand. Owns names, aliases, what may be compared.

Errors begin with MLflow's sentence for the same mistake, which its users search for and its tests look for; where and
what was expected follows.
"""

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
_SHOWN_CHARS: Final = 100
_LOOKED_AT_CHARS: Final = 600
_WORD: Final = re.compile(r"[\w.+\-`/:@'*]+")
_LEFT: Final = re.compile(
    r"""(?:(?P<entity>[^\W\d]\w*)\s*\.\s*)?(?P<key>`[^`]+`|"[^"]+"|[\w.\-/:@]+)\s*"""
    r"""(?P<operator>[<>!]?=|[<>]|\bI?LIKE\b)\s*\Z""",
    re.IGNORECASE,
)
"""The field and the comparator before a value, in a text that ends there."""
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
        raise InvalidFilter(_unreadable(text, position, set(exc.allowed or ()), subject), text, position) from None
    except UnexpectedToken as exc:
        expected = set(exc.accepts or exc.expected)
        if exc.token.type == "$END":
            reason = _clauses(text, f"the filter ends here: expected {_expected(expected)}")
            raise InvalidFilter(reason, text, len(text.rstrip())) from None
        position = exc.token.start_pos
        raise InvalidFilter(_unreadable(text, position, expected, subject), text, position) from None
    except UnexpectedEOF:
        raise InvalidFilter(_clauses(text, "the filter ends too early"), text, len(text)) from None
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
            raise _no_order(entry)
        key = parts["ticked"] or parts["quoted"] or parts["bare"]
        entity = parts["entity"]
        if parts["bare"] and any(map(str.isspace, key)) and key.lower() not in subject.aliases:
            if match["direction"] or len(key.split()) > 2 or "," in key:
                raise _no_order(entry)
            raise InvalidFilter(
                f"Invalid ordering key in order_by clause {entry[:100]!r}. Expected ASC or DESC behind the field", entry
            )
        field = _field(entity, key, parts["bare"] is None, 0, entry, subject)
        if field.entity == "dataset":
            raise InvalidFilter(
                "Invalid identifier type 'dataset': runs cannot be ordered by a data set, a run may have several",
                entry,
            )
        if any(order.field.identity == field.identity for order in orders):
            raise InvalidFilter(f"`order_by` contains duplicate fields: it names {entry[:100]!r} twice", entry)
        orders.append(Order(field, (match["direction"] or "ASC").upper() == "ASC"))
    return orders


def _no_order(entry: str) -> InvalidFilter:
    return InvalidFilter(
        f"Invalid order_by clause {entry[:100]!r}. Could not be parsed. Expected a field and ASC or DESC, "
        "such as 'metrics.`val loss` DESC'",
        entry,
    )


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
        values = found.value if isinstance(found.value, tuple) else () if found.value is None else (found.value,)
        for value in values:
            if numeric and (isinstance(value, str) or isinstance(found.value, tuple)):
                raise InvalidFilter(_numeric(field, repr(found.value)), self._text, found.position)
            if not numeric and not isinstance(value, str):
                raise InvalidFilter(_quoted(field, value), self._text, found.position)
            if isinstance(value, str) and "\0" in value:
                raise InvalidFilter(
                    "the value holds a NUL character, which no logged value can", self._text, found.position
                )
        if operator not in (_NUMBER_OPERATORS if numeric else _TEXT_OPERATORS):
            raise InvalidFilter(_comparator(operator, _shown(field), numeric), self._text, found.position)


def _field(entity: str | None, key: str, quoted: bool, position: int, text: str, subject: Subject) -> Field:
    if entity is None and not quoted and "." in key:
        entity, _, key = key.partition(".")
    if entity is None:
        kind: Entity | None = "attribute"
    else:
        kind = _ENTITIES.get(entity.lower())
    if kind is None or kind not in subject.entities:
        known = sorted(name for name, value in _ENTITIES.items() if value in subject.entities)
        raise InvalidFilter(
            f"Invalid entity type {entity!r}. Valid values are {known} for {subject.name}", text, position
        )
    if kind == "attribute":
        name = key.strip().lower()
        name = subject.aliases.get(name, name)
        if name not in subject.attributes:
            hint = ""
            if entity is None:
                prefixes = [f"{other}s.{key}" for other in ("metric", "param", "tag") if other in subject.entities]
                hint = f" (or did you mean {' or '.join(prefixes)}?)"
            raise InvalidFilter(
                f"Invalid attribute key {key!r} specified. Valid keys are {list(subject.attributes)} for {subject.name}"
                f"{hint}",
                text,
                position,
            )
        return Field(kind, name, position)
    if kind == "dataset":
        if key.lower() not in subject.properties:
            raise InvalidFilter(
                f"Invalid dataset key {key!r} specified. Valid keys are {list(subject.properties)}", text, position
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


def _clauses(text: str, reason: str) -> str:
    return f"Invalid clause(s) in filter string: {text[:_SHOWN_CHARS]!r}: {reason}"


def _comparator(operator: str, name: str, numeric: bool) -> str:
    allowed = "=, !=, <, <=, >, >=, IS [NOT] NULL" if numeric else "=, !=, [NOT] IN, LIKE, ILIKE, IS [NOT] NULL"
    return f"Invalid comparator {operator!r} not one of {allowed}, by which {name} can be compared"


def _numeric(field: Field, found: str) -> str:
    kind = "metric" if field.entity == "metric" else f"numeric attribute: {field.key}"
    return f"Expected numeric value type for {kind}. Found {found}: write a number without quotes"


def _quoted(field: Field, found: object) -> str:
    if field.entity in ("param", "tag"):
        kind = f"{'parameter' if field.entity == 'param' else 'tag'} (e.g. 'my-value')"
    else:
        kind = "dataset attributes" if field.entity == "dataset" else "attributes"
    return f"Expected a quoted string value for {kind}. Got value {found}: write '{found}'"


def _unreadable(text: str, position: int, allowed: set[str], subject: Subject) -> str:
    """What is wrong with what stands at `position`, where only terminals of `allowed` fit."""
    char = text[position]
    word = _WORD.match(text, position)
    found = (word[0] if word else char)[:_SHOWN_CHARS]
    if char == ";" and text[position + 1 :].strip():
        return f"Search filter contained multiple expression {text[:_SHOWN_CHARS]!r}. Provide AND-ed expression list"
    if "COMPARATOR" in allowed and char in "~^&|*/":
        return _comparator(char, "a field", "LIKE" not in allowed)
    if "STRING" in allowed:
        if char in "'\"":
            return _clauses(text, f"a string that starts here has no closing {char}")
        if char == "=" and text[position - 1] == "=":
            return _comparator("==", "a field", True)
        if word and found.lower() not in ("true", "false") and found.count("`") % 2 == 0 and "'" not in found:
            return _not_text(text, position, found, subject)
    elif char in '`"':
        return _clauses(text, f"a name that starts here has no closing {char}, or is empty")
    elif allowed & _FIELD_TERMINALS and re.match(r"[+-]?\.?\d", found):
        return f"Invalid comparison clause. Expected 'Identifier' found {found!r}: expected {_expected(allowed)}"
    return _clauses(text, f"{found!r} does not fit here: expected {_expected(allowed)}")


def _not_text(text: str, position: int, found: str, subject: Subject) -> str:
    """A bare word or a number stands where a string may stand."""
    left = _LEFT.search(text[max(0, position - _LOOKED_AT_CHARS) : position])
    if left is not None:
        key = left["key"]
        field = _field(left["entity"], key.strip('`"'), key[0] in '`"', position, text, subject)
        if field.entity == "metric" or (field.entity == "attribute" and subject.attributes[field.key] == "number"):
            if left["operator"][0] in "LlIi":
                return _comparator(left["operator"].upper(), _shown(field), True)
            return _numeric(field, found)
    return (
        f"Parameter value is either not quoted or unidentified quote types used for string value {found}. "
        "Use either single or double quotes."
    )


def _expected(terminals: set[str]) -> str:
    names = {"NAME" if name in _FIELD_TERMINALS else name for name in terminals}
    return " or ".join(sorted(_TERMINALS.get(name, name) for name in names)) or "nothing more"


@cache
def _parser() -> Any:
    from lark import Lark

    grammar = files(__package__).joinpath("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", propagate_positions=False, maybe_placeholders=False)
