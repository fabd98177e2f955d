"""The search language: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runstream_query import InvalidFilter
from runstream_query.search.parse import EXPERIMENTS, MAX_COMPARISONS, parse_filter, parse_order
from runstream_query.search.tree import And, Comparison, Field, Not, Or


def only(text: str) -> Comparison:
    found = parse_filter(text)
    assert isinstance(found, Comparison)
    return found


@pytest.mark.parametrize(
    ("text", "entity", "key", "operator", "value"),
    [
        ("metrics.loss < 0.1", "metric", "loss", "<", 0.1),
        ("metric.loss>=-1e-3", "metric", "loss", ">=", -0.001),
        ("metrics.`val loss` != 5", "metric", "val loss", "!=", 5),
        ('metrics."val loss" = .5', "metric", "val loss", "=", 0.5),
        ("METRICS.loss <= +3.", "metric", "loss", "<=", 3.0),
        ("metrics.train/acc@5 > 1", "metric", "train/acc@5", ">", 1),
        ("params.lr = '0.01'", "param", "lr", "=", "0.01"),
        ('parameters.lr = "0.01"', "param", "lr", "=", "0.01"),
        ("parameter.a.b.c like 'x%'", "param", "a.b.c", "LIKE", "x%"),
        ("tags.mlflow.source.name ILIKE '%Train%'", "tag", "mlflow.source.name", "ILIKE", "%Train%"),
        ("tag.`a`='b'", "tag", "a", "=", "b"),
        ("attributes.status = 'RUNNING'", "attribute", "status", "=", "RUNNING"),
        ("attr.run_id IN ('a', 'b',)", "attribute", "run_id", "IN", ("a", "b")),
        ("run.run_name NOT  IN ('a')", "attribute", "run_name", "NOT IN", ("a",)),
        ("status != 'FAILED'", "attribute", "status", "!=", "FAILED"),
        ('"run name" = "x"', "attribute", "run_name", "=", "x"),
        ("attributes.`Run name` = 'x'", "attribute", "run_name", "=", "x"),
        ("Created > 1664067852747", "attribute", "start_time", ">", 1664067852747),
        ("end_time is null", "attribute", "end_time", "IS NULL", None),
        ("params.x IS NOT NULL", "param", "x", "IS NOT NULL", None),
        ("datasets.name = 'mnist'", "dataset", "name", "=", "mnist"),
        ("dataset.context NOT IN ('train', 'test')", "dataset", "context", "NOT IN", ("train", "test")),
        ("params.ключ = 'значение'", "param", "ключ", "=", "значение"),
    ],
)
def test_comparison(text: str, entity: str, key: str, operator: str, value: object) -> None:
    """Every entity, alias, quoting and comparator of MLflow's language is understood."""
    found = only(text)
    assert (found.field.entity, found.field.key, found.operator, found.value) == (entity, key, operator, value)
    assert type(found.value) is type(value)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        (r"'it\'s'", "it's"),
        ("'it''s'", "it's"),
        (r'"say \"x\""', 'say "x"'),
        (r"'C:\new\table'", r"C:\new\table"),
        (r"'a\\b'", r"a\b"),
        ("'two\nlines'", "two\nlines"),
        ("''", ""),
        ("'--; DROP TABLE runs /*'", "--; DROP TABLE runs /*"),
        ("'{p0:String}'", "{p0:String}"),
    ],
)
def test_string_escapes(literal: str, value: str) -> None:
    """Quotes and backslashes are escaped by a backslash, quotes also by doubling; every other backslash stays."""
    assert only(f"params.x = {literal}").value == value


def test_structure() -> None:
    """AND binds more tightly than OR, NOT more than both, and parentheses group."""
    a, b, c = (only(f"metrics.{key} = 1").field.key for key in "abc")
    found = parse_filter("metrics.a = 1 OR metrics.b = 1 AND NOT (metrics.c = 1)")
    assert isinstance(found, Or)
    first, second = found.parts
    assert isinstance(first, Comparison) and first.field.key == a
    assert isinstance(second, And) and isinstance(second.parts[0], Comparison) and second.parts[0].field.key == b
    assert isinstance(second.parts[1], Not) and isinstance(second.parts[1].part, Comparison)
    assert second.parts[1].part.field.key == c


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_blank(text: str) -> None:
    """A blank filter is no condition."""
    assert parse_filter(text) is None


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("metrics.loss <", 14, "a number or a quoted string"),
        ("metrics.loss < 'a'", 15, "Expected numeric value type for metric. Found 'a': write a number without quotes"),
        ("params.lr = 0.1", 12, "Expected a quoted string value for parameter (e.g. 'my-value'). Got value 0.1"),
        ("params.lr = 'a", 12, "has no closing '"),
        ("metrics.`a = 1", 7, "does not fit"),
        ("foo.bar = 1", 0, "Invalid entity type 'foo'. Valid values are ['attr', 'attribute'"),
        ("loss < 1", 0, "Invalid attribute key 'loss' specified. Valid keys are ['run_id'"),
        ("loss < 1", 0, "did you mean metrics.loss"),
        ("metrics.a = 1 metrics.b = 2", 14, "expected AND or OR or the end"),
        ("(metrics.a = 1", 14, "expected )"),
        ("metrics.a = 1)", 13, "expected the end"),
        ("params.x IN ()", 13, "a quoted string"),
        ("params.x > 'a'", 11, "Invalid comparator '>' not one of =, !=, [NOT] IN"),
        ("metrics.x LIKE 'a'", 15, "Expected numeric value type for metric. Found 'a'"),
        ("metrics.x IN (1)", 14, "Expected numeric value type for metric. Found (1,)"),
        ("start_time = 'now'", 13, "Expected numeric value type for numeric attribute: start_time. Found 'now'"),
        ("datasets.size = 'x'", 0, "Invalid dataset key 'size' specified. Valid keys are ['name', 'digest'"),
        ("params.x = 'a\0b'", 11, "NUL"),
        ("metrics.a = 1.2.3", 12, "Expected numeric value type for metric. Found 1.2.3"),
        ("1 = 1", 0, "a field such as"),
        ("1 = 1", 0, "Invalid comparison clause. Expected 'Identifier' found '1'"),
        ("1.0 > metrics.a", 0, "Expected 'Identifier' found '1.0'"),
        ("metrics.a >", 11, "Invalid clause(s) in filter string: 'metrics.a >'"),
        ("metrics.a = 1 NAND params.b = 'x'", 14, "Invalid clause(s) in filter string"),
        ("metrics.a = 1; metrics.b = 2", 13, "Search filter contained multiple expression"),
        ("metrics.a ~ 1", 10, "Invalid comparator '~'"),
        ("metrics.a == 1", 11, "Invalid comparator '=='"),
        ("tags.a = = 'x'", 9, "Invalid clause(s) in filter string"),
        ("metrics.a != metrics.b", 13, "Expected numeric value type for metric. Found metrics.b"),
        ("start_time > abc", 13, "Expected numeric value type for numeric attribute: start_time. Found abc"),
        ("start_time LIKE 5", 16, "Invalid comparator 'LIKE' not one of =, !=, <"),
        ("params.a = LR", 11, "value is either not quoted or unidentified quote types used for string value LR"),
        ("params.a = `LR`", 11, "value is either not quoted or unidentified quote types"),
        ("params.a = LR'", 11, "Invalid clause(s) in filter string"),
        ("foo = bar", 6, "Invalid attribute key 'foo' specified"),
        ("status = true", 9, "Invalid clause(s) in filter string"),
    ],
)
def test_errors(text: str, position: int, expected: str) -> None:
    """An error says where it is and what was expected there."""
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text)
    assert caught.value.position == position
    assert expected in str(caught.value)
    assert caught.value.text == text


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5_000 + "metrics.a = 1" + ")" * 5_000,
        "NOT " * 5_000 + "metrics.a = 1",
        " AND ".join(["metrics.a = 1"] * (MAX_COMPARISONS + 1)),
        "metrics.a = 1" + " " * 200_000,
        "params.x = '\ud800'",
    ],
    ids=["parentheses", "negations", "conditions", "length", "surrogate"],
)
def test_bounds(text: str) -> None:
    """Absurd filters are refused, never a crash."""
    with pytest.raises(InvalidFilter):
        parse_filter(text)


@pytest.mark.parametrize("value", [None, 5, b"metrics.a = 1", ["metrics.a = 1"]])
def test_wrong_type(value: object) -> None:
    """A filter that is no text is a clear error."""
    with pytest.raises(InvalidFilter, match="takes text"):
        parse_filter(value)  # type: ignore[arg-type]


def test_experiments_have_their_own_fields() -> None:
    """Experiments are searched by their attributes and tags, and by nothing of a run."""
    found = parse_filter("name LIKE 'a%' AND tags.x = 'y' AND last_update_time > 5", EXPERIMENTS)
    assert isinstance(found, And) and len(found.parts) == 3
    with pytest.raises(InvalidFilter, match="Invalid entity type 'metrics'"):
        parse_filter("metrics.a = 1", EXPERIMENTS)
    with pytest.raises(InvalidFilter, match="Invalid attribute key 'status' specified"):
        parse_filter("status = 'x'", EXPERIMENTS)


@pytest.mark.parametrize(
    ("entry", "identity", "ascending"),
    [
        ("metrics.loss DESC", ("metric", "loss"), False),
        ("metrics.`val loss` asc", ("metric", "val loss"), True),
        ('params."a b"', ("param", "a b"), True),
        ("tag.mlflow.runName desc", ("tag", "mlflow.runName"), False),
        ("Created", ("attribute", "start_time"), True),
        ("attributes.end_time DESC", ("attribute", "end_time"), False),
        ("`run name`", ("attribute", "run_name"), True),
        ("  status  ", ("attribute", "status"), True),
    ],
)
def test_order(entry: str, identity: tuple[str, str], ascending: bool) -> None:
    """An entry of order_by is a field and a direction, ascending where none is given."""
    (found,) = parse_order([entry])
    assert (found.field.identity, found.ascending) == (identity, ascending)


@pytest.mark.parametrize(
    "entries",
    [
        [""],
        ["foo"],
        ["start_time descending"],
        ["metrics.a", "metrics.`a` DESC"],
        ["datasets.name"],
        [5],
        "metrics.a",
        [f"metrics.m{number}" for number in range(30)],
    ],
)
def test_bad_order(entries: list[str]) -> None:
    """An ordering that does not parse, repeats a field or is no list is refused."""
    with pytest.raises(InvalidFilter):
        parse_order(entries)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([""], "Invalid order_by clause ''. Could not be parsed"),
        (["metrics.a descending"], "Invalid ordering key in order_by clause 'metrics.a descending'"),
        (["nope DESC"], "Invalid attribute key 'nope' specified"),
        (["foo.bar"], "Invalid entity type 'foo'"),
        (["datasets.name"], "Invalid identifier type 'dataset'"),
        (["tags.t", "tag.t DESC"], "`order_by` contains duplicate fields"),
    ],
)
def test_order_errors(entries: list[str], expected: str) -> None:
    """An ordering that does not fit is refused with MLflow's sentence."""
    with pytest.raises(InvalidFilter) as caught:
        parse_order(entries)
    assert expected in str(caught.value)


@pytest.mark.timeout(20)
def test_errors_of_a_long_filter_are_quick() -> None:
    """Looking for the field before a wrong value does not take the square of the filter's length."""
    with pytest.raises(InvalidFilter):
        parse_filter(f"params.a = '{'a' * 150_000}' AND params.b = c")


# fmt: off
_PIECES = st.sampled_from((
    "metrics.", "params.", "tags.", "attributes.", "datasets.", "loss", "`a b`", '"x"', "'y'", "1", "-2.5e3", ".", ",",
    "(", ")", "=", "!=", "<", "<=", ">", ">=", "LIKE", "ILIKE", "IN", "NOT", "IS", "NULL", "AND", "OR", "status",
    "run_id", "start_time", "\\", "'", '"', "`", "{p0:String}", "--", "/*", ";", "\0",
))
# fmt: on
_pieces = st.lists(_PIECES, max_size=25)


@given(st.text(max_size=60) | _pieces.map(" ".join) | _pieces.map("".join))
@settings(deadline=None)
@example("metrics.a=1 and(not params.b in('x')or status is null)")
def test_any_text_parses_or_is_refused(text: str) -> None:
    """No text makes the parser fail in any other way than by InvalidFilter; what it finds keeps the positions."""
    for parse in (lambda: parse_filter(text), lambda: parse_filter(text, EXPERIMENTS), lambda: parse_order([text])):
        try:
            parse()
        except InvalidFilter as exc:
            assert exc.position is None or 0 <= exc.position <= len(text)
            assert str(exc)


def test_field_equality_ignores_nothing() -> None:
    """Fields are the same by entity and key alone, wherever they stand."""
    assert Field("metric", "a", 3).identity == Field("metric", "a", 9).identity
    assert Field("metric", "a").identity != Field("param", "a").identity
