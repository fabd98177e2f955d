"""MLflow's rules for names, values and batches, with MLflow's sentences. Lengths are characters.

The limits on values and batch sizes are MLflow's own here (REST clients rely on them), narrower than ours.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Final

from runstream_schemas.limits import MAX_TIME_MS

from .errors import ApiError, invalid
from .wire import invalid_value

MAX_KEY_CHARS: Final = 250
MAX_PARAM_VALUE_CHARS: Final = 6_000
MAX_TAG_VALUE_CHARS: Final = 8_000
MAX_EXPERIMENT_NAME_CHARS: Final = 500
MAX_EXPERIMENT_TAG_VALUE_CHARS: Final = 20_000
MAX_ARTIFACT_LOCATION_CHARS: Final = 2_048
MAX_BATCH_METRICS: Final = 1_000
MAX_BATCH_PARAMS_TAGS: Final = 100
MAX_BATCH_ENTITIES: Final = 1_000
MAX_SEARCH_RESULTS: Final = 50_000
MAX_DATASET_NAME_CHARS: Final = 500
MAX_DATASET_DIGEST_CHARS: Final = 36
MAX_DATASET_SOURCE_CHARS: Final = 65_535
MAX_DATASET_SCHEMA_CHARS: Final = 1_048_575
MAX_DATASET_PROFILE_CHARS: Final = 16_777_215
MAX_INPUT_TAG_KEY_CHARS: Final = 255
MAX_INPUT_TAG_VALUE_CHARS: Final = 500
MAX_DOUBLE: Final = 1.7976931348623157e308

_NAME = re.compile(r"[/\w.\- :]*\Z")
_RUN_ID = re.compile(r"[a-zA-Z0-9][\w\-]{0,255}\Z")
_BAD_CHARACTERS: Final = (
    "Names may only contain alphanumerics, underscores (_), dashes (-), periods (.),"
    " spaces ( ), colon(:) and slashes (/)."
)
_SAFE_NAMES: dict[str, None] = {}
"""Names that have passed, so that the hot path pays for each once; bounded."""


def check_name(name: str, path: str) -> None:
    """A metric, param or tag name must have legal characters and be its own normal form as a path."""
    if name in _SAFE_NAMES:
        return
    if _NAME.match(name) is None:
        raise invalid(invalid_value(path, name, _BAD_CHARACTERS))
    normal = posixpath.normpath(name)
    if normal != name or normal == "." or normal.startswith(("..", "/")):
        raise invalid(
            invalid_value(
                path,
                name,
                "Names may be treated as files in certain cases, and must not resolve to other names"
                f" when treated as such. This name would resolve to {normal!r}",
            )
        )
    if len(_SAFE_NAMES) >= 20_000:
        _SAFE_NAMES.clear()
    if len(name) <= MAX_KEY_CHARS:
        _SAFE_NAMES[name] = None


def is_safe_name(name: str) -> bool:
    """Whether a name is known to have passed `check_name` and to be no longer than `MAX_KEY_CHARS`; notes new ones."""
    if name not in _SAFE_NAMES:
        try:
            check_name(name, "")
        except ApiError:
            return False
    return name in _SAFE_NAMES


def check_length(what: str, limit: int, value: str) -> None:
    """Refuse `value` above `limit` characters."""
    if len(value) > limit:
        raise invalid(f"'{what}' exceeds the maximum length of {limit} characters")


def check_metric(key: str, value: float, timestamp: int, step: int, path: str = "") -> None:
    """A metric's name, time and length; types are the wire's matter."""
    prefix = f"{path}." if path else ""
    check_name(key, f"{prefix}name")
    if not 0 <= timestamp < MAX_TIME_MS:
        raise invalid(
            invalid_value(
                f"{prefix}timestamp",
                timestamp,
                f"metric '{key}' (value={value}). Timestamp must be a nonnegative long (64-bit integer)"
                " of milliseconds before the year 2262",
            )
        )
    check_length("Metric name", MAX_KEY_CHARS, key)


def clean_param(key: str, value: str, path: str = "") -> tuple[str, str]:
    """The param as it is stored: a value above MLflow's limit is cut, as MLflow's server cuts it by default."""
    check_name(key, f"{path}.key" if path else "key")
    check_length("Param key", MAX_KEY_CHARS, key)
    return key, value[:MAX_PARAM_VALUE_CHARS]


def clean_tag(key: str, value: str, path: str = "") -> tuple[str, str]:
    """The run tag as it is stored: a value above MLflow's limit is cut."""
    where = f"{path}.key" if path else "key"
    check_name(key, where)
    check_length(where, MAX_KEY_CHARS, key)
    return key, value[:MAX_TAG_VALUE_CHARS]


def check_experiment_tag(key: str, value: str) -> None:
    """An experiment tag is refused above its limits, not cut."""
    check_name(key, "key")
    check_length("key", MAX_KEY_CHARS, key)
    check_length("value", MAX_EXPERIMENT_TAG_VALUE_CHARS, value)


def check_experiment_name(name: str | None) -> None:
    """An experiment's name is neither empty nor too long."""
    if not name:
        raise invalid(f"Invalid experiment name: '{name or ''}'")
    check_length("name", MAX_EXPERIMENT_NAME_CHARS, name)


def check_run_id(run_id: str) -> None:
    """A run id has MLflow's form."""
    if _RUN_ID.match(run_id) is None:
        raise invalid(invalid_value("run_id", run_id))


def _check_count(what: str, limit: int, count: int) -> None:
    if count > limit:
        raise invalid(
            f"A batch logging request can contain at most {limit} {what}. Got {count} {what}."
            f" Please split up {what} across multiple requests and try again."
        )


def check_batch(metrics: int, params: int, tags: int) -> None:
    """The sizes of one log-batch."""
    _check_count("metrics", MAX_BATCH_METRICS, metrics)
    _check_count("params", MAX_BATCH_PARAMS_TAGS, params)
    _check_count("tags", MAX_BATCH_PARAMS_TAGS, tags)
    _check_count("metrics, params, and tags", MAX_BATCH_ENTITIES, metrics + params + tags)


def check_unique_params(params: Sequence[tuple[str, str]]) -> None:
    """One log-batch names each param once."""
    seen: set[str] = set()
    twice = [key for key, _ in params if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    if twice:
        raise invalid(
            f"Duplicate parameter keys have been submitted: {twice}. Please ensure "
            "the request contains only one param value per param key."
        )


def check_max_results(max_results: int, limit: int = MAX_SEARCH_RESULTS) -> None:
    """A page has at least one and at most `limit` entries."""
    if max_results < 1:
        raise invalid(
            f"Invalid value {max_results} for parameter 'max_results' supplied. It must be a positive integer"
        )
    if max_results > limit:
        raise invalid(f"Invalid value {max_results} for parameter 'max_results' supplied. It must be at most {limit}")


def check_experiment_id(experiment_id: str) -> str:
    """Experiment ids are decimal."""
    try:
        return str(int(experiment_id))
    except ValueError:
        raise invalid(f"Invalid experiment ID '{experiment_id}'. Experiment ID must be a valid integer.") from None


def clamp(value: float) -> float:
    """Infinities as the largest doubles (MLflow's rule), one zero."""
    if value > MAX_DOUBLE:
        return MAX_DOUBLE
    if value < -MAX_DOUBLE:
        return -MAX_DOUBLE
    return value + 0.0


_MODEL_NAME_BAD: Final = ("/", ":", ".", "%", '"', "'")


def check_model_name(name: str | None) -> None:
    """A logged model's name, where one is given."""
    if name is None:
        return
    if not name or any(character in name for character in _MODEL_NAME_BAD):
        raise invalid(
            f"Invalid model name ({name!r}) provided. Model name must be a non-empty string "
            f"and cannot contain the following characters: {_MODEL_NAME_BAD}"
        )
