"""A program as a user types it; `test_public_names` has mypy check it strictly. It is never run."""

from __future__ import annotations

from typing import Any, assert_type

import runstream
from runstream import ActiveRun, Client, Dataset, Experiment, FileInfo, Metric, Report, Run
from runstream.artifacts import Progress
from runstream.testing import Recording, recording


def train(epochs: int) -> None:
    """The calls of a training loop."""
    assert_type(runstream.set_experiment("vision"), Experiment)
    with runstream.start_run(run_name="first", tags={"env": "prod"}) as run:
        assert_type(run, ActiveRun)
        assert_type(run.info.run_id, str)
        assert_type(run.info.end_time, int | None)
        for epoch in range(epochs):
            runstream.log_metric("loss", 1.0 / (epoch + 1), step=epoch)
            runstream.log_metrics({"acc": 0.5, "f1": 1}, step=epoch)
        runstream.log_params({"lr": 0.1, "layers": [1, 2]})
        runstream.log_text("done", "report.txt")
        assert_type(runstream.log_input(name="wine"), Dataset)
        assert_type(runstream.get_artifact_uri(), str)
    assert_type(runstream.active_run(), ActiveRun | None)
    assert_type(runstream.last_active_run(), Run | None)
    assert_type(runstream.flush(), Report)


def read(run_id: str) -> None:
    """The calls of a notebook."""
    run = runstream.get_run(run_id)
    assert_type(run, Run)
    assert_type(run.data.metrics["loss"], float)
    assert_type(runstream.search_experiments(), list[Experiment])
    assert_type(runstream.get_experiment_by_name("vision"), Experiment | None)
    assert_type(runstream.list_artifacts(run_id=run_id), list[FileInfo])
    assert_type(runstream.load_text(f"runs:/{run_id}/report.txt"), str)
    frame: Any = runstream.search_runs(filter_string="metrics.loss < 0.1")
    print(frame)


def manage(client: Client, run_id: str) -> None:
    """The calls of a program without an active run."""
    assert_type(client.create_experiment("other"), str)
    assert_type(client.create_run("0").info.status, str)
    assert_type(client.get_metric_history(run_id, "loss"), list[Metric])
    page = client.search_runs(["0"])
    assert_type(page.token, str | None)
    assert_type(page[0], Run)
    client.log_batch(run_id, metrics=[Metric("loss", 1.0, 0, 0)])

    def show(progress: Progress) -> None:
        assert_type(progress.bytes_done, int)

    client.log_artifacts(run_id, "folder", progress=show)


def check() -> None:
    """The calls of a test suite."""
    with recording() as recorded:
        assert_type(recorded, Recording)
        assert_type(recorded.runs, list[Run])
