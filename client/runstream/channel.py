"""`RunChannel`: the closures that log metrics of one run, and the checks on their slow path.

The fast path is one dict look-up and two C calls. Whatever makes it raise (a new key, an odd type, a full segment,
another journal) leads to the slow path, which checks everything, so that the fast one need not.
"""

from __future__ import annotations

import logging
import operator
import struct
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from runstream_schemas.limits import MAX_STEP, MAX_TIME_MS, METRIC_KEYS_WARNING, MIN_STEP

from .errors import InvalidInputError, InvalidTypeError
from .journal.record import MAX_CALL_BYTES, POINT, call_bytes, call_record, explicit_time

if TYPE_CHECKING:
    from .journal.journal import Journal

__all__ = ["MISSES", "RunChannel", "Write", "metric_value", "unbound"]

MAX_SHAPES: Final = 1_000
"""Distinct key tuples of one run that are kept as shapes; further ones are written as single points."""
MISSES: Final = (KeyError, ValueError, TypeError, OverflowError, struct.error)
"""Narrow: an exception that a signal handler throws in must pass, or its point would be logged twice."""

Write = Callable[[bytes], object]
log = logging.getLogger("runstream")


def unbound(_: bytes) -> object:
    """Stands for `write` while there is no journal."""
    raise ValueError


class RunChannel:
    """Logs metrics of one run. Look its two functions up once and call them often, from any thread."""

    def __init__(self, run_id: str, bind: Callable[[RunChannel, Write | None], Write], add: _Add) -> None:
        """
        Args:
            bind: `bind(channel, stale)`: the write to use now that `stale` has failed (None: any that is current);
                empties `ids` and `shapes` first if the journal is another one.
            add: gives an id to a key or key tuple, once: `add(channel, key)`.
        """
        self.run_id = run_id
        self.ids: dict[str, int] = {}
        self.shapes: dict[tuple[str, ...], tuple[int, Callable[..., bytes]]] = {}
        self.journal: Journal | None = None
        """The journal that `ids` belong to; only the recorder changes it."""
        self.keys: set[str] = set()
        self._warned = False
        self._add = add
        self._checked_shapes: set[tuple[str, ...]] = set()
        self.log_metric: Callable[..., None]
        """`log_metric(key, value, step=None, timestamp=None)`: timestamp in UTC ms, None is now; step None is 0.

        Raises InvalidTypeError or InvalidInputError for what cannot be logged, and has logged nothing then.
        """
        self.log_metrics: Callable[..., None]
        """`log_metrics(mapping, step=None, timestamp=None)`: one call, checked as a whole before any of it is logged.
        """
        self.hot: Callable[[], tuple[Write, dict[str, int]]]
        """`(write, ids)` of now, for `runstream.hot`; stale ones fail with ValueError or KeyError."""
        self.log_metric, self.log_metrics, self.hot = _closures(self, bind)

    def register(self, key: str) -> None:
        """Give `key` an id in the present journal.

        Raises:
            InvalidTypeError, InvalidInputError: no legal key.
        """
        self.check_key(key)
        self._add(self, key)

    def check_key(self, key: Any) -> None:
        """Refuse what is no legal key; warn once if the run has very many."""
        if not isinstance(key, str):
            raise InvalidTypeError(f"metric key must be a str, not {type(key).__name__}: {_short(key)}")
        if key in self.keys:
            return
        from .validation import check_key

        check_key("metric key", key)
        self.keys.add(key)
        if len(self.keys) > METRIC_KEYS_WARNING and not self._warned:
            self._warned = True
            log.warning(
                "runstream: run %s logs more than %s distinct metric keys; put what varies into the step, not the key",
                self.run_id,
                f"{METRIC_KEYS_WARNING:,}",
            )

    def shape_of(self, keys: tuple[str, ...]) -> bool:
        """Give the key tuple a shape; False if it must be written as single points."""
        if call_bytes(len(keys)) > MAX_CALL_BYTES or (len(self.shapes) >= MAX_SHAPES and keys not in self.shapes):
            return False
        self._add(self, keys)
        return True


_Add = Callable[[RunChannel, str | tuple[str, ...]], None]


def _closures(
    channel: RunChannel, bind: Callable[[RunChannel, Write | None], Write]
) -> tuple[Callable[..., None], Callable[..., None], Callable[[], tuple[Write, dict[str, int]]]]:
    ids, shapes = channel.ids, channel.shapes
    write: Write = unbound
    pack, now = POINT.pack, time.time

    def log_metric(key: str, value: Any, step: Any = None, timestamp: Any = None) -> None:
        kind = type(value)
        if timestamp is None and (kind is float or kind is int):
            try:
                # `write` is loaded before `ids`: whoever binds another journal's write has emptied the ids before.
                write(pack(ids[key], value, 0 if step is None else step, now()))
                return
            except MISSES:
                pass
        if type(key) is not str or key not in ids:
            channel.check_key(key)
        number = value if kind is float else metric_value(key, value)
        whole_step = 0 if step is None else _step(key, step)
        when = now() if timestamp is None else _time(key, timestamp)
        put(key, number, whole_step, when)

    def put(key: str, value: float, step: int, when: float) -> None:
        nonlocal write
        while True:
            stale = write
            try:
                stale(pack(ids[key], value, step, when))
                return
            except KeyError:
                channel.register(key)
            except ValueError:
                write = bind(channel, stale)

    def log_metrics(metrics: Mapping[str, Any], step: Any = None, timestamp: Any = None) -> None:
        if timestamp is None:
            try:
                values = metrics.values()
                # 0.0 plus floats, ints and bools is a float, at a few ns a value; whatever else can be added (complex
                # numbers, arrays, numpy scalars) shows in the type of the sum.
                if type(sum(values, 0.0)) is float:
                    fresh = write
                    shape, pack_call = shapes[tuple(metrics)]
                    fresh(call_record(shape, pack_call(0 if step is None else step, now(), *values)))
                    return
            except (AttributeError, *MISSES):
                pass
        put_all(metrics, step, timestamp)

    def put_all(metrics: Any, step: Any, timestamp: Any) -> None:
        nonlocal write
        if not isinstance(metrics, Mapping):
            raise InvalidTypeError(f"log_metrics takes a dict of key to value, not {type(metrics).__name__}")
        items = list(metrics.items())
        keys = tuple(key for key, _ in items)
        for key in keys:
            channel.check_key(key)
        values = [metric_value(key, value) for key, value in items]
        if not items:
            return
        whole_step = _step(keys[0], step)
        when = now() if timestamp is None else _time(keys[0], timestamp)
        while channel.shape_of(keys):
            stale = write
            try:
                shape, pack_call = shapes[keys]
                stale(call_record(shape, pack_call(whole_step, when, *values)))
                return
            except KeyError:
                continue  # another journal was bound in between
            except ValueError:
                write = bind(channel, stale)
        for key, value in zip(keys, values, strict=True):
            put(key, value, whole_step, when)

    def hot() -> tuple[Write, dict[str, int]]:
        nonlocal write
        if channel.journal is not None:
            write = bind(channel, None)
        return write, ids

    return log_metric, log_metrics, hot


def metric_value(key: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        InvalidTypeError: no number, or more than one.
        InvalidInputError: an int beyond the range of a float.
    """
    kind = type(value)
    if kind is float or kind is int or kind is bool:
        try:
            return float(value)
        except OverflowError as exc:
            raise InvalidInputError(f"metric {key!r}: {_short(value)} is beyond the range of a float") from exc
    if not isinstance(value, (str, bytes, bytearray, memoryview, complex)) and value is not None:
        dtype = getattr(value, "dtype", None)
        letter = getattr(dtype, "kind", None)
        try:
            if letter not in ("c", "U", "S", "M", "m", "O") and not getattr(dtype, "is_complex", False):
                item = getattr(value, "item", None)
                # item(): one element as a Python number, without the warnings of float(array) and float(tensor).
                plain = item() if dtype is not None and callable(item) else value
                if hasattr(type(plain), "__float__") or hasattr(type(plain), "__index__"):
                    return float(plain)
        except OverflowError as exc:
            raise InvalidInputError(f"metric {key!r}: {_short(value)} is beyond the range of a float") from exc
        except Exception as exc:  # foreign conversions raise what they like
            raise _no_number(key, value) from exc
    raise _no_number(key, value)


def _no_number(key: str, value: Any) -> InvalidTypeError:
    shape = getattr(value, "shape", None)
    hint = ": log one number, such as its mean" if shape else ": convert it with float(...)"
    return InvalidTypeError(
        f"metric {key!r} must be one number, not {type(value).__name__}"
        f"{f' of shape {tuple(shape)}' if shape else ''}: {_short(value)}{hint}"
    )


def _step(key: str, step: Any) -> int:
    if step is None:
        return 0
    if type(step) is int and MIN_STEP <= step <= MAX_STEP:
        return step
    try:
        whole = operator.index(step)
    except TypeError:
        try:
            whole = int(step) if not isinstance(step, (str, bytes, bytearray)) else None  # type: ignore[assignment]
            exact = whole is not None and bool(whole == step)
        except Exception:
            exact = False
        if not exact:
            raise InvalidTypeError(f"metric {key!r}: step must be an integer, not {_short(step)}") from None
    if not MIN_STEP <= whole <= MAX_STEP:
        raise InvalidInputError(f"metric {key!r}: step {whole} does not fit into 64 bits ({MIN_STEP} to {MAX_STEP})")
    return whole


def _time(key: str, timestamp: Any) -> float:
    try:
        if isinstance(timestamp, (str, bytes, bytearray)) or not hasattr(timestamp, "__int__"):
            raise TypeError
        whole = int(timestamp)
    except (TypeError, ValueError, OverflowError):
        raise InvalidTypeError(
            f"metric {key!r}: timestamp must be UTC milliseconds as an integer, not {_short(timestamp)}"
        ) from None
    if not 0 <= whole < MAX_TIME_MS:
        raise InvalidInputError(
            f"metric {key!r}: timestamp {whole} ms lies outside 1970 to 2261: give UTC milliseconds since 1970"
        )
    return explicit_time(whole)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a broken repr must not hide the error
        return f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."
