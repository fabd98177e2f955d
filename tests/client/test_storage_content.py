"""Objects to bytes: text, dicts, figures, pictures and tables, and what is refused."""

from __future__ import annotations

import io
import json
import math
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from runstream.errors import InvalidInputError, RunstreamError
from runstream.storage.content import (
    dict_bytes,
    figure_bytes,
    image_bytes,
    parse_dict,
    table_bytes,
    table_of,
    text_bytes,
)


def test_text_is_utf8() -> None:
    """Any text that UTF-8 can hold goes through unchanged."""
    assert text_bytes("日本\x00\n").decode() == "日本\x00\n"


@pytest.mark.parametrize("text", [b"bytes", None, 3, "half \ud800 pair"])
def test_what_is_no_text_is_refused(text: Any) -> None:
    """Bytes, numbers and halves of surrogate pairs are errors."""
    with pytest.raises(InvalidInputError):
        text_bytes(text)


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "config.YML", "config"])
def test_dicts_come_back(name: str) -> None:
    """JSON or YAML by the suffix, with numpy values and paths made plain."""
    value = {
        "a": 1,
        "b": [1.5, None, True],
        "c": {"ü": "日"},
        "d": np.float32(0.5),
        "e": np.arange(3),
        "f": Path("x/y"),
        "g": date(2026, 1, 2),
        3: (1, 2),
    }
    back = parse_dict(dict_bytes(value, name), name)
    assert back == {
        "a": 1,
        "b": [1.5, None, True],
        "c": {"ü": "日"},
        "d": 0.5,
        "e": [0, 1, 2],
        "f": "x/y",
        "g": "2026-01-02",
        "3": [1, 2],
    }


def test_json_keeps_nan() -> None:
    """NaN in a dict is written as json.dumps does."""
    assert math.isnan(parse_dict(dict_bytes({"x": float("nan")}, "a.json"), "a.json")["x"])


def test_odd_dicts_are_refused() -> None:
    """Other types, self-containing dicts and half surrogates are clear errors."""
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    for value in ("text", 3, None, loop):
        for name in ("a.json", "a.yaml"):
            with pytest.raises(InvalidInputError):
                dict_bytes(value, name)
    for value in ({"a": "\ud800"}, {"\ud800": 1}):  # YAML escapes these
        with pytest.raises(InvalidInputError):
            dict_bytes(value, "a.json")


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_broken_content_is_an_error_that_names_the_file(name: str) -> None:
    """A file that is neither JSON nor YAML is named."""
    with pytest.raises(InvalidInputError, match=name):
        parse_dict(b"{unclosed: [", name)


def test_matplotlib_figures() -> None:
    """A figure is written in the format of the suffix."""
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2])
    assert figure_bytes(figure, "a.png")[:4] == b"\x89PNG"
    assert figure_bytes(figure, "a.pdf")[:4] == b"%PDF"
    assert figure_bytes(figure, "noname")[:4] == b"\x89PNG"
    with pytest.raises(InvalidInputError, match="xyz"):
        figure_bytes(figure, "a.xyz")


class PlotlyFigure:
    """What log_figure uses of plotly's figure."""

    def to_html(self, **options: Any) -> str:
        return f"<html>{sorted(options)}</html>"

    def to_image(self, format: str, **options: Any) -> bytes:  # noqa: A002 (plotly's name)
        raise ValueError("kaleido is missing")


def test_plotly_figures() -> None:
    """Plotly figures become HTML; pictures say which package draws them."""
    assert figure_bytes(PlotlyFigure(), "a.html").startswith(b"<html>")
    with pytest.raises(InvalidInputError, match="pip install kaleido"):
        figure_bytes(PlotlyFigure(), "a.png")


def test_other_figures_are_refused() -> None:
    """An array is no figure."""
    with pytest.raises(InvalidInputError, match="log_image"):
        figure_bytes(np.zeros((2, 2)), "a.png")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((4, 5, 3), np.int64),
        np.ones((4, 5, 4), np.float32),
        np.ones((4, 5), bool),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_arrays_become_pictures(array: Any, name: str) -> None:
    """Grey, RGB and RGBA, from bool, integer and float pixels."""
    picture = Image.open(io.BytesIO(image_bytes(array, name)))
    assert picture.size == (5, 4)


def test_float_pixels_are_scaled() -> None:
    """1.0 is white."""
    picture = Image.open(io.BytesIO(image_bytes(np.full((2, 2), 1.0), "a.png")))
    assert picture.getpixel((0, 0)) == 255


def test_pillow_images_pass() -> None:
    """A pillow image is saved as it is."""
    assert image_bytes(Image.new("RGBA", (2, 2)), "a.jpg")[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4,)),
        np.zeros((4, 5, 2)),
        np.zeros((0, 5)),
        np.full((2, 2), 300),
        np.full((2, 2), 1.5),
        np.full((2, 2), -1),
        np.full((2, 2), np.nan),
        np.array([["a"]]),
        [[1, 2]],
        None,
    ],
    ids=repr,
)
def test_odd_pictures_are_refused(array: Any) -> None:
    """Wrong shapes, ranges and types are errors that say what is taken."""
    with pytest.raises(InvalidInputError, match="log_image"):
        image_bytes(array, "a.png")


def test_an_unknown_picture_format_is_refused() -> None:
    """A suffix that is no picture is named."""
    with pytest.raises(InvalidInputError, match=r"\.xyz"):
        image_bytes(np.zeros((2, 2)), "a.xyz")


def test_pillow_missing_names_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pillow the error is the line to install it."""
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(RunstreamError, match="pip install pillow"):
        image_bytes(np.zeros((2, 2)), "a.png")


def test_tables_append() -> None:
    """A second table's rows come behind the first's; new columns are empty before."""
    first = table_bytes(table_of({"q": ["a", "b"], "n": [1, 2]}), None, "t.json")
    assert json.loads(first) == {"columns": ["q", "n"], "data": [["a", 1], ["b", 2]]}
    second = table_bytes(table_of(pd.DataFrame({"q": ["c"], "score": [0.5]})), first, "t.json")
    assert json.loads(second) == {
        "columns": ["q", "n", "score"],
        "data": [["a", 1, None], ["b", 2, None], ["c", None, 0.5]],
    }


def test_scalars_make_one_row() -> None:
    """A dict of scalars is a table of one row."""
    assert table_of({"a": 1, "b": "xy"}) == {"a": [1], "b": ["xy"]}
    assert table_of({"a": np.arange(2)}) == {"a": [0, 1]}


def test_odd_tables_are_refused() -> None:
    """Unequal columns and other types are errors; so is appending to what is no table."""
    for data in ({"a": [1], "b": [1, 2]}, [1], "text", None):
        with pytest.raises(InvalidInputError, match="log_table"):
            table_of(data)
    with pytest.raises(InvalidInputError, match="no table"):
        table_bytes({"a": [1]}, b"[1, 2]", "t.json")


def test_yaml_is_safe() -> None:
    """Loading YAML makes no objects."""
    with pytest.raises(InvalidInputError):
        parse_dict(yaml.dump(Path("x")).encode(), "a.yaml")
