"""`runstream server`: the web server around the MLflow-compatible API, SQL over HTTP, health and metrics."""

from __future__ import annotations

__all__: list[str] = []
