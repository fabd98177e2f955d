"""Runs as a DataFrame, with MLflow's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from runstream.entities import Run

if TYPE_CHECKING:
    import pandas

__all__ = ["runs_to_dataframe"]


def runs_to_dataframe(runs: Sequence[Run]) -> pandas.DataFrame:
    """run_id, experiment_id, status, artifact_uri, start_time, end_time, then `metrics.x`, `params.x` and `tags.x`.

    Times are UTC. A metric that a run does not have is NaN, a param or tag None.
    """
    from runstream.reading import runs_frame

    return cast("pandas.DataFrame", runs_frame(runs))
