"""The read-only gate: which SQL a reader may run. One of several walls; none of them holds alone.

1. The connection's role: SELECT on our database alone.       (engine.py)
2. `readonly = 1` on the connection, set last.                (engine.py)
3. The engine's own classification: one statement, no control statement.
4. An allow-list over the engine's own parse (EXPLAIN AST): node types, functions, tables, formats.
5. URL settings, formats and databases by allow-list.
6. The process may open no file but the store's.              (landlock.py)

The checks of 4 look at one line of the AST each: a quoted identifier with a line break can add lines to that text but
can hide none.

What may be read: every table and view of our own database, and nothing of any other but the few system tables below.
The private tables hold the same facts as the public views, as they were sent (rows of purged runs until merges drop
them); whoever may read the views could read those facts before, so they are not a secret, only no interface.

Independent of HTTP: it needs a `Session` and the text.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from runstream_schemas.names import DATABASE

from .engine import Session
from .errors import EngineQueryError, Refused
from .formats import readable_format

__all__ = [
    "MAX_SQL_CHARS",
    "Approved",
    "Limits",
    "Memory",
    "SettingsPolicy",
    "check",
    "check_database",
    "check_format",
]

MAX_SQL_CHARS: Final = 1_000_000
"""Longest statement of a reader."""

_ACCESS_DENIED: Final = 497
_SETTING_REFUSED: Final = 452
_READONLY: Final = 164
_UNKNOWN_FORMAT: Final = 73

_NODES: Final = frozenset(
    {
        "ArrayJoin",
        "Asterisk",
        "CollectionOfLiterals",
        "ColumnsExceptTransformer",
        "ColumnsListMatcher",
        "ColumnsRegexpMatcher",
        "ColumnsReplaceTransformer",
        "ColumnsReplaceTransformer::Replacement",
        "ColumnsTransformerList",
        "DataType",
        "DescribeQuery",
        "ExistsTableQuery",
        "ExistsViewQuery",
        "Explain",
        "ExpressionList",
        "Function",
        "Identifier",
        "InterpolateElement",
        "Literal",
        "NameTypePair",
        "Optimized",
        "OrderByElement",
        "QualifiedAsterisk",
        "QualifiedColumnsListMatcher",
        "QualifiedColumnsRegexpMatcher",
        "SampleRatio",
        "SelectIntersectExceptQuery",
        "SelectQuery",
        "SelectWithUnionQuery",
        "ShowColumns",
        "ShowCreateTableQuery",
        "ShowCreateViewQuery",
        "ShowTables",
        "Subquery",
        "TableExpression",
        "TableIdentifier",
        "TableJoin",
        "TablesInSelectQuery",
        "TablesInSelectQueryElement",
        "WindowDefinition",
        "WindowListElement",
        "WithElement",
        "set",
    }
)
"""Node types that readers may use. APPLY, SETTINGS, INTO OUTFILE and every other statement are not here."""

_EXPLAIN_KINDS: Final = frozenset(
    {"EXPLAIN", "EXPLAIN AST", "EXPLAIN ESTIMATE", "EXPLAIN PIPELINE", "EXPLAIN QUERY TREE", "EXPLAIN SYNTAX"}
)
_TABLE_FUNCTIONS: Final = frozenset({"generate_series", "generateseries", "numbers", "numbers_mt", "values"})
"""Table functions that compute on their arguments alone; the role stops those that would make a temporary table."""
_SYSTEM_TABLES: Final = frozenset({"system.one", "system.numbers"})
_CATALOGUE: Final = frozenset(
    {"system.columns", "system.data_type_families", "system.databases", "system.functions", "system.tables"}
)
"""What drivers and query builders list tables, columns and types from. The engine shows a role only those rows that it
has grants for."""
_PLACES: Final = frozenset({"system.databases", "system.tables"})
_PLACE_COLUMNS: Final = frozenset({"data_path", "data_paths", "metadata_path"})
"""Columns of `_PLACES` that tell where files lie; so their columns must be named one by one."""
_STARS: Final = frozenset(
    {
        "Asterisk",
        "ColumnsListMatcher",
        "ColumnsRegexpMatcher",
        "QualifiedAsterisk",
        "QualifiedColumnsListMatcher",
        "QualifiedColumnsRegexpMatcher",
    }
)
_COMBINATORS: Final = (
    "SimpleState", "OrDefault", "Distinct", "Resample", "ForEach", "ArgMax", "ArgMin", "OrNull", "Tuple", "Merge",
    "State", "Array", "Null", "Map", "If",
)  # fmt: skip
_OPERATORS: Final = frozenset(
    {"lambda", "tupleelement", "arrayelement", "cast", "interval", "grouping", "exists", "untuple"}
)
_EXPLAIN: Final = "EXPLAIN AST "
_POSITION: Final = re.compile(
    r"position (?P<position>\d+)(?P<token> \([^\n]*?\))?(?: \(line (?P<line>\d+), col (?P<column>\d+)\))?"
)
_QUOTE: Final = '[`"]'
_PLAIN_PLACEHOLDER: Final = re.compile(
    r"\{(\w+):(?:String|U?Int(?:8|16|32|64|128)|Float64|Array\((?:String|U?Int64)\))\}"
)
_SHOW: Final = re.compile(
    rf"\s*SHOW\s+(?:(?:FULL\s+)?TABLES(?:\s+(?:FROM|IN)\s+{_QUOTE}?{DATABASE}{_QUOTE}?)?"
    r"(?:\s+(?:NOT\s+)?I?LIKE\s+'[^'\\]*')?(?:\s+LIMIT\s+\d+)?"
    rf"|CREATE\s+(?:TABLE|VIEW)?\s*(?:{_QUOTE}?{DATABASE}{_QUOTE}?\s*\.\s*)?{_QUOTE}?\w+{_QUOTE}?"
    rf"|COLUMNS\s+(?:FROM|IN)\s+{_QUOTE}?\w+{_QUOTE}?"
    rf"(?:\s+(?:FROM|IN)\s+{_QUOTE}?{DATABASE}{_QUOTE}?)?)\s*(?:FORMAT\s+\w+)?\s*;?\s*\Z",
    re.IGNORECASE,
)
_SHOW_DATABASES: Final = re.compile(r"\s*SHOW\s+DATABASES\s*(?:FORMAT\s+\w+)?\s*;?\s*\Z", re.IGNORECASE)
_NATURAL: Final = re.compile(r"\bNATURAL\b", re.IGNORECASE)
_LINE: Final = re.compile(r" *(?P<node>[A-Za-z:]+)(?: (?P<rest>.*))?\Z", re.DOTALL)
_SUFFIX: Final = re.compile(r"(?: \(alias .*?\))?(?: \(children \d+\))?\Z", re.DOTALL)
_WORD: Final = re.compile(r"\w+\Z")
_TABLE_NAME: Final = re.compile(r"\w+(?:\.\w+)?\Z")


@dataclass(frozen=True, slots=True)
class Approved:
    """A statement that may run."""

    sql: str
    format: str | None
    """Output format that the statement itself names, in the engine's spelling."""
    is_select: bool
    """A SELECT, so that `DESCRIBE` tells its columns; otherwise SHOW, DESCRIBE, EXISTS or EXPLAIN."""


class Memory:
    """Verdicts of `check` that were yes. They depend on the text and its parameters alone, not on what the store holds,
    and asking the engine for its parse costs as much as a small query. Any thread.

    Values count only where they could be names: what a placeholder of a plain type stands for is a literal, whatever
    it says, and `check` looks at no literal.
    """

    def __init__(self, max_entries: int = 256, max_chars: int = 20_000) -> None:
        self._max_entries = max_entries
        self._max_chars = max_chars
        self._approved: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], Approved] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, session: Session, sql: str, parameters: Mapping[str, str]) -> Approved:
        """`check`, asked once for the same text and parameters.

        Raises:
            Refused, EngineQueryError: see `check`.
        """
        key = (sql, () if _is_plain(sql, parameters) else tuple(sorted(parameters.items())))
        with self._lock:
            known = self._approved.get(key)
            if known is not None:
                self._approved.move_to_end(key)
                return known
        approved = check(session, sql, parameters)
        if len(sql) + sum(len(value) for value in parameters.values()) <= self._max_chars:
            with self._lock:
                self._approved[key] = approved
                if len(self._approved) > self._max_entries:
                    self._approved.popitem(last=False)
        return approved


def _is_plain(sql: str, parameters: Mapping[str, str]) -> bool:
    """Whether every parameter that `sql` could use stands in it with a plain type, and so for a literal."""
    if "`" in sql or "\\" in sql or "identifier" in sql.lower():
        return False
    return parameters.keys() <= {found[1] for found in _PLAIN_PLACEHOLDER.finditer(sql)}


def check(session: Session, sql: str, parameters: Mapping[str, str]) -> Approved:
    """Decide on one statement; `session` is a reader's, and `parameters` those that it would run with.

    Raises:
        Refused: it may not run; the message names what is not allowed.
        EngineQueryError: it does not parse. The session must be closed then.
    """
    if len(sql) > MAX_SQL_CHARS:
        raise Refused(f"the statement has {len(sql)} characters; readers may send {MAX_SQL_CHARS}", 62)
    if "\0" in sql:
        raise Refused("the statement holds a NUL character", 62)
    found = session.classify(sql)
    if found.statements > 1:
        raise Refused("readers may send one statement at a time", 62)
    if found.statements == 1 and found.kind != "READ_ONLY":
        raise Refused("readers may only read: SELECT, WITH, SHOW TABLES, DESCRIBE, EXISTS and EXPLAIN", _READONLY)
    # A text that does not parse is left to EXPLAIN, for its message; it cannot run.
    try:
        tree = session.query(_EXPLAIN + sql, "TSVRaw", parameters).data.decode("utf-8", "replace")
    except EngineQueryError as exc:
        raise EngineQueryError(_without_prefix(str(exc)), exc.code) from None
    if found.statements != 1:
        raise Refused("the statement cannot be classified", 62)
    lines = tree.split("\n")
    root = lines[0].split(" ", 1)[0]
    for number, line in enumerate(lines):
        # EXPLAIN's own options (indexes = 1) say how to print; they stand in the second line and nowhere else.
        if line and not (number == 1 and line == " Set" and root == "Explain"):
            _check_line(line)
            if line.lstrip(" ").startswith("Function ") and lines[number - 1].lstrip(" ").startswith("TableExpression"):
                _check_table_function(line)
    _check_places(lines, sql)
    if root.startswith("Show") and not (_SHOW.match(sql) or _SHOW_DATABASES.match(sql)):
        raise _denied("this form of SHOW")
    return Approved(sql, _format(lines), root == "SelectWithUnionQuery")


def _without_prefix(message: str) -> str:
    """A syntax error's position in the text that was sent, not in what was made of it."""
    found = _POSITION.search(message)
    if found is None:
        return message
    position, line, column = int(found["position"]), found["line"], int(found["column"] or 0)
    place = f"position {position - len(_EXPLAIN)}{found['token'] or ''}"
    if line is not None:
        place += f" (line {line}, col {column - len(_EXPLAIN) if line == '1' else column})"
    return message[: found.start()] + place + message[found.end() :]


def check_database(name: str | None) -> str:
    """The database that unqualified names mean, for a reader's request that names `name`.

    Raises:
        Refused: any other than ours; `default` means ours.
    """
    if name is None or name in ("default", DATABASE):
        return DATABASE
    raise Refused(f"database {name!r} may not be read; the database here is {DATABASE!r}", _ACCESS_DENIED)


def check_format(name: str) -> str:
    """The engine's spelling of output format `name`.

    Raises:
        Refused: not one that readers may ask for.
    """
    found = readable_format(name)
    if found is None:
        raise Refused(f"output format {name!r} is unknown or not available to readers", _UNKNOWN_FORMAT)
    return found


def _denied(what: str) -> Refused:
    return Refused(f"{what} is not available to readers", _ACCESS_DENIED)


def _check_line(line: str) -> None:
    match = _LINE.match(line)
    if match is None:
        raise _denied("an identifier with a line break")
    node, rest = match["node"], match["rest"] or ""
    text = _SUFFIX.sub("", rest) if not rest.startswith("(") else ""
    if node not in _NODES:
        raise _denied(_NODE_NAMES.get(node, node))
    if node == "Function":
        _check_function(text)
    elif node in ("Identifier", "TableIdentifier"):
        _check_identifier(text, table=node == "TableIdentifier")
    elif node == "Explain" and text not in _EXPLAIN_KINDS:
        raise _denied(text or "this form of EXPLAIN")
    elif node in ("ExistsTableQuery", "ExistsViewQuery", "ShowCreateTableQuery", "ShowCreateViewQuery"):
        database, _, _ = text.strip().rpartition(" ")
        if database.strip() not in ("", DATABASE):
            raise _denied(f"database {database.strip()}")


_NODE_NAMES: Final = {
    "ColumnsApplyTransformer": "APPLY",
    "Set": "a SETTINGS clause (send settings as URL parameters)",
}


def _check_function(name: str) -> None:
    if _WORD.match(name) is None:
        raise _denied(f"function {name!r}")
    lowered = name.lower()
    if lowered in _functions() or lowered in _TABLE_FUNCTIONS or lowered in _OPERATORS:
        return
    base = name
    while True:
        suffix = next((end for end in _COMBINATORS if base.endswith(end) and len(base) > len(end)), None)
        if suffix is None:
            raise _denied(f"function {name!r}")
        base = base[: -len(suffix)]
        if base.lower() in _functions():
            return


def _check_table_function(line: str) -> None:
    """For the names that are a harmless function and a table function too, such as `format`."""
    name = line.lstrip(" ").split(" ")[1]
    if name.lower() not in _TABLE_FUNCTIONS:
        raise _denied(f"table function {name!r}")


def _check_places(lines: list[str], sql: str) -> None:
    """Where a table that tells where files lie is read: neither those columns nor a star, nor an alias that could join
    with one of them."""
    words = [line.lstrip(" ").partition(" ") for line in lines]
    if not any(word == "TableIdentifier" and _SUFFIX.sub("", rest).lower() in _PLACES for word, _, rest in words):
        return
    if _NATURAL.search(sql):
        raise _denied("NATURAL JOIN with system.tables and system.databases")
    for word, _, rest in words:
        if word in _STARS:
            raise _denied("* of system.tables and system.databases (name the columns)")
        if word != "Literal" and any(column in rest for column in _PLACE_COLUMNS):
            raise _denied("a column that tells where files lie")


def _check_identifier(name: str, *, table: bool) -> None:
    """An identifier may name a column, a table (behind IN), or a function (an argument of a higher-order one)."""
    lowered = name.lower()
    first, dot, _ = lowered.partition(".")
    if dot and first in ("system", "information_schema", "default", "_temporary_and_external_tables"):
        parts = lowered.split(".")
        of_table = not table and len(parts) == 3 and ".".join(parts[:2]) in _CATALOGUE
        if not of_table and (not table or lowered not in _SYSTEM_TABLES | _CATALOGUE):
            raise _denied(f"database {first!r}")
    elif table and (_TABLE_NAME.match(name) is None or (dot and first != DATABASE)):
        # The engine opens a file where a table's name looks like a path.
        raise _denied(f"table {name!r}")
    if not dot and lowered in _forbidden_functions():
        raise _denied(f"function {name!r}, or a column of that name without its table's,")


def _format(lines: list[str]) -> str | None:
    """The output format: the one identifier right below the root."""
    for line in lines[1:]:
        if line.startswith(" Identifier "):
            if lines[0].startswith(("Show", "Exists")):
                continue
            return check_format(_SUFFIX.sub("", line.removeprefix(" Identifier ")))
    return None


@cache
def _functions() -> frozenset[str]:
    return _names("functions_allowed.txt")


@cache
def _forbidden_functions() -> frozenset[str]:
    return _names("functions_denied.txt")


def _names(file: str) -> frozenset[str]:
    text = files(__package__).joinpath(file).read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return frozenset(name.lower() for line in lines for name in line.split())


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of one reader's query; a request may ask for less."""

    max_execution_seconds: float = 60.0
    max_memory_bytes: int = 1_500_000_000
    max_result_rows: int = 100_000_000
    max_threads: int = min(8, os.cpu_count() or 1)
    """More threads than processors cost a small query a quarter of its time."""
    max_buffered_result_bytes: int = 512 * 1024 * 1024
    """Results in formats that must be made in one piece."""


class SettingsPolicy:
    """Which query settings a reader's request may carry."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._bounds: dict[str, float] = {
            "max_execution_time": self.limits.max_execution_seconds,
            "max_memory_usage": self.limits.max_memory_bytes,
            "max_result_rows": self.limits.max_result_rows,
            "max_threads": self.limits.max_threads,
        }

    def apply(self, asked: Mapping[str, str]) -> dict[str, str]:
        """The settings a reader's query runs with: our bounds, and what was asked for within them.

        Raises:
            Refused: a setting that readers may not set, or a value that is none.
        """
        settings = {name: f"{bound:g}" if bound < 1e6 else str(int(bound)) for name, bound in self._bounds.items()}
        settings |= {"result_overflow_mode": "throw", "timeout_overflow_mode": "throw"}
        for name, value in asked.items():
            if name in self._bounds:
                settings[name] = self._bounded(name, value)
            elif name in _READER_SETTINGS:
                if len(value) > 200:
                    raise Refused(f"the value of setting {name} is too long", _SETTING_REFUSED)
                settings[name] = value
            elif name in _FIXED and value in _FIXED[name]:
                continue
            else:
                raise Refused(f"setting {name!r} may not be set by readers", _SETTING_REFUSED)
        return settings

    def writable(self) -> frozenset[str]:
        """Names that `apply` takes."""
        return _READER_SETTINGS | self._bounds.keys() | _FIXED.keys()

    def _bounded(self, name: str, value: str) -> str:
        try:
            number = float(value)
        except ValueError:
            raise Refused(f"setting {name} takes a number, not {value!r}", _SETTING_REFUSED) from None
        bound = self._bounds[name]
        if not number >= 0:  # nan is not
            raise Refused(f"setting {name} takes a number from 0 on, not {value!r}", _SETTING_REFUSED)
        # 0 is the engine's "unlimited"; drivers ask for their own patience and 5 s more. Both get as much as there is.
        if number == 0 or number >= bound:
            return f"{bound:g}" if bound < 1e6 else str(int(bound))
        return value


_FIXED: Final[Mapping[str, tuple[str, ...]]] = {
    # Drivers send it to be safe; the connection is closed anyway.
    "readonly": ("0", "1", "2"),
    # JDBC's own, with each statement; readers insert nothing.
    "async_insert": ("0", "1"),
    "wait_for_async_insert": ("0", "1"),
    # A result beyond its limit is an error here, never a shorter result.
    "result_overflow_mode": ("throw",),
    "timeout_overflow_mode": ("throw",),
}
"""Settings that may be sent with these values alone, which change nothing."""

_READER_SETTINGS: Final = frozenset(
    {
        "aggregate_functions_null_for_empty",
        "allow_experimental_analyzer",
        "allow_suspicious_low_cardinality_types",
        "cast_keep_nullable",
        "count_distinct_implementation",
        "data_type_default_nullable",
        "date_time_input_format",
        "date_time_output_format",
        "date_time_overflow_behavior",
        "distinct_overflow_mode",
        "empty_result_for_aggregation_by_empty_set",
        "final",
        "group_by_overflow_mode",
        "group_by_use_nulls",
        "join_algorithm",
        "join_default_strictness",
        "join_use_nulls",
        "limit",
        "max_block_size",
        "max_bytes_to_read",
        "max_columns_to_read",
        "max_result_bytes",
        "max_rows_to_group_by",
        "max_rows_to_read",
        "max_rows_to_sort",
        "offset",
        "optimize_read_in_order",
        "output_format_arrow_compression_method",
        "output_format_arrow_fixed_string_as_fixed_byte_array",
        "output_format_arrow_low_cardinality_as_dictionary",
        "output_format_arrow_string_as_string",
        "output_format_arrow_use_64_bit_indexes_for_dictionary",
        "output_format_arrow_use_signed_indexes_for_dictionary",
        "output_format_binary_write_json_as_string",
        "output_format_csv_crlf_end_of_line",
        "output_format_decimal_trailing_zeros",
        "output_format_json_array_of_rows",
        "output_format_json_escape_forward_slashes",
        "output_format_json_named_tuples_as_objects",
        "output_format_json_quote_64bit_floats",
        "output_format_json_quote_64bit_integers",
        "output_format_json_quote_decimals",
        "output_format_json_quote_denormals",
        "output_format_native_encode_types_in_binary_format",
        "output_format_native_write_json_as_string",
        "output_format_parquet_compression_method",
        "output_format_parquet_row_group_size",
        "output_format_parquet_string_as_string",
        "output_format_pretty_color",
        "output_format_pretty_max_rows",
        "output_format_tsv_crlf_end_of_line",
        "output_format_write_statistics",
        "prefer_column_name_to_alias",
        "read_overflow_mode",
        "session_timezone",
        "short_circuit_function_evaluation",
        "totals_mode",
        "transform_null_in",
        "union_default_mode",
        "use_query_condition_cache",
    }
)
"""Settings that change how a result is made or written, and nothing else."""
