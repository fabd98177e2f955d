"""`runstream.log_metric` and `runstream.log_metrics`: the module-level hot path, inlined over this module's globals.

`api` re-exports the two functions and tells this module which run is active:

- `activate(channel)` whenever the active run changes, `activate(None)` when there is none;
- `on_slow(metric, metrics)` once at import: called for what the fast path does not decide, that is no active run, an
  explicit `run_id`, a `model_id` or a `dataset`. They route to a `RunChannel` and call its functions.

Why here and so: every layer costs (attribute 15 ns, delegating method 35 ns, contextvar 47 ns), and a plain function
that appends to a growing deque takes 190 ns. One global function over one global `write` is 240 ns;
`bench/log_metric.py`. The active run is process-global: a context variable would be empty in new threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .channel import MISSES, RunChannel, unbound
from .errors import RunstreamError
from .journal.record import POINT

__all__ = ["activate", "log_metric", "log_metrics", "on_slow"]

SlowMetric = Callable[[Any, Any, Any, Any, Any, Any, Any], None]
"""(key, value, step, timestamp, run_id, model_id, dataset)"""
SlowMetrics = Callable[[Any, Any, Any, Any, Any, Any], None]
"""(metrics, step, timestamp, run_id, model_id, dataset)"""


def _no_run(*_: Any) -> Any:
    raise RunstreamError("no active run: call runstream.start_run() first")


_binding = threading.RLock()
_pack = POINT.pack
_now = time.time
_write: Callable[[bytes], object] = unbound
_ids: dict[str, int] = {}
_channel: RunChannel | None = None
_slow_metric: SlowMetric = _no_run
_slow_metrics: SlowMetrics = _no_run


def log_metric(
    key: str,
    value: float,
    step: int | None = None,
    synchronous: bool | None = None,
    timestamp: int | None = None,
    run_id: str | None = None,
    model_id: str | None = None,
    dataset: Any = None,
) -> None:
    """Log one point of a metric to the active run. Returns once the point survives a kill of this process; never
    blocks.

    Args:
        key: metric key, at most 250 characters.
        value: float, int, bool, Decimal, or a numpy, torch or jax scalar; NaN and infinities are kept.
        step: integer x axis; 0 if left out.
        synchronous: accepted for MLflow; every call is durable on this machine and none waits for the network.
        timestamp: UTC milliseconds; now if left out.
        run_id: log to this run instead of the active one.
        model_id: see MLflow.
        dataset: see MLflow.

    Raises:
        InvalidTypeError, InvalidInputError: what cannot be logged; nothing was.
    """
    kind = type(value)
    if timestamp is None and run_id is None and model_id is None and dataset is None and (kind is float or kind is int):
        try:
            # `_write` is loaded before `_ids`: a channel clears its ids before it binds a new journal's write.
            _write(_pack(_ids[key], value, 0 if step is None else step, _now()))
            return
        except MISSES:  # new key, segment full, no run, odd key or step
            pass
    _log_slowly(key, value, step, timestamp, run_id, model_id, dataset)


def log_metrics(
    metrics: Mapping[str, float],
    step: int | None = None,
    synchronous: bool | None = None,
    run_id: str | None = None,
    timestamp: int | None = None,
    model_id: str | None = None,
    dataset: Any = None,
) -> None:
    """Log several metrics of one step in one call, all or nothing; see `log_metric`."""
    channel = _channel
    if channel is None or run_id is not None or model_id is not None or dataset is not None:
        _slow_metrics(metrics, step, timestamp, run_id, model_id, dataset)
    else:
        channel.log_metrics(metrics, step, timestamp)


def _log_slowly(key: Any, value: Any, step: Any, timestamp: Any, run_id: Any, model_id: Any, dataset: Any) -> None:
    global _write
    channel = _channel
    if channel is None or run_id is not None or model_id is not None or dataset is not None:
        _slow_metric(key, value, step, timestamp, run_id, model_id, dataset)
        return
    channel.log_metric(key, value, step, timestamp)
    if timestamp is None and type(value) in (float, int):
        # The fast path has failed: its segment is full, or there was none yet.
        with _binding:
            if channel is _channel:
                _write, _ = channel.hot()


def activate(channel: RunChannel | None) -> None:
    """Make `channel` the one that `log_metric` writes to; None: no run is active."""
    with _binding:
        write, ids = (unbound, {}) if channel is None else channel.hot()
        # One C call, so that no thread sees the ids of one run with the write of another's journal.
        globals().update(_write=write, _ids=ids, _channel=channel)


def on_slow(metric: SlowMetric, metrics: SlowMetrics) -> None:
    """Where calls go that the fast path does not decide; see the module's docstring."""
    global _slow_metric, _slow_metrics
    _slow_metric, _slow_metrics = metric, metrics


def _after_fork_in_child() -> None:
    global _binding
    _binding = threading.RLock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
