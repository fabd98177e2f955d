"""Data sets as inputs of runs: name, digest, source, schema and profile of what a run read.

`from_pandas` and `from_numpy` describe objects without storing them. Digests are SHA-256, cut to 16 hex digits, over
shape, types and content; of more than 64 MiB only the first and the last 32 MiB are read, so that a digest stays quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from runstream_schemas.limits import MAX_DATASET_DIGEST_CHARS, MAX_DATASET_NAME_CHARS, MAX_DATASET_TEXT_CHARS

from .entities import Dataset
from .errors import InvalidInputError
from .storage.content import plain
from .validation import check_text

__all__ = ["CONTEXT_TAG", "dataset_of", "describe", "from_numpy", "from_pandas"]

CONTEXT_TAG: Final = "mlflow.data.context"
"""Tag of the use that says for what: training, validation, test ..."""
_WHOLE_BYTES: Final = 64 << 20
_MAX_COLUMNS: Final = 2_000
"""Columns listed in a schema; the rest is counted."""


def describe(
    name: str,
    digest: str = "",
    source: str = "",
    source_type: str = "",
    schema: Mapping[str, Any] | str | None = None,
    profile: Mapping[str, Any] | str | None = None,
) -> Dataset:
    """A data set in your own words.

    Args:
        digest: identifies the content; left out, it is made from the other fields.
        source: where the data came from: a URI, a path, a query.
        source_type: local, http, s3, code, sql ...; guessed from `source` if left out.
        schema: columns and types, as a dict or as JSON.
        profile: summary statistics, as a dict or as JSON.
    """
    check_text("data set name", name, MAX_DATASET_NAME_CHARS)
    source = check_text("data set source", source, MAX_DATASET_TEXT_CHARS, empty_is_legal=True)
    schema_text, profile_text = _json("schema", schema), _json("profile", profile)
    if not digest:
        parts = "\x00".join((name, source, schema_text or "", profile_text or ""))
        digest = hashlib.sha256(parts.encode("utf-8", "replace")).hexdigest()[:16]
    check_text("data set digest", digest, MAX_DATASET_DIGEST_CHARS)
    kind = check_text("data set source type", source_type, 250, empty_is_legal=True) or _source_type(source)
    return Dataset(name, digest, kind, source, schema_text, profile_text)


def from_pandas(
    df: Any, source: str = "", targets: str | None = None, name: str = "dataset", digest: str | None = None
) -> Dataset:
    """The data set in a pandas DataFrame."""
    if not (hasattr(df, "dtypes") and hasattr(df, "columns") and hasattr(df, "to_dict")):
        raise InvalidInputError(f"from_pandas takes a pandas DataFrame, not {type(df).__name__}")
    columns = [str(column) for column in df.columns]
    if targets is not None and targets not in columns:
        raise InvalidInputError(f"target {targets!r} is no column; the columns are {columns[:20]}")
    schema: dict[str, Any] = {
        "columns": [
            {"name": column, "type": str(kind)} for column, kind in zip(columns[:_MAX_COLUMNS], df.dtypes, strict=False)
        ]
    }
    if targets is not None:
        schema["targets"] = targets
    rows = len(df)
    profile = {"num_rows": rows, "num_columns": len(columns), "num_elements": rows * len(columns)}
    return describe(name, digest or _pandas_digest(df, columns), source, "", schema, profile)


def from_numpy(
    features: Any, source: str = "", targets: Any = None, name: str = "dataset", digest: str | None = None
) -> Dataset:
    """The data set in a numpy array, or a dict of arrays; `targets` likewise."""
    arrays = {**_named("features", features), **({} if targets is None else _named("targets", targets))}
    schema = {label: {"shape": list(array.shape), "type": str(array.dtype)} for label, array in arrays.items()}
    profile = {label: {"size_bytes": int(array.nbytes)} for label, array in arrays.items()}
    if digest is None:
        sha = hashlib.sha256()
        for label, array in arrays.items():
            sha.update(f"{label} {array.shape} {array.dtype}".encode())
            _feed(sha, array)
        digest = sha.hexdigest()[:16]
    return describe(name, digest, source, "", schema, profile)


def dataset_of(value: Any, name: str | None = None, source: str = "") -> Dataset:
    """`value` as a data set: one already, a DataFrame, an array, or a data set object of another library.

    Raises:
        InvalidInputError: it is none of these.
    """
    if isinstance(value, Dataset):
        return value
    if hasattr(value, "dtypes") and hasattr(value, "columns") and hasattr(value, "to_dict"):
        return from_pandas(value, source, name=name or "dataset")
    if hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "nbytes"):
        return from_numpy(value, source, name=name or "dataset")
    if all(hasattr(value, each) for each in ("name", "digest", "source")) and callable(getattr(value, "to_dict", None)):
        return _foreign(value)  # MLflow's own data set objects
    raise InvalidInputError(
        f"a data set must be a Dataset, a pandas DataFrame or a numpy array, not {type(value).__name__}: "
        "or give name=, digest= and source="
    )


def _foreign(value: Any) -> Dataset:
    fields = value.to_dict()
    return describe(
        str(fields.get("name") or "dataset"),
        str(fields.get("digest") or ""),
        str(fields.get("source") or ""),
        str(fields.get("source_type") or ""),
        fields.get("schema"),
        fields.get("profile"),
    )


def _named(label: str, value: Any) -> dict[str, Any]:
    arrays = {f"{label}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {label: value}
    for key, array in arrays.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype") and hasattr(array, "nbytes")):
            raise InvalidInputError(f"{key}: from_numpy takes numpy arrays, not {type(array).__name__}")
    return arrays


def _pandas_digest(df: Any, columns: list[str]) -> str:
    from pandas.util import hash_pandas_object

    sha = hashlib.sha256(json.dumps([len(df), columns, [str(kind) for kind in df.dtypes]]).encode())
    size = int(df.memory_usage(index=True, deep=False).sum())
    if size > _WHOLE_BYTES:
        rows = max(1, len(df) * (_WHOLE_BYTES // 2) // size)
        parts = [df.iloc[:rows], df.iloc[-rows:]]
    else:
        parts = [df]
    for part in parts:
        try:
            sha.update(hash_pandas_object(part, index=True).to_numpy().tobytes())
        except TypeError:  # cells that cannot be hashed: lists, dicts, arrays
            sha.update(part.astype(str).to_csv().encode("utf-8", "replace"))
    return sha.hexdigest()[:16]


def _feed(sha: Any, array: Any) -> None:
    if getattr(array.dtype, "hasobject", False):
        sha.update(repr(array.tolist()).encode("utf-8", "replace"))
        return
    if array.nbytes <= _WHOLE_BYTES:
        sha.update(array.tobytes())
        return
    flat = array.reshape(-1)
    count = (_WHOLE_BYTES // 2) // array.dtype.itemsize
    sha.update(flat[:count].tobytes())
    sha.update(flat[-count:].tobytes())


def _json(what: str, value: Mapping[str, Any] | str | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        value = json.dumps(plain(value), ensure_ascii=False)
    return check_text(f"data set {what}", value, MAX_DATASET_TEXT_CHARS)


def _source_type(source: str) -> str:
    scheme, mark, _ = source.partition("://")
    if mark:
        return {"https": "http", "file": "local", "gs": "gcs"}.get(scheme, scheme)
    return "local" if source.startswith(("/", "./", "../")) else "code"
