"""Turns Python objects into the bytes of an artifact: text, dict, figure, image, table. Moves nothing.

Foreign objects are recognised by what they can do, so neither numpy, pandas, matplotlib nor pillow is needed unless
such an object is given.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..errors import InvalidInputError, MissingExtraError

__all__ = ["dict_bytes", "figure_bytes", "image_bytes", "parse_dict", "plain", "table_bytes", "table_of", "text_bytes"]

Table = dict[str, list[Any]]
"""Column name -> values, all of one length."""


def text_bytes(text: object) -> bytes:
    """`text` in UTF-8; raises InvalidInputError for anything but a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidInputError(f"log_text takes a str, not {type(text).__name__}: convert it, or use log_dict")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InvalidInputError(
            f"the text has half of a surrogate pair at {exc.start}, which UTF-8 cannot hold: remove it, or write "
            "bytes to a file and use log_artifact"
        ) from exc


def dict_bytes(value: object, artifact_file: str) -> bytes:
    """`value` as YAML for .yaml and .yml, as JSON otherwise."""
    if not isinstance(value, Mapping | list | tuple):
        raise InvalidInputError(f"log_dict takes a dict or a list, not {type(value).__name__}")
    if PurePosixPath(artifact_file).suffix.lower() in (".yaml", ".yml"):
        import yaml

        try:
            text = str(yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True))
        except yaml.YAMLError as exc:
            raise InvalidInputError(f"{artifact_file!r}: the value cannot be written as YAML: {exc}") from exc
        return text_bytes(text)
    try:
        return json.dumps(plain(value), indent=2, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{artifact_file!r}: the value cannot be written as JSON: {exc}") from exc


def parse_dict(content: bytes, artifact_file: str) -> Any:
    """The inverse of `dict_bytes`."""
    try:
        if PurePosixPath(artifact_file).suffix.lower() in (".yaml", ".yml"):
            import yaml

            try:
                return yaml.safe_load(content)
            except yaml.YAMLError as exc:
                raise ValueError(str(exc)) from exc
        return json.loads(content)
    except ValueError as exc:
        raise InvalidInputError(f"artifact {artifact_file!r} is neither JSON nor YAML: {exc}") from exc


def figure_bytes(figure: Any, artifact_file: str, save_kwargs: Mapping[str, Any] | None = None) -> bytes:
    """A matplotlib figure (anything with `savefig`) or a plotly figure in the format of the file name's suffix."""
    suffix = PurePosixPath(artifact_file).suffix.lower().lstrip(".")
    options = dict(save_kwargs or {})
    if hasattr(figure, "savefig"):
        buffer = io.BytesIO()
        options.setdefault("format", suffix or "png")
        try:
            figure.savefig(buffer, **options)
        except ValueError as exc:
            raise InvalidInputError(f"{artifact_file!r}: matplotlib cannot write this format: {exc}") from exc
        return buffer.getvalue()
    if hasattr(figure, "to_html") and hasattr(figure, "to_image"):
        if suffix in ("html", "htm"):
            return text_bytes(figure.to_html(**{"include_plotlyjs": "cdn", "auto_open": False, **options}))
        try:
            return bytes(figure.to_image(format=suffix or "png", **options))
        except (ImportError, ValueError) as exc:
            raise InvalidInputError(
                f"{artifact_file!r}: plotly could not draw it ({exc}): pip install kaleido, or log it as .html"
            ) from exc
    raise InvalidInputError(
        f"log_figure takes a matplotlib or plotly figure, not {type(figure).__name__}; for arrays use log_image"
    )


def image_bytes(image: Any, artifact_file: str) -> bytes:
    """A pillow image, or an array (height, width[, 1, 3 or 4]) of bool, integers 0-255 or floats 0-1, as a picture."""
    suffix = PurePosixPath(artifact_file).suffix.lower() or ".png"
    picture = image if hasattr(image, "save") and hasattr(image, "mode") else _picture(image)
    pillow = _pillow()
    pillow.init()
    kind = pillow.registered_extensions().get(suffix)
    if kind is None or kind not in pillow.SAVE:
        raise InvalidInputError(f"{artifact_file!r}: {suffix!r} is no picture format: use .png, .jpg or .webp")
    if kind == "JPEG" and picture.mode not in ("L", "RGB", "CMYK"):
        picture = picture.convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as exc:
        raise MissingExtraError("log_image", packages="pillow") from exc
    return Image


def _picture(array: Any) -> Any:
    if not all(hasattr(array, name) for name in ("shape", "dtype", "__array__")):
        raise InvalidInputError(f"log_image takes a numpy array or a pillow image, not {type(array).__name__}")
    pillow = _pillow()
    import numpy

    pixels = numpy.asarray(array)
    shape = tuple(pixels.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise InvalidInputError(
            f"log_image takes arrays of shape (height, width) or (height, width, 1, 3 or 4), not {shape}"
        )
    if len(shape) == 3 and shape[2] == 1:
        pixels = pixels[:, :, 0]
    kind = pixels.dtype.kind
    if kind not in "biuf":
        raise InvalidInputError(f"log_image takes bool, integer or float pixels, not {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    top = 255.0 if kind in "iu" else 1.0
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > top:
        raise InvalidInputError(
            f"log_image: {pixels.dtype} pixels must lie in 0 to {top:g}, these lie in {low:g} to {high:g}: scale them"
        )
    if kind != "u" or pixels.dtype.itemsize != 1:
        pixels = (pixels * (255.0 / top)).round().astype("uint8")
    return pillow.fromarray(pixels)


def table_of(data: Any) -> Table:
    """The columns of a dict (of lists or scalars) or of a pandas DataFrame (anything with `to_dict` and `columns`)."""
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        raw: Mapping[Any, Any] = data.to_dict(orient="list")
    elif isinstance(data, Mapping):
        raw = data
    else:
        raise InvalidInputError(f"log_table takes a dict or a DataFrame, not {type(data).__name__}")
    table: Table = {}
    for name, values in raw.items():
        if hasattr(values, "tolist"):
            values = values.tolist()
        whole = isinstance(values, Sequence) and not isinstance(values, str | bytes)
        table[str(name)] = list(values) if whole else [values]
    lengths = {name: len(values) for name, values in table.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInputError(f"log_table: columns have different lengths: {lengths}")
    return table


def table_bytes(table: Table, earlier: bytes | None, artifact_file: str) -> bytes:
    """`table` behind the rows of `earlier` (an artifact that `log_table` wrote), as JSON in pandas' split form."""
    columns, rows = list(table), [list(row) for row in zip(*table.values(), strict=True)]
    if earlier is not None:
        before = parse_dict(earlier, artifact_file)
        if not isinstance(before, dict) or not {"columns", "data"} <= before.keys():
            raise InvalidInputError(f"{artifact_file!r} is already there and no table: choose another name")
        everything = [*before["columns"], *(name for name in columns if name not in before["columns"])]
        old = [dict(zip(before["columns"], row, strict=True)) for row in before["data"]]
        new = [dict(zip(columns, row, strict=True)) for row in rows]
        columns, rows = everything, [[row.get(name) for name in everything] for row in old + new]
    try:
        return json.dumps(plain({"columns": columns, "data": rows}), ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{artifact_file!r}: the table cannot be written as JSON: {exc}") from exc


def plain(value: Any, depth: int = 0) -> Any:
    """`value` with arrays, scalars, paths and dates turned into what JSON and YAML know; keys become strings."""
    if depth > 200:
        raise InvalidInputError("the value is nested deeper than 200 levels, or contains itself")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1) for item in value]
    if hasattr(value, "tolist"):  # numpy, torch and jax arrays and scalars
        return plain(value.tolist(), depth + 1)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, bool | int | float | str):  # subclasses, enums of them
        return json.loads(json.dumps(value))
    return str(value)
