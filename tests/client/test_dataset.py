"""Data sets: digests that follow the content, schemas, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from runstream.dataset import dataset_of, describe, from_numpy, from_pandas
from runstream.entities import Dataset
from runstream.errors import InvalidInputError


def frame() -> pd.DataFrame:
    return pd.DataFrame({"x": [1.0, 2.0, 3.0], "label": ["a", "b", "a"]})


def test_pandas() -> None:
    """Columns, types, counts, source and a digest."""
    found = from_pandas(frame(), "s3://bucket/wine.csv", targets="label", name="wine")
    assert (found.name, found.source, found.source_type) == ("wine", "s3://bucket/wine.csv", "s3")
    schema = json.loads(found.schema or "")
    assert schema["columns"][0] == {"name": "x", "type": "float64"}
    assert schema["targets"] == "label"
    assert json.loads(found.profile or "") == {"num_rows": 3, "num_columns": 2, "num_elements": 6}
    assert len(found.digest) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda df: df.assign(x=[1.0, 2.0, 4.0]),
        lambda df: df.rename(columns={"x": "y"}),
        lambda df: df.astype({"x": "float32"}),
        lambda df: df.iloc[::-1],
        lambda df: df.iloc[:2],
    ],
    ids=["value", "column", "type", "order", "length"],
)
def test_every_change_changes_the_digest(change: Any) -> None:
    """Same content, same digest; any other content, another."""
    assert from_pandas(frame()).digest == from_pandas(frame()).digest
    assert from_pandas(frame()).digest != from_pandas(change(frame())).digest


def test_frames_with_unhashable_cells_have_a_digest() -> None:
    """Lists in cells are read as text."""
    one, two = pd.DataFrame({"x": [[1], [2]]}), pd.DataFrame({"x": [[1], [3]]})
    assert from_pandas(one).digest != from_pandas(two).digest


def test_numpy() -> None:
    """Arrays and dicts of arrays, with shape and type."""
    found = from_numpy({"image": np.zeros((2, 3)), "age": np.zeros(2, int)}, targets=np.ones(2), name="n")
    assert json.loads(found.schema or "")["features.image"] == {"shape": [2, 3], "type": "float64"}
    assert "targets" in json.loads(found.schema or "")
    assert from_numpy(np.zeros(6)).digest != from_numpy(np.zeros((2, 3))).digest
    assert from_numpy(np.zeros(6)).digest != from_numpy(np.zeros(6, np.float32)).digest
    assert from_numpy(np.array(["a", None], object)).digest != from_numpy(np.array(["b", None], object)).digest


def test_huge_arrays_are_sampled() -> None:
    """Beyond 64 MiB the ends count, and the shape."""
    huge = np.zeros(9 << 20)
    before = from_numpy(huge).digest
    huge[-1] = 1
    assert from_numpy(huge).digest != before


def test_dataset_of_takes_what_people_have() -> None:
    """A Dataset, a frame, an array, or MLflow's own object."""
    ours = describe("mine", "abc")
    assert dataset_of(ours) is ours
    assert dataset_of(frame(), "named").name == "named"
    assert dataset_of(np.zeros(2)).name == "dataset"

    class Foreign:
        name, digest, source = "theirs", "d1", "s"

        def to_dict(self) -> dict[str, str]:
            return {"name": "theirs", "digest": "d1", "source": "{}", "source_type": "code", "schema": "{}"}

    assert dataset_of(Foreign()) == Dataset("theirs", "d1", "code", "{}", "{}", None)


def test_described_data_sets_get_a_digest() -> None:
    """Without one given, the description itself is digested."""
    assert describe("a").digest != describe("b").digest
    assert describe("a", schema={"x": np.int64(3)}).schema == '{"x": 3}'


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("https://x/y", "http"),
        ("file:///x", "local"),
        ("/data/x", "local"),
        ("gs://b", "gcs"),
        ("sklearn.datasets.load_wine", "code"),
    ],
)
def test_the_source_type_is_guessed(source: str, kind: str) -> None:
    """From the scheme or the path."""
    assert describe("a", source=source).source_type == kind


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2], object()], ids=lambda value: type(value).__name__)
def test_what_is_no_data_set_is_refused(value: Any) -> None:
    """The error says what is taken."""
    with pytest.raises(InvalidInputError, match="DataFrame"):
        dataset_of(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "x" * 501},
        {"name": "\ud800"},
        {"name": 3},
        {"name": "a", "digest": "x" * 65},
        {"name": "a", "source": None},
        {"name": "a", "schema": 3},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_odd_descriptions_are_refused(fields: dict[str, Any]) -> None:
    """Empty, huge, wrong type and half surrogates."""
    with pytest.raises(InvalidInputError, match="data set"):
        describe(**fields)


def test_an_unknown_target_is_refused() -> None:
    """A target column must exist."""
    with pytest.raises(InvalidInputError, match="'nope'"):
        from_pandas(frame(), targets="nope")
