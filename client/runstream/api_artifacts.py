"""The module-level calls that move files of the active run (or of `run_id`). Names and order as in MLflow.

Every upload blocks until it is complete, and raises ArtifactError if storage refuses or fails for good: the one kind of
logging that can fail, since a file that is not there cannot follow later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .active import tracker
from .client import Client
from .errors import InvalidInputError, MissingExtraError, NotFoundError
from .run_artifacts import RunArtifacts
from .validation import check_run_id

__all__ = [
    "get_artifact_uri",
    "load_table",
    "log_artifact",
    "log_artifacts",
    "log_dict",
    "log_figure",
    "log_image",
    "log_table",
    "log_text",
]

LocalPath = str | os.PathLike[str]


def artifacts_of(run_id: str | None) -> RunArtifacts:
    """Artifacts of a run; of the active one, which is started where there is none, if `run_id` is None."""
    if run_id is None:
        return tracker.require_run().artifacts
    run = tracker.open_run(check_run_id(run_id))
    return run.artifacts if run is not None else Client().artifacts_of(run_id)


def log_artifact(local_path: LocalPath, artifact_path: str | None = None, run_id: str | None = None) -> None:
    """Upload a file, or a folder under its own name, into the artifact folder `artifact_path`."""
    artifacts_of(run_id).log(local_path, artifact_path)


def log_artifacts(local_dir: LocalPath, artifact_path: str | None = None, run_id: str | None = None) -> None:
    """Upload what a folder holds, several files at once; a second call sends only what is missing or has changed."""
    artifacts_of(run_id).log_tree(local_dir, artifact_path)


def log_text(text: str, artifact_file: str, run_id: str | None = None) -> None:
    """Write a text in UTF-8 as an artifact."""
    artifacts_of(run_id).log_text(text, artifact_file)


def log_dict(dictionary: Any, artifact_file: str, run_id: str | None = None) -> None:
    """Write a dict or list as JSON, or as YAML where the name ends in .yaml or .yml."""
    artifacts_of(run_id).log_dict(dictionary, artifact_file)


def log_figure(figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None) -> None:
    """Write a matplotlib or plotly figure in the format of the name's suffix."""
    artifacts_of(None).log_figure(figure, artifact_file, save_kwargs)


def log_image(
    image: Any,
    artifact_file: str | None = None,
    key: str | None = None,
    step: int | None = None,
    timestamp: int | None = None,
    synchronous: bool | None = None,
) -> None:
    """Write a picture as `artifact_file`, or as one step of the series `key`.

    Args:
        image: a pillow image, or an array (height, width[, 1, 3 or 4]) of bool, integers 0-255 or floats 0-1.
    """
    artifacts_of(None).log_image(image, artifact_file, key, step, timestamp)


def log_table(data: Any, artifact_file: str, run_id: str | None = None) -> None:
    """Write a dict of columns or a DataFrame as JSON; the rows of later calls come behind those of earlier ones."""
    artifacts_of(run_id).log_table(data, artifact_file)


def load_table(
    artifact_file: str, run_ids: Sequence[str] | None = None, extra_columns: Sequence[str] | None = None
) -> Any:
    """Tables that `log_table` wrote, of several runs, below each other in one pandas DataFrame.

    Args:
        run_ids: the runs; every active run of the active experiment that has this artifact if left out.
        extra_columns: add these to each row: `run_id`, or `run_name`, `experiment_id`, `start_time` and such.
    """
    try:
        import pandas
    except ImportError as exc:
        raise MissingExtraError("load_table", "server") from exc
    client = Client()
    if run_ids is None:
        rows = client.sql(
            "SELECT run_id FROM artifacts WHERE path = {path:String} AND run_id IN (SELECT run_id FROM runs WHERE "
            "experiment_id = {experiment:String} AND lifecycle_stage = 'active') ORDER BY run_id",
            {"path": artifact_file, "experiment": tracker.target().experiment_id},
            "rows",
        )
        run_ids = [str(row["run_id"]) for row in rows]
    elif isinstance(run_ids, str):
        raise InvalidInputError("run_ids must be a list of run ids")
    frames = []
    for run_id in run_ids:
        columns, data = artifacts_of(run_id).read_table(artifact_file)
        frame = pandas.DataFrame(data, columns=columns)
        for column in extra_columns or ():
            frame[column] = run_id if column == "run_id" else _column(client, run_id, column)
        frames.append(frame)
    if not frames:
        raise NotFoundError(f"no run has the table {artifact_file!r}")
    return pandas.concat(frames, ignore_index=True)


def get_artifact_uri(artifact_path: str | None = None) -> str:
    """Full address of the active run's artifacts, or of one of them."""
    return artifacts_of(None).uri_of(artifact_path)


def _column(client: Client, run_id: str, name: str) -> Any:
    run = client.get_run(run_id)
    if hasattr(run.info, name):
        return getattr(run.info, name)
    for values in (run.data.tags, run.data.params, run.data.metrics):
        if name in values:
            return values[name]
    return None
