"""Events of logged models, shared by the routes that make models and those that log metrics of them."""

from __future__ import annotations

from typing import Any

from runstream.transport import Event

from .backend import Backend
from .state import RunState
from .validation import clamp


def model_event(backend: Backend, model_id: str, **fields: Any) -> Event:
    """A change of one model."""
    return backend.events.make("logged_model", model_id, model_id=model_id, **fields)


def metric_events(
    backend: Backend, state: RunState, points: list[tuple[str, str, float, int, int, str, str]]
) -> list[Event]:
    """Events of metrics that belong to models: (model id, key, value, time, step, data set name, digest) points."""
    by_model: dict[str, list[tuple[str, str, float, int, int, str, str]]] = {}
    for point in points:
        by_model.setdefault(point[0], []).append(point)
    return [
        model_event(
            backend,
            model_id,
            metric_run_id=state.run_id,
            metric_keys=[point[1] for point in own],
            metric_values=[clamp(point[2]) for point in own],
            metric_times=[point[3] for point in own],
            metric_steps=[point[4] for point in own],
            metric_dataset_names=[point[5] for point in own],
            metric_dataset_digests=[point[6] for point in own],
        )
        for model_id, own in by_model.items()
    ]
