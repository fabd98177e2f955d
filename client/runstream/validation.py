"""Checks of what users pass in, against `runstream_schemas.limits`. Each error names thing, limit and remedy.

Metrics are not checked here: their check lies on the slow path of the recorder, away from the hot one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from runstream_schemas.limits import (
    KEY_PATTERN,
    MAX_BATCH_PARAMS,
    MAX_BATCH_TAGS,
    MAX_EXPERIMENT_ID_CHARS,
    MAX_EXPERIMENT_TAG_VALUE_CHARS,
    MAX_KEY_CHARS,
    MAX_NAME_CHARS,
    MAX_PARAM_VALUE_CHARS,
    MAX_RUN_ID_CHARS,
    MAX_TAG_VALUE_CHARS,
    MAX_TIME_MS,
    RUN_ID_PATTERN,
    RUN_STATUSES,
)

from .errors import InvalidInputError

__all__ = [
    "check_experiment_id",
    "check_experiment_name",
    "check_experiment_tags",
    "check_key",
    "check_params",
    "check_run_id",
    "check_run_name",
    "check_status",
    "check_tags",
    "check_text",
    "check_time_ms",
]

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def check_text(
    what: str, value: object, max_chars: int, *, empty_is_legal: bool = False, one_line: bool = False
) -> str:
    """`value` if it is a str that fits; `what` names it in the error.

    Raises:
        InvalidInputError: no str, empty, too long, with half of a surrogate pair, or (`one_line`) a control character.
    """
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} must be a str, not {type(value).__name__}: {_short(value)}")
    if not value and not empty_is_legal:
        raise InvalidInputError(f"{what} is empty: give at least one character")
    if len(value) > max_chars:
        raise InvalidInputError(
            f"{what} {_short(value)} has {len(value):,} characters; the limit is {max_chars:,}: "
            "shorten it, or log it with log_text"
        )
    lone = _SURROGATE.search(value)
    if lone:
        raise InvalidInputError(
            f"{what} {_short(value)} has half of a surrogate pair at {lone.start()}, which UTF-8 cannot hold: "
            "decode the text with errors='replace'"
        )
    if one_line and _CONTROL.search(value):
        raise InvalidInputError(f"{what} {_short(value)} has a control character: remove it")
    return value


def check_key(what: str, key: object) -> str:
    """A metric, param or tag key."""
    text = check_text(what, key, MAX_KEY_CHARS)
    if not KEY_PATTERN.match(text):
        raise InvalidInputError(
            f"{what} {_short(text)} has a character that keys may not have: use letters, digits, spaces and "
            "_-.:/+*=@%#()[]<>|,&^~!$"
        )
    return text


def check_params(params: object) -> dict[str, str]:
    """Params as they are stored: every value through `str`."""
    checked: dict[str, str] = {}
    for key, value in _items("params", params, MAX_BATCH_PARAMS):
        name = check_key("param key", key)
        checked[name] = check_text(
            f"value of param {name!r}", _as_text(value), MAX_PARAM_VALUE_CHARS, empty_is_legal=True
        )
    return checked


def check_tags(tags: object, what: str = "tag", max_chars: int = MAX_TAG_VALUE_CHARS) -> dict[str, str]:
    """Tags as they are stored: every value through `str`."""
    checked: dict[str, str] = {}
    for key, value in _items(f"{what}s", tags, MAX_BATCH_TAGS):
        name = check_key(f"{what} key", key)
        checked[name] = check_text(f"value of {what} {name!r}", _as_text(value), max_chars, empty_is_legal=True)
    return checked


def check_experiment_tags(tags: object) -> dict[str, str]:
    """Experiment tags as they are stored."""
    return check_tags(tags, "experiment tag", MAX_EXPERIMENT_TAG_VALUE_CHARS)


def check_run_id(run_id: object) -> str:
    """A run id: ours or a foreign one that MLflow would take too."""
    if not isinstance(run_id, str):
        raise InvalidInputError(f"run id must be a str, not {type(run_id).__name__}")
    if not RUN_ID_PATTERN.match(run_id):
        raise InvalidInputError(
            f"run id {_short(run_id)} is not legal: letters, digits, _ and -, at most {MAX_RUN_ID_CHARS}, and no "
            "_ or - at the start"
        )
    return run_id


def check_experiment_id(experiment_id: object) -> str:
    """An experiment id: a str, or an int for MLflow's sake."""
    if isinstance(experiment_id, int) and not isinstance(experiment_id, bool):
        experiment_id = str(experiment_id)
    text = check_text("experiment id", experiment_id, MAX_EXPERIMENT_ID_CHARS)
    if not re.fullmatch(r"[\w\-]+", text, re.ASCII):
        raise InvalidInputError(f"experiment id {_short(text)} is not legal: take it from get_experiment_by_name")
    return text


def check_experiment_name(name: object) -> str:
    """An experiment name: one line of at most 500 characters, not only blanks."""
    text = check_text("experiment name", name, MAX_NAME_CHARS, one_line=True)
    if not text.strip():
        raise InvalidInputError("experiment name has only blanks: give a name that can be read")
    return text


def check_run_name(name: object) -> str:
    """A run name: one line of at most 500 characters."""
    return check_text("run name", name, MAX_NAME_CHARS, one_line=True)


def check_status(status: object) -> str:
    """One of the run statuses."""
    text = str(status) if isinstance(status, str) else status
    if not isinstance(text, str) or text not in RUN_STATUSES:
        raise InvalidInputError(f"status {_short(status)} is not one of {', '.join(RUN_STATUSES)}")
    return text


def check_time_ms(what: str, value: object) -> int:
    """A time in UTC milliseconds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"{what} must be an int of UTC milliseconds, not {type(value).__name__}")
    if not 0 <= value < MAX_TIME_MS:
        raise InvalidInputError(f"{what} {value} lies outside [0, {MAX_TIME_MS}): give UTC milliseconds since 1970")
    return value


def _items(what: str, mapping: object, limit: int) -> Iterable[tuple[Any, Any]]:
    if not isinstance(mapping, Mapping):
        raise InvalidInputError(f"{what} must be a dict, not {type(mapping).__name__}")
    if len(mapping) > limit:
        raise InvalidInputError(f"{len(mapping):,} {what} in one call; the limit is {limit:,}: use several calls")
    return mapping.items()


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    try:
        return str(value)
    except Exception as exc:  # whatever a foreign __str__ does
        raise InvalidInputError(f"a value of type {type(value).__name__} cannot be turned into text: {exc}") from exc


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # whatever a foreign __repr__ does
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:76]} ..."
